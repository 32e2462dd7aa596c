"""Check machines before a long run: one line per check, with a remedy if it fails. Exit status 1 if any check fails.

    python scripts/doctor.py --hostfile hosts.txt                       this machine, and logins to the others
    torchrun --standalone --nproc_per_node 8 scripts/doctor.py          also its ranks together
    python scripts/run_on_hosts.py --nproc_per_node 8 --hostfile hosts.txt scripts/doctor.py -o /shared/run

It trains nothing and leaves nothing behind. Give it the run's --save_dir to check that all ranks share that folder.
With --measure FILE it also measures the speeds of the GPUs and links that step times are estimated from, in up to two
minutes, and names a card or link that is slow; dry runs and plan.py take that file as --facts.
With --build_extensions it only compiles, on each machine, the extensions that ColossalAI needs in the first run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from runtime import requirements
from runtime.console import InputError, first_line, local_rank, rank, say, world_size
from runtime.files import file_problems
from scripts.launcher.hosts import Host, read_hostfile

JOIN_SECONDS = 60
SHARED_SECONDS = 30  # a network file system may need this long to show a file to other machines
MAX_SKEW_SECONDS = 1.0
MIN_FREE_FRACTION = 0.95  # of a GPU's memory, before training
ALL_REDUCE_BYTES = {"nccl": 2**29, "gloo": 2**25}
ROUNDS = 5


@dataclass(frozen=True)
class Finding:
    """Result of one check on one machine. `ok` is None if there is nothing to check; `remedy` is for a failure."""

    check: str
    ok: bool | None
    detail: str
    remedy: str = ""


# ---------------------------------------------------------------------------------------------------- on every machine


def packages() -> Finding:
    """Compare the installed versions with the requirements files."""
    found = requirements.packages()
    wrong = [package.problem for package in found if package.problem]
    if wrong:
        remedy = "bash scripts/setup.sh, or pip install with the requirements files"
        return Finding("packages", False, "; ".join(wrong), remedy)
    versions = {package.requirement.name: package.version for package in found}
    named = ", ".join(f"{name} {versions.get(name)}" for name in requirements.BUILT_ON)
    detail = f"{named} and {len(versions) - len(requirements.BUILT_ON)} more, as the requirements files say"
    return Finding("packages", True, detail)


def cuda() -> Finding:
    """Check that torch finds the GPU, and that nvcc has the same major version of CUDA."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    from engine.launch import missing_extensions

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.strip():
            detail = f"nvidia-smi lists GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds none"
            return Finding("CUDA", False, detail, "install a torch for a CUDA that the driver supports (pytorch.org)")
        return Finding("CUDA", None, "no GPU; training runs on the CPU over Gloo")
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not CUDA_HOME or not nvcc.is_file():
        if not missing_extensions():
            return Finding("CUDA", True, f"torch for CUDA {torch.version.cuda}; no nvcc, but nothing to compile")
        return Finding("CUDA", False, "no nvcc, which compiles ColossalAI's extensions", "set CUDA_HOME to its folder")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = answer.partition("release ")[2].partition(",")[0]
    detail = f"torch for CUDA {torch.version.cuda}, nvcc {version} in {CUDA_HOME}"
    same = version.partition(".")[0] == str(torch.version.cuda).partition(".")[0]
    remedy = f"set CUDA_HOME to a CUDA {torch.version.cuda}, or install a torch for CUDA {version}"
    return Finding("CUDA", same, detail, remedy)


def extensions(build: bool = False) -> Finding:
    """Check that ColossalAI's extensions are compiled; with `build`, compile them."""
    import torch

    from engine.launch import compile_extensions, missing_extensions

    if not torch.cuda.is_available():
        return Finding("extensions", None, "no GPU, so there is nothing to compile")
    if not build and (missing := missing_extensions()):
        detail = f"not compiled yet: {', '.join(missing)}; bash scripts/build_extensions.sh"
        return Finding("extensions", None, detail)
    if build:
        try:
            compile_extensions()
        except Exception as error:  # ninja, nvcc and the loader raise many kinds
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            return Finding("extensions", False, reason, "see the CUDA line of python scripts/doctor.py")
    return Finding("extensions", True, "compiled")


def attention() -> Finding:
    """Run once, on a GPU, the attention kernel that -a selects."""
    import torch

    from attn import FLASH_ATTENTION, select_attention
    from model_utils import load_config

    config = load_config("test")
    line = select_attention(config, flash_attention=True).removeprefix("attention: ")
    if not torch.cuda.is_available():
        return Finding("attention", True, f"-a selects {line}")
    query = torch.randn(1, 128, 4, 64, dtype=torch.bfloat16, device="cuda")
    try:
        if config._attn_implementation == FLASH_ATTENTION:
            from flash_attn import flash_attn_func

            flash_attn_func(query, query, query, causal=True)
        else:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                query = query.transpose(1, 2)
                torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.cuda.synchronize()
    except (ImportError, RuntimeError) as error:
        remedy = "reinstall flash-attn for this torch, or uninstall it; without -a no such kernel is needed"
        return Finding("attention", False, f"-a selects {line}, which fails: {first_line(error)}", remedy)
    return Finding("attention", True, f"-a selects {line}; it ran on the GPU")


