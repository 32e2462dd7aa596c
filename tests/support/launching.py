"""Runs of the programs in real processes, started as users start them; none outlives its test."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240
POLL_SECONDS = 0.05
MARK = "LLAMA_TEST_RUN"  # set in the environment of every process of a run, whoever started it

# pretrain.py with a change that no flag makes.
CHANGED_PROGRAM = """\
import sys
sys.path.insert(0, {root!r})
import pretrain
import os, signal
import checkpointing.writer, engine.plugin, training.batches, training.loop, training.session
from runtime import console, process
from training import metrics
{change}
process.run(pretrain.main, "pretrain.py")
"""


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """A started command. Leaving its context kills its remaining processes.

    Attributes:
        folder: holds stdout and stderr, and by default `checkpoint` and `tb_logs`.
        returncode: exit status of the command (or its launcher); None while it runs.
    """

    def __init__(self, command: list, folder: Path, env: dict[str, str] | None = None, cwd: Path = ROOT):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: self.mark, **(env or {})}
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=cwd, env=environment, stdout=stdout, stderr=stderr
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes():
            process.kill()
        self.process.wait()

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    @property
    def save_dir(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def metrics(self) -> list[dict]:
        """The complete rows of metrics.jsonl."""
        path = self.folder / "tb_logs" / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def column(self, key: str) -> list:
        return [row[key] for row in self.metrics]

    def processes(self) -> list[psutil.Process]:
        """Return every living process of the run, including orphans and processes in sessions of their own."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = TIMEOUT_SECONDS) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.output()}"
            time.sleep(POLL_SECONDS)

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> int:
        """Wait until the command and every process that it started have ended, and return the exit status."""
        self.wait_until(lambda: self.returncode is not None, "the command's end", timeout)
        self.wait_until(lambda: not self.processes(), "the end of all its processes", timeout=20)
        return self.returncode

    def output(self) -> str:
        return f"exit status {self.returncode}\n{self.stdout[-4000:]}\n{self.stderr[-6000:]}"


def start_finetune(*args, folder: Path, processes: int = 1, env: dict[str, str] | None = None) -> Run:
    """Start finetune.py as `start_pretrain` starts pretrain.py."""
    return start_pretrain(*args, folder=folder, processes=processes, env=env, program="finetune.py")


def start_pretrain(
    *args,
    folder: Path,
    processes: int = 1,
    env: dict[str, str] | None = None,
    change: str | None = None,
    program: str = "pretrain.py",
) -> Run:
    """Start pretrain.py with checkpoints and logs in `folder`, under torchrun if `processes` > 1.

    Args:
        change: Python statements that run after the imports of pretrain.py and before its main().
    """
    program = ROOT / program
    if change is not None:
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "changed_pretrain.py"
        program.write_text(CHANGED_PROGRAM.format(root=str(ROOT), change=change), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    folders = ["-o", folder / "checkpoint", "-t", folder / "tb_logs"]
    return Run([sys.executable, *launcher, program, *folders, *args], folder, env)


def optimizer_states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's master weights and Adam moments by `PARAMETER.master`, `.exp_avg`, `.exp_avg_sq`."""
    states = {}
    for file in sorted((checkpoint / "optimizer").iterdir()):
        states.update(load_file(file))
    return states
