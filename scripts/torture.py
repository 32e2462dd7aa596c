"""Kill a small run repeatedly, at random times and in every phase of a save, and check that nothing is lost.

    python scripts/torture.py --data quickstart/data --tokenizer quickstart/tokenizer --times 200 --processes 2

Each time, SIGKILL ends one rank of a run, or all, and the run is resumed with `-f latest`. Its final master weights and
moments must equal the undisturbed run's bit for bit, and its metrics.jsonl must list every step once. Half of the kills
come at a random time, half at a random file operation of a checkpoint. The same --seed kills in the same places. The
output ends with a table: fault, times tried, times survived.

    python scripts/torture.py --data quickstart/data --tokenizer quickstart/tokenizer --minutes 30

disturbs one run on two hosts of two ranks for 30 minutes: killed and stopped ranks, a cut link, a full disk, a damaged
newest checkpoint. run_on_hosts.py starts it again each time. The hosts are Linux namespaces, which need root, OpenSSH's
server, and requirements-dev.txt.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, SAVE_INTERVAL = 6, 2
FILE_OPERATIONS = ("sync", "write_json", "write_tensors", "checksum", "replace_folder")


class Fault(NamedTuple):
    """A kill: its kind and its place; `finished` if the run, resumed or not, reached its end."""

    kind: str
    place: str
    finished: bool = False


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set for pretrain.py")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--times", type=int, default=200, help="number of kills (default: 200)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of the run (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    text = "disturb one run on two hosts for this long, instead of the kills"
    parser.add_argument("--minutes", type=float, help=text)
    text = "seconds between a recovery and the next fault, least and most (default: 20 60)"
    parser.add_argument("--pause", type=float, nargs=2, default=(20, 60), metavar="SECONDS", help=text)
    args = parser.parse_args()
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"--minutes: must be above 0, not {args.minutes}")
    return args


def child() -> None:
    """Run pretrain.main(); on rank TORTURE_RANK, kill it at file operation number TORTURE_OPERATION."""
    sys.path.insert(0, str(REPOSITORY))
    from runtime import process

    process.prepare()
    import pretrain
    from checkpointing import writer
    from runtime import files

    fatal, count = int(os.environ.get("TORTURE_OPERATION", 0)), 0
    if fatal and os.environ.get("TORTURE_RANK", "0") == os.environ.get("RANK", "0"):

        def counted(operation: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return call

        for module in (files, writer):
            for name in FILE_OPERATIONS:
                if hasattr(module, name):
                    setattr(module, name, counted(getattr(module, name)))
    process.run(pretrain.main, "pretrain.py")


def start(args: argparse.Namespace, folder: Path, cache: Path, **environment: str) -> subprocess.Popen:
    launcher = [sys.executable]
    if args.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
    saved = folder / "checkpoint"
    command = [*launcher, __file__, "-c", "tiny", "-p", "zero2", "-x", "bf16", "-l", "32", "-b", "2", "-s", "2"]
    command += ["--max_steps", str(STEPS), "-i", str(SAVE_INTERVAL), "-d", args.data, "--tokenizer", args.tokenizer]
    command += ["--cache_dir", str(cache), "-o", str(saved), "-t", str(folder / "logs"), "-f", "latest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORTURE_CHILD": "1", **environment}
    output = open(folder / "output.txt", "a")  # noqa: SIM115
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def kill_all(process: subprocess.Popen) -> None:
    """Kill a launcher and its ranks, which it starts in sessions of their own, so that they would outlive it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for victim in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the process ids of a launcher's ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(process.pid).children()]
    return []


def digest(folder: Path) -> str:
    """Return a hash of the last checkpoint's master weights and moments."""
    result = hashlib.sha256()
    (last,) = (folder / "checkpoint").glob(f"epoch*-step{STEPS}")
    for path in sorted((last / "optimizer").iterdir()):
        result.update(path.read_bytes())
    return result.hexdigest()


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def kill_once(args: argparse.Namespace, chance: random.Random, folder: Path, cache: Path, seconds: float) -> Fault:
    """Start a run that takes `seconds` if undisturbed, kill it in a random way, and resume it if it did not finish."""
    if chance.random() < 0.5:
        operation, victim = chance.randint(1, 60), chance.randrange(args.processes)
        fault = Fault(f"file operation, one rank of {args.processes}", f"operation {operation} of rank {victim}")
        process = start(args, folder, cache, TORTURE_OPERATION=str(operation), TORTURE_RANK=str(victim))
        process.wait()
    else:
        one = args.processes > 1 and chance.random() < 0.5
        delay = chance.uniform(0.3, 1.0) * seconds
        fault = Fault(f"random time, {'one rank' if one else 'all ranks'}", f"after {delay:.1f} s")
        process = start(args, folder, cache)
        time.sleep(delay)
        if ranks := ranks_of(process) if one else []:
            os.kill(chance.choice(ranks), signal.SIGKILL)
            process.wait()
    kill_all(process)
    finished = process.returncode == 0 or start(args, folder, cache).wait() == 0
    return fault._replace(finished=finished)


def main() -> int:
    args = parse_args()
    if args.minutes is not None:
        sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]
        from disturbances import torture

        data, tokenizer = (str(Path(path).resolve()) for path in (args.data, args.tokenizer))
        return int(not torture(data, tokenizer, args.minutes, args.seed, tuple(args.pause)))
    chance = random.Random(args.seed)
    tried, survived = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        undisturbed, folder, cache = (Path(temporary, name) for name in ("undisturbed", "run", "cache"))
        undisturbed.mkdir()
        started = time.monotonic()
        if start(args, undisturbed, cache).wait() != 0:
            print((undisturbed / "output.txt").read_text())
            return 1
        seconds, expected = time.monotonic() - started, digest(undisturbed)
        print(f"undisturbed run: {seconds:.1f} s, {expected[:16]}", flush=True)
        for number in range(1, args.times + 1):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fault = kill_once(args, chance, folder, cache, seconds)
            every_step_once = list(range(1, STEPS + 1))
            good = fault.finished and digest(folder) == expected and steps_logged(folder) == every_step_once
            tried[fault.kind] += 1
            survived[fault.kind] += good
            result = "survived" if good else "LOST"
            print(f"{number}/{args.times} {fault.kind}, {fault.place}: {result}", flush=True)
            if not good:
                kept = Path(tempfile.mkdtemp(prefix="torture-lost-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"  kept in {kept}", flush=True)
    print("\n| fault | tried | survived |\n|---|---|---|")
    for kind, times in sorted(tried.items()):
        print(f"| {kind} | {times} | {survived[kind]} |")
    return int(tried != survived)


if __name__ == "__main__":
    if os.environ.get("TORTURE_CHILD"):
        child()
    sys.exit(main())
