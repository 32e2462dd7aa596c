"""Evaluation of a run's checkpoints on tasks, in a process beside the training that can neither end nor delay it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from checkpointing.folder import complete_checkpoints
from checkpointing.writer import Retention
from runtime import watchdog
from runtime.console import first_line, rank
from runtime.process import PARENT, StopRequest
from runtime.requirements import ROOT
from training.metrics import Metrics, steps_with_tasks
from training.run import Outputs
from training.tasks import CPU, LOADED, Tasks, gpu_number

SCRIPT = ROOT / "scripts" / "evaluate_tasks.py"
FOLDER = "tasks"  # in the folder of logs
WORK = ".evaluated-step{}"  # in the folder of checkpoints
NICENESS = 19  # the most
OUT_OF_MEMORY_SCORE = 1000  # the most: if memory runs out, the kernel ends this process first
POLL_SECONDS = 0.5
END_SECONDS = 10  # for a killed evaluation to be gone
SILENT_SECONDS = 1800  # without output, after which an evaluation counts as hung
TAIL_BYTES, REASON_LENGTH = 4096, 300  # of a log, and of the line from it that a report quotes
LAUNCHER = re.compile(  # variables that would make the evaluation a rank, or limit it like one
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|OMP_NUM_THREADS|"
    r"(TORCHELASTIC|TORCH_NCCL|TORCH_FR|NCCL|ACCELERATE|SLURM|OMPI|PMIX?|MV2)_\w+"
)


def environment(device: str) -> dict[str, str]:
    """Return this process's environment for one that ends with it, is no rank, and sees no GPU but `device`."""
    gpu = ""
    if device != CPU:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = visible.split(",")[gpu_number(device)] if visible else str(gpu_number(device))
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    return kept | {"CUDA_VISIBLE_DEVICES": gpu, PARENT: str(os.getpid())}


