"""Kill a small run repeatedly, at random times and in every phase of a save, and check that nothing is lost.

    python scripts/torture.py --data quickstart/data --tokenizer quickstart/tokenizer --times 200 --processes 2

Each time, SIGKILL ends one rank of a run, or all, and the run is resumed with `-f latest`. Its final master weights and
moments must equal the undisturbed run's bit for bit, and its metrics.jsonl must list every step once. Half of the kills
come at a random time, half at a random file operation of a checkpoint. The same --seed kills in the same places. The
output ends with a table: fault, times tried, times survived.
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
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, SAVE_INTERVAL = 6, 2
FILE_OPERATIONS = ("sync", "write_json", "write_tensors", "checksum", "replace_folder")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set for pretrain.py")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--times", type=int, default=200, help="number of kills (default: 200)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of the run (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


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


def main() -> int:
    args = parse_args()
    chance = random.Random(args.seed)
    table = collections.defaultdict(lambda: [0, 0])
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        work = Path(temporary)
        undisturbed = work / "undisturbed"
        undisturbed.mkdir()
        started = time.monotonic()
        if start(args, undisturbed, work / "cache").wait() != 0:
            print((undisturbed / "output.txt").read_text())
            return 1
        duration, expected = time.monotonic() - started, digest(undisturbed)
        print(f"undisturbed run: {duration:.1f} s, {expected[:16]}", flush=True)
        for number in range(1, args.times + 1):
            folder = work / "run"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if chance.random() < 0.5:
                fault = f"file operation, one rank of {args.processes}"
                operation, victim = chance.randint(1, 60), chance.randrange(args.processes)
                where = f"operation {operation} of rank {victim}"
                process = start(
                    args, folder, work / "cache", TORTURE_OPERATION=str(operation), TORTURE_RANK=str(victim)
                )
                process.wait()
            else:
                one = args.processes > 1 and chance.random() < 0.5
                fault = "random instant, one rank" if one else "random instant, all ranks"
                delay = chance.uniform(0.3, 1.0) * duration
                where = f"after {delay:.1f} s"
                process = start(args, folder, work / "cache")
                time.sleep(delay)
                ranks = ranks_of(process) if one else []
                if ranks:
                    os.kill(chance.choice(ranks), signal.SIGKILL)
                    process.wait()
            kill_all(process)
            finished = process.returncode == 0 or start(args, folder, work / "cache").wait() == 0
            survived: bool = (
                finished and digest(folder) == expected and steps_logged(folder) == list(range(1, STEPS + 1))
            )
            table[fault][0] += 1
            table[fault][1] += survived
            print(f"{number}/{args.times} {fault}, {where}: {'survived' if survived else 'LOST'}", flush=True)
            if not survived:
                kept = Path(tempfile.mkdtemp(prefix="torture-lost-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"  kept in {kept}", flush=True)
    print("\n| fault | tried | survived |\n|---|---|---|")
    for fault, (tried, good) in sorted(table.items()):
        print(f"| {fault} | {tried} | {good} |")
    return int(any(tried != good for tried, good in table.values()))


if __name__ == "__main__":
    if os.environ.get("TORTURE_CHILD"):
        child()
    sys.exit(main())
