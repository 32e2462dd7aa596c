"""Runs of the programs in real processes; none outlives its test."""

import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import types
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

# Programs fork from a server that imports them once; the imports take longer than most runs. It inherits these.
multiprocessing.set_forkserver_preload(["pretrain", "finetune", "benchmark"])
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

# pretrain.py with a change that no flag makes.
CHANGED_PROGRAM = """\
import sys
sys.path.insert(0, {root!r})
import pretrain
import os, signal
import checkpointing.writer, engine.plugin, training.batches, training.loop, training.session, training.spikes
from runtime import console, process
from training import metrics
{change}
process.run(pretrain.main, "pretrain.py")
"""


def free_port() -> int:
    """Return a free port below those that the system gives to connections, which could take it before its user does."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            free.bind(("127.0.0.1", port))
            return port


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
        for name in ("stdout", "stderr"):
            (folder / name).write_bytes(b"")
        self.start([str(part) for part in command], {**os.environ, MARK: self.mark, **(env or {})}, cwd)

    def start(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        with open(self.folder / "stdout", "ab") as stdout, open(self.folder / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr)

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
                if self.owns(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue
        return found

    def owns(self, process: psutil.Process) -> bool:
        return process.environ().get(MARK) == self.mark

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


class Ranks:
    """Forked processes of one program, with those methods of subprocess.Popen that a Run needs."""

    def __init__(self, processes: list[multiprocessing.process.BaseProcess]):
        self.processes = processes

    def poll(self) -> int | None:
        """Return None while a rank runs, then the first exit status that is not 0, if any."""
        statuses = [process.exitcode for process in self.processes]
        return None if None in statuses else next(filter(None, statuses), 0)

    def wait(self) -> None:
        for process in self.processes:
            process.join()

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()


class ForkedRun(Run):
    """A program forked from the server, on `ranks` ranks started by hand; it does not import its modules anew.

    Libraries have read the environment when they were imported, so that variables for them have no effect.
    """

    def __init__(self, command: list, folder: Path, ranks: int = 1, cwd: Path = ROOT):
        self.ranks = ranks
        super().__init__(command, folder, cwd=cwd)

    def start(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.ranks)}
        processes = []
        for rank in range(self.ranks):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.ranks), **place}
            variables = {**environment, **(numbers if self.ranks > 1 else {})}
            processes.append(context.Process(target=_run_program, args=(command, variables, cwd, self.folder)))
            processes[-1].start()
        self.process = Ranks(processes)

    def owns(self, process: psutil.Process) -> bool:
        return super().owns(process) or os.getpgid(process.pid) in [rank.pid for rank in self.process.processes]


def _run_program(command: list[str], environment: dict[str, str], cwd: Path, folder: Path) -> None:
    """Become the program `command[0]`, as if this process had just been started."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # the default, until this process was forked
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(folder / name, "ab") as file:
            os.dup2(file.fileno(), number)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    # runpy would do this in frames without a file, for which ColossalAI's logger searches all modules at every call.
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = command[0]
    exec(compile(Path(command[0]).read_bytes(), command[0], "exec"), vars(program))


def run_script(script: Path, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script to its end in a process forked from the server."""
    command = [str(part) for part in (script, *arguments)]
    with tempfile.TemporaryDirectory() as folder, ForkedRun(command, Path(folder), cwd=cwd) as run:
        run.wait()
        return subprocess.CompletedProcess(command, run.returncode, run.stdout, run.stderr)


def start_finetune(*args, **kwargs) -> Run:
    """Start finetune.py as `start_pretrain` starts pretrain.py."""
    return start_pretrain(*args, program="finetune.py", **kwargs)


def start_pretrain(
    *args,
    folder: Path,
    processes: int = 1,
    env: dict[str, str] | None = None,
    change: str | None = None,
    program: str = "pretrain.py",
    torchrun: bool = False,
) -> Run:
    """Start pretrain.py with checkpoints and logs in `folder`, as a ForkedRun unless `env` or `torchrun` is given.

    Args:
        change: Python statements that run after the imports of pretrain.py and before its main().
        torchrun: start `processes` > 1 by torchrun, for tests of what it does when a rank ends.
    """
    program = ROOT / program
    if change is not None:
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "changed_pretrain.py"
        program.write_text(CHANGED_PROGRAM.format(root=str(ROOT), change=change), encoding="utf-8")
    command = [program, "-o", folder / "checkpoint", "-t", folder / "tb_logs", *args]
    if env is None and not (torchrun and processes > 1):
        return ForkedRun(command, folder, processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return Run([sys.executable, *launcher, *command], folder, env)


def optimizer_states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's master weights and Adam moments by `PARAMETER.master`, `.exp_avg`, `.exp_avg_sq`."""
    states = {}
    for file in sorted((checkpoint / "optimizer").iterdir()):
        states.update(load_file(file))
    return states