class TaskEvaluator:
    """Starts evaluations on rank 0, one at a time, and logs their scores at their checkpoint's step.

    An evaluation that is due while another runs is left out, except that of the last checkpoint. Threads start the
    evaluations and wait for them; the training thread only takes the results.
    """

    def __init__(self, tasks: Tasks, retention: Retention, outputs: Outputs, total_steps: int, step: int):
        """Begin with the newest checkpoint that was due and has no scores, as after a kill.

        Args:
            total_steps: of the whole run.
            step: the step after which the run resumes.
        """
        self.tasks, self.folder = tasks, outputs.tensorboard_dir / FOLDER
        self.interval, self.total_steps = tasks.interval(retention), total_steps
        self.active = rank() == 0 and bool(tasks.eval_tasks)
        self.results: list[tuple[int, dict[str, float | None], float]] = []  # step, scores, seconds
        self.reports: list[str] = []
        self.step, self.thread = 0, threading.Thread()  # of the evaluation that runs, or ran last
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.last: Path | None = None  # the last checkpoint, while it waits for the evaluation of another
        self.metrics: Metrics | None = None
        self.stop: StopRequest | None = None
        if self.active and step:
            due = (found for found in complete_checkpoints(outputs.save_dir) if self._is_due(found[0]))
            if (newest := next(due, None)) and newest[0] not in steps_with_tasks(outputs.tensorboard_dir, step):
                self.begin(*newest)

    def _is_due(self, step: int) -> bool:
        return step == self.total_steps or (self.interval > 0 and step % self.interval == 0)

    def begin(self, step: int, checkpoint: Path) -> None:
        """Start to evaluate a complete checkpoint if it is due; report an error."""
        if not (self.active and self._is_due(step)):
            return
        if not self.running:
            try:
                held = _hold(checkpoint, checkpoint.with_name(WORK.format(step)))
                self.step = step
                self.thread = threading.Thread(target=self._evaluate, args=(step, *held), name="tasks", daemon=True)
                self.thread.start()
            except Exception as error:  # the checkpoint is good all the same
                self.reports.append(f"tasks: step {step} has no scores: {first_line(error)}")
        elif step == self.total_steps:
            self.last = checkpoint
        else:
            self.reports.append(f"tasks: step {step} is left out: the evaluation of step {self.step} still runs")

    def _evaluate(self, step: int, checkpoint: Path, work: Path) -> None:
        """Evaluate in a process of its own, which the kernel ends with this thread; append scores or a report."""
        log, output = (self.folder / f"step{step}.{suffix}" for suffix in ("log", "json"))
        flags = {
            "checkpoint": checkpoint,
            "work_dir": work,
            "tokenizer": self.tasks.tokenizer,
            "eval_tasks": ",".join(self.tasks.eval_tasks),
            "eval_tasks_device": CPU if self.tasks.device == CPU else "cuda:0",
            "output": output,
        }
        began = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)
            with open(log, "wb") as file:
                self.process = subprocess.Popen(
                    [sys.executable, SCRIPT, *(f"--{name}={value}" for name, value in flags.items())],
                    env=environment(self.tasks.device),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            _put_back(self.process.pid)
            failure = self._wait(self.process, log, work)
            if not failure:
                self.results.append((step, json.loads(output.read_bytes())["scores"], time.monotonic() - began))
        except Exception as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
        shutil.rmtree(work, ignore_errors=True)
        if failure and not self.stopped:
            self.reports.append(f"tasks: step {step} has no scores: {failure}; see {log}")

    def _wait(self, process: subprocess.Popen[bytes], log: Path, work: Path) -> str:
        """Wait until the evaluation ends, or end it if it hangs; return the reason of its failure, if it failed.

        Args:
            work: removed as soon as the evaluation has loaded the model, since it may take the room of a checkpoint.
        """
        size, since = -1, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(POLL_SECONDS)
                break
            if (work / LOADED).exists():
                shutil.rmtree(work, ignore_errors=True)
            written = log.stat().st_size
            size, since = written, (since if size == written else time.monotonic())
            if time.monotonic() - since > SILENT_SECONDS:
                self._kill()
                return f"it has hung, without output for {SILENT_SECONDS} s, and was ended"
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return _last_line(log) if status else ""

    def _kill(self) -> None:
        """End the evaluation, with processes that it may have started."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def log(self, metrics: Metrics) -> None:
        """Log the scores of evaluations that have ended, and print what there is to report."""
        while self.results:
            metrics.log_tasks(*self.results.pop(0))
        while self.reports:
            metrics.note([self.reports.pop(0)])

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    @property
    def pending(self) -> bool:
        """True if an evaluation runs or waits, or something is not logged yet."""
        return bool(self.running or self.last or self.results or self.reports)

    def take_over(self, metrics: Metrics, stop: StopRequest) -> None:
        """Close the logs at the end of training; or keep them for `finish` if an evaluation has not ended."""
        if self.pending:
            self.metrics, self.stop = metrics, stop
            metrics.flush()
        else:
            metrics.close()

    def finish(self, interrupted: bool = False) -> None:
        """Wait for the last evaluation, log its scores, and close the logs.

        Args:
            interrupted: a signal has ended the run: end the evaluation too. So does a signal that arrives now.
        """
        if not (self.metrics and self.stop):
            return
        told = 0
        while (running := self.running) or self.last:
            if interrupted or self.stop():
                self.stopped, self.last = True, None
                self._kill()
                self.thread.join(END_SECONDS)
                self.metrics.note([f"tasks: the evaluation of step {self.step} was ended by the signal"])
                break
            if self.last and not running:
                checkpoint, self.last = self.last, None
                self.begin(self.total_steps, checkpoint)
            elif told != self.step:
                told = self.step
                log = self.folder / f"step{told}.log"
                self.metrics.note([f"tasks: waiting for the evaluation of step {told} (Ctrl-C ends it); see {log}"])
            self.log(self.metrics)
            self.thread.join(POLL_SECONDS)
            watchdog.alive()
        self.log(self.metrics)
        self.metrics.close()


def _put_back(process: int) -> None:
    """Have a process leave processors and memory to the training."""
    with contextlib.suppress(OSError):  # it has ended, or this is not Linux
        os.setpriority(os.PRIO_PROCESS, process, NICENESS)
        Path(f"/proc/{process}/oom_score_adj").write_text(str(OUT_OF_MEMORY_SCORE))


def _hold(checkpoint: Path, work: Path) -> tuple[Path, Path]:
    """Return a checkpoint's files as hard links in the new folder `work`, so that they outlive the checkpoint.

    Without hard links, return the checkpoint itself, which --keep_checkpoints may remove before it is read.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    held = work / checkpoint.name
    try:
        shutil.copytree(checkpoint, held, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(held, ignore_errors=True)
        return checkpoint, work
    return held, work


def _last_line(log: Path) -> str:
    """Return the last line of a log, which is that of a traceback or of an error."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    line = next((line.strip() for line in reversed(re.split(r"[\r\n]", text)) if line.strip()), "no output")
    return line[:REASON_LENGTH]