def memory() -> Finding:
    """Check that the GPUs' memory is free before training."""
    import psutil
    import torch

    host = f"{psutil.virtual_memory().available / 1e9:.1f} GB of host memory free"
    if not torch.cuda.is_available():
        return Finding("memory", True, host)
    free = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    least = min(unused for unused, _ in free)
    detail = f"{len(free)} x {torch.cuda.get_device_name(0)}, at least {least / 1e9:.1f} GB free; {host}"
    full = [
        f"GPU {device}: {unused / 1e9:.1f} of {size / 1e9:.1f}"
        for device, (unused, size) in enumerate(free)
        if unused < MIN_FREE_FRACTION * size
    ]
    if full:
        return Finding(
            "memory", False, f"GB free on {', '.join(full)}", "end the processes that nvidia-smi lists there"
        )
    return Finding("memory", True, detail)


def hosts(hostfile: Path) -> list[Finding]:
    """Check that each host in a hosts file resolves, allows a login, and has this folder and Python."""
    try:
        names = read_hostfile(hostfile)
    except ValueError as error:
        raise InputError(f"--hostfile: {error}") from error
    problems = {name: Host(name).problem(os.getcwd()) for name in names}
    wrong = [
        Finding("hosts", False, f"{name}: {problem}", "see SEVERAL_MACHINES.md")
        for name, problem in problems.items()
        if problem
    ]
    return wrong or [Finding("hosts", True, f"login works on all {len(names)}, and they have this folder and Python")]


# ----------------------------------------------------------------------------------------------- of all ranks together


def join() -> str:
    """Form the process group of all ranks and return its backend.

    Raises:
        RuntimeError: the ranks did not find each other in time.
    """
    import torch
    import torch.distributed as dist

    from engine.launch import gpu_index

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout then raises an error
        torch.cuda.set_device(gpu_index())
    dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))
    dist.barrier(device_ids=[gpu_index()] if backend == "nccl" else None)  # NCCL connects in its first collective
    return backend


def all_reduce(backend: str) -> Finding:
    """Check a sum over all ranks, and measure its bus bandwidth as nccl-tests does: 2 (n - 1) / n x bytes / time."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if backend == "nccl" else "cpu")
    seconds = []
    for _ in range(ROUNDS):
        values = torch.full((ALL_REDUCE_BYTES[backend] // 4,), float(rank()), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    ranks = world_size()
    right = bool((values == ranks * (ranks - 1) / 2).all())
    bandwidth = 2 * (ranks - 1) / ranks * ALL_REDUCE_BYTES[backend] / statistics.median(seconds) / 1e9
    detail = f"{backend}, {ranks} ranks, {ALL_REDUCE_BYTES[backend] / 2**20:.0f} MiB: {bandwidth:.2f} GB/s"
    fault = "" if right else ", but the sum is wrong"
    return Finding("all-reduce", right, f"{detail}{fault}", "a link or a GPU is faulty: NCCL_DEBUG=INFO")


def clocks() -> Finding:
    """Compare the machines' clocks, which every rank reads right after a barrier."""
    import torch.distributed as dist

    from runtime.collectives import gather

    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        rounds.append(gather((socket.gethostname(), time.time())))
    skews = {
        host: statistics.median(times[number][1] - times[0][1] for times in rounds)
        for number, (host, _) in enumerate(rounds[0])
    }
    worst = max(skews, key=lambda host: abs(skews[host]))
    if abs(skews[worst]) <= MAX_SKEW_SECONDS:
        return Finding("clocks", True, f"at most {abs(skews[worst]):.3f} s apart")
    ahead = "ahead of" if skews[worst] > 0 else "behind"
    detail = f"{worst} is {abs(skews[worst]):.1f} s {ahead} {rounds[0][0][0]}"
    return Finding("clocks", False, detail, "synchronize them (chrony or systemd-timesyncd)")


def shared_folder(folder: Path) -> Finding:
    """Check that every rank sees a file that rank 0 writes, and rank 0 sees every rank's."""
    from runtime.collectives import gather

    run = gather(uuid.uuid4().hex)[0]
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".doctor-{run}-{rank()}"
        own.write_text("seen")
        error = None
    except OSError as caught:
        error = f"{socket.gethostname()} cannot write to {folder}: {caught.strerror}"
    errors = [other for other in gather(error) if other]
    if errors:
        return Finding("shared folder", False, errors[0], "mount it writable there, or give another folder with -o")
    expected = [folder / f".doctor-{run}-{number}" for number in (range(world_size()) if rank() == 0 else (0,))]
    deadline = time.monotonic() + SHARED_SECONDS
    while not all(path.exists() for path in expected) and time.monotonic() < deadline:
        time.sleep(0.1)
    unseen = [path for path in expected if not path.exists()]
    blind = sorted({host for host, missing in gather((socket.gethostname(), bool(unseen))) if missing})
    own.unlink()
    gather(None)
    if not existed:
        with contextlib.suppress(OSError):
            folder.rmdir()
    if blind:
        detail = f"{folder}: {', '.join(blind)} did not see the others' files within {SHARED_SECONDS} s"
        return Finding("shared folder", False, detail, "give a folder on a file system shared by all machines")
    return Finding("shared folder", True, f"all {world_size()} ranks write and see {folder}")


# ------------------------------------------------------------------------------------------------------------ together


def measure_facts(file: Path) -> list[Finding]:
    """Measure the facts that step times are estimated from, and write them. Collective over all ranks."""
    from engine.launch import use_own_cores
    from planning.facts import write_facts
    from planning.measure import measure

    use_own_cores()
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "0"  # for the groups it creates; see `join`. A wait polls each millisecond
    facts, shortfalls = measure()
    if rank() == 0:
        write_facts(file, facts)
    remedy = "nvidia-smi -q -d PERFORMANCE,TEMPERATURE shows throttling; end other processes; nvidia-smi topo -m, links"
    slow = [Finding("speed", False, str(shortfall), remedy) for shortfall in shortfalls]
    summary = (
        f"{facts.products[-1][1]:,.1f} TFLOPS in bf16, {facts.memory:,.0f} GB/s of memory, links "
        f"{facts.collectives:,.1f} GB/s; written to {file}"
    )
    return [*slow, Finding("speed", True, summary)]


def lines(finding: Finding, host: str | None = None) -> list[str]:
    """Format a finding: a line, and another for the remedy, if any."""
    mark = {True: "ok", False: "FAILED", None: "-"}[finding.ok]
    line = f"{mark:<7} {finding.check:<14} {f'{host}: ' if host else ''}{finding.detail}"
    return [line, f"{'':<22} -> {finding.remedy}"] if finding.remedy and finding.ok is False else [line]


def show(findings: dict[str, Finding]) -> bool:
    """Print the hosts' findings of one check on rank 0, once if they are equal; return True if none failed."""
    alike = len(set(findings.values())) == 1
    for host, finding in findings.items():
        for line in lines(finding, None if alike else host):
            say(line)
        if alike:
            break
    return all(finding.ok is not False for finding in findings.values())


def report(finding: Finding) -> bool:
    """Show the finding of every machine's first rank; return True, on every rank, if none failed. Collective."""
    from runtime.collectives import gather

    gathered = gather((socket.gethostname(), local_rank(), finding))
    return show({host: found for host, local, found in gathered if local == 0})


def show_own(finding: Finding) -> int:
    """Print this machine's finding without asking the others; return the exit status."""
    if local_rank() == 0:
        for line in lines(finding, socket.gethostname() if rank() else None):
            print(line, flush=True)
    return int(finding.ok is False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--save_dir", type=Path, default=Path("checkpoint"), help="folder shared by all ranks")
    parser.add_argument("--hostfile", type=Path, help="check logins to these hosts, one name per line")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure speeds and write them to this file")
    parser.add_argument("--build_extensions", action="store_true", help="only compile ColossalAI's extensions")
    args = parser.parse_args()
    if args.measure and (problems := file_problems("--measure", args.measure)):
        raise InputError(*problems)

    first = packages()
    try:
        from engine.launch import launch_problems
    except ImportError as error:
        show_own(first)
        return show_own(Finding("imports", False, str(error), "bash scripts/setup.sh"))
    if args.build_extensions:
        return show_own(_on_first_of_machine(lambda: extensions(build=True)))
    if "RANK" in os.environ:
        if problems := launch_problems():
            raise InputError(*problems)
        try:
            backend = join()
        except (RuntimeError, ValueError) as error:
            detail = f"not joined within {JOIN_SECONDS} s: {first_line(error)}"
            remedy = "open --master_port; name the interface: GLOO_SOCKET_IFNAME, with GPUs NCCL_SOCKET_IFNAME"
            return show_own(Finding("process group", False, detail, remedy))
    good = report(first)
    for check in (cuda, extensions, attention, memory):
        good &= report(_on_first_of_machine(check))
    if args.hostfile and rank() == 0:
        for finding in hosts(args.hostfile):
            good &= show({socket.gethostname(): finding})
    if world_size() > 1:
        good &= report(all_reduce(backend))
        good &= report(clocks())
    good &= report(shared_folder(args.save_dir))
    for finding in measure_facts(args.measure) if args.measure else ():
        good &= show({socket.gethostname(): finding})
    say("all checks passed" if good else "some checks failed: see the lines FAILED")
    return int(not good)


def _on_first_of_machine(check: Callable[[], Finding]) -> Finding:
    return check() if local_rank() == 0 else Finding(check.__name__, None, "")


if __name__ == "__main__":
    process.run(main, "doctor.py")
