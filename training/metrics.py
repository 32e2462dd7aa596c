"""Logs of a run, written by rank 0: TensorBoard, metrics.jsonl, W&B and the terminal."""

import contextlib
import errno
import json
import math
import os
import re
import sys
import time
from collections import deque
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from engine.device import peak_memory
from planning.throughput import Throughput
from runtime.console import rank, say, world_size
from runtime.files import write_json
from training.folders import OWNER, log_owner
from training.goodput import goodput
from training.run import TrainState
from training.wandb_run import WandbRun

LOG_FILE = "metrics.jsonl"
TASKS = "eval_tasks/"  # start of the names of scores on tasks
MEAN_STEPS = 20  # of the loss in the summary
BAR = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}] {bar}"  # tqdm cuts it to the terminal's width
_NUMBERED = re.compile(r"metrics\.(\d+)\.jsonl")


def _of_tasks(row: dict[str, Any]) -> bool:
    return any(name.startswith(TASKS) for name in row)


class StepResult(NamedTuple):
    """The outcome of an optimizer step.

    Attributes:
        loss: mean over the labels that count; None without such labels.
        grad_norm: before clipping.
        skipped: True if nothing was updated: fp16 gradients overflowed, no label counts, or --skip_spikes.
    """

    loss: float | None
    lr: float
    grad_norm: float
    skipped: bool
    loss_scale: float


def step_row(
    state: TrainState, result: StepResult, throughput: Throughput, waited: float, padding: float
) -> dict[str, Any]:
    """Return the row of metrics that is logged for a step.

    Args:
        waited: seconds that the device waited for data.
        padding: fraction of the positions that hold padding.
    """
    return {
        "step": state.step,
        "epoch": state.epoch,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "tokens": state.tokens,
        "tokens_per_second": throughput.tokens_per_second,
        "tflops": throughput.tflops,
        "mfu": throughput.mfu,
        "data_wait": waited / throughput.seconds,
        "padding": padding,
        "memory_gb": peak_memory() / 1e9,
        "loss_scale": result.loss_scale,
        "skipped_steps": state.skipped_steps,
        "spikes": state.spikes,
        "goodput": goodput(state),
    }


def steps_with_tasks(folder: Path, step: int) -> set[int]:
    """Return the steps, up to `step`, whose scores on tasks are logged in a folder."""
    found = set()
    with contextlib.suppress(OSError), open(folder / LOG_FILE, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line
                if TASKS in line and _of_tasks(row := json.loads(line)) and row["step"] <= step:
                    found.add(row["step"])
    return found


class Metrics:
    """Writer of one row per optimizer step, and one more for its scores on tasks, which come later.

    A resumed run continues the same curves.
    """

    def __init__(
        self,
        folder: Path,
        save_dir: Path,
        step: int,
        total_steps: int,
        total_tokens: int,
        interval: int,
        started: float = 0.0,
    ):
        """
        Args:
            save_dir: folder of the checkpoints, which identifies the run.
            step: the step after which the run resumes; rows of later steps are set aside.
            total_steps, total_tokens: at the end of the run.
            interval: steps between lines in the terminal, if it shows no progress bar.
            started: seconds since 1970 at the run's first start.
        """
        self.main = rank() == 0
        if not self.main:
            return
        self.folder, self.step, self.interval = folder, step, interval
        self.total_steps, self.total_tokens = total_steps, total_tokens
        self.started, self.owner = started, {**log_owner(save_dir, folder), "started": started}
        self.first: tuple[int, float] | None = None  # first step logged and its time, so start-up does not count
        self.last: dict[str, Any] = {}  # row
        self.losses: deque[float] = deque(maxlen=MEAN_STEPS)
        self.trained_before = 0  # tokens up to and including the first step logged
        self.began = self.start = time.monotonic()
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            desc="training",
            bar_format=BAR,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self.failing = False
        self.file: FileIO | None = None
        self.board: SummaryWriter | None = None
        self.wandb: WandbRun | None = None
        try:
            self._open()
        except OSError as error:
            self._report(step + 1, error)

    def _open(self) -> FileIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file is None:
            write_json(self.folder / OWNER, self.owner)
            self.file, self.last = self._open_after(self.folder / LOG_FILE, self.step)
            self.start -= 3600 * self.last.get("hours", 0)
        self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        return self.file

    @staticmethod
    def _open_after(path: Path, step: int) -> tuple[FileIO, dict[str, Any]]:
        """Open the file to append after `step`; move rows of later steps, which the run repeats, to another file.

        Returns:
            The file and the last row of a step.
        """
        kept, later, last = [], [], {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                row = json.loads(line)
                rows = kept if row["step"] <= step else later
            except (ValueError, KeyError, TypeError):
                continue
            if line.endswith("\n"):
                rows.append(line)
                last = row if rows is kept and not _of_tasks(row) else last
        temporary = path.with_suffix(".tmp")
        if later:
            taken = [int(number[1]) for file in path.parent.iterdir() if (number := _NUMBERED.fullmatch(file.name))]
            temporary.write_text("".join(later), encoding="utf-8")
            temporary.replace(path.with_name(f"metrics.{max(taken, default=0) + 1}.jsonl"))
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        return open(path, "ab", buffering=0), last

    def open_wandb(self, project: str, name: str, settings: dict[str, Any]) -> None:
        """Also log to this project of W&B, in a run of this name."""
        if self.main:
            plain = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
            self.wandb = WandbRun(project, name, self.folder, self.started, plain)

    def describe(self, step: int, settings: dict[str, Any], texts: dict[str, str]) -> None:
        """Write the run's settings to TensorBoard, as hyperparameters and as a table, and further texts.

        Args:
            step: as in `__init__`; each resume adds a description.
            texts: Markdown by title.
        """
        if not self.main or self.board is None:
            return
        plain = {
            # A file name may hold bytes that are not UTF-8.
            name: value if isinstance(value, int | float) else str(value).encode(errors="backslashreplace").decode()
            for name, value in settings.items()
        }
        for summary in hparams(plain, {"train/loss": 0.0, "eval/loss": 0.0}):
            self.board._get_file_writer().add_summary(summary)
        table = "\n".join(
            ["| flag | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in plain.items())]
        )
        for title, text in {"flags": table, **texts}.items():
            self.board.add_text(title, text, step)

    def log(self, values: dict[str, Any]) -> None:
        """Log one step's values. If the disk is full, rows are lost but training goes on."""
        if not self.main:
            return
        step, now = values["step"], time.monotonic()
        spiked = values.get("spikes", 0) > self.last.get("spikes", values.get("spikes", 0))
        self.last = values = {**values, "hours": (now - self.start) / 3600}
        if values["loss"] is not None:
            self.losses.append(values["loss"])
        if self.first is None:
            self.first, self.trained_before = (step, now), values["tokens"]
        first = self.first
        try:
            self._write(step, values)
        except OSError as error:
            self._report(step, error)
        if self.wandb:
            self.wandb.log(values)
        mfu = "" if values["mfu"] is None else f", MFU {values['mfu']:.1%}"
        speed, lr = f"{values['tokens_per_second']:,.0f} tok/s{mfu}", f"lr {values['lr']:.2e}"
        if values["loss"] is None:
            loss, norm = "loss unknown", "no label counts, step skipped"
        else:
            loss = f"loss {values['loss']:.4f}"
            norm = "overflow, step skipped" if values["grad_norm"] is None else f"grad norm {values['grad_norm']:.3f}"
        if spiked:
            self.note([f"spike: step {step} is skipped: {loss}, {norm}"])
        # The most important figures first: a narrow terminal cuts off the end.
        self.bar.set_postfix_str(f"{loss}, {speed}, {lr}, {norm}", refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.interval == 0 or step in (1, self.total_steps)):
            say(f"step {step}/{self.total_steps}: {loss}, {lr}, {norm}, {speed}{self._time_left(first, values, now)}")
        if "eval_loss" in values:
            self._note_evaluation(f"step {step}", values)

    def log_start(self, evaluation: dict[str, float]) -> None:
        """Print the evaluation before the first step, and show it in TensorBoard at step 0."""
        if self.main:
            self._note_evaluation("before the first step", evaluation)
            with contextlib.suppress(OSError):
                self._show(0, evaluation)

    def log_tasks(self, step: int, scores: dict[str, float | None], seconds: float) -> None:
        """Log the scores of an earlier step's checkpoint by name, and print them."""
        if not self.main:
            return
        row = {"step": step} | {f"{TASKS}{name}": score for name, score in scores.items()}
        try:
            self._write(step, row)
        except OSError as error:
            self._report(step, error)
        if self.wandb:
            self.wandb.log(row)
        listing = ", ".join(f"{name} {score:.4f}" for name, score in scores.items() if score is not None)
        self.note([f"step {step}: {listing} (evaluated in {tqdm.format_interval(seconds)})"])

    def _note_evaluation(self, when: str, values: dict[str, Any]) -> None:
        loss, perplexity = values["eval_loss"], values["eval_perplexity"]
        self.note([f"{when}: loss {loss:.4f}, perplexity {perplexity:.2f} on held-out documents"])

    def _time_left(self, first: tuple[int, float], values: dict[str, Any], now: float) -> str:
        step, tokens, (first_step, first_time) = values["step"], values["tokens"], first
        if first_step == step or step == self.total_steps:
            return ""
        seconds = (now - first_time) / (tokens - self.trained_before) * max(0, self.total_tokens - tokens)
        return f", {tqdm.format_interval(seconds)} left"

    def summary(self) -> list[str]:
        """Return the run's results and its speed including saves and evaluations, as lines for rank 0 to print."""
        if not self.main:
            return []
        loss = f"loss {self.losses[-1]:.4f}" if self.losses else "no labels counted, so nothing was learned"
        if len(self.losses) == MEAN_STEPS:
            loss += f" (mean of the last {MEAN_STEPS} steps: {sum(self.losses) / MEAN_STEPS:.4f})"
        if "eval_loss" in self.last:
            loss += f", {self.last['eval_loss']:.4f} on held-out documents"
        tokens, hours = self.last["tokens"], self.last["hours"]
        lines = [f"trained: {self.last['step']:,} steps, {tokens:,} tokens, {hours:,.3f} hours in all; {loss}"]
        if spikes := self.last.get("spikes"):
            lines.append(f"skipped: {spikes:,} steps whose loss or gradient norm spiked")
        if self.first is not None and self.first[0] < self.last["step"]:
            now, rate = time.monotonic(), self.last["tokens_per_second"]
            speed = (tokens - self.trained_before) / (now - self.first[1])
            mfu = "" if self.last["mfu"] is None else f", MFU {self.last['mfu'] * speed / rate:.1%}"
            line = f"speed: {speed:,.0f} tok/s{mfu} on average, saves and evaluations included"
            if torch.cuda.is_available():
                spent = (now - self.began) / 3600
                line += f"; {world_size()} GPUs x {spent:,.3f} hours = {world_size() * spent:,.3f} GPU-hours"
            lines.append(line)
        return lines

    def _report(self, step: int, error: OSError) -> None:
        if not self.failing:
            self.note([f"metrics: step {step} and later ones cannot be logged ({error}); training goes on"])
        self.failing = True

    def _write(self, step: int, values: dict[str, Any]) -> None:
        file = self.file or self._open()
        row, end = f"{json.dumps(values)}\n".encode(), os.fstat(file.fileno()).st_size
        if file.write(row) != len(row):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._show(step, values)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        """Write values to TensorBoard."""
        if self.failing or self.board is None:  # TensorBoard's thread ends at its first error
            self.board = SummaryWriter(str(self.folder), purge_step=self.last.get("step", step))
        for key, value in values.items():
            if key not in ("step", "epoch") and value is not None:
                tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                self.board.add_scalar(tag, value, step)
        self.failing = False

    def note(self, messages: list[str]) -> None:
        """Print lines without disturbing the progress bar."""
        for message in messages if self.main else ():
            self.bar.write(message, file=sys.stdout)
            sys.stdout.flush()

    def flush(self) -> None:
        """Write what is buffered, and end the progress bar; more may be logged."""
        if self.main:
            self.bar.close()
            if self.board is not None:
                with contextlib.suppress(OSError):
                    self.board.flush()

    def close(self) -> None:
        if self.main:
            self.bar.close()
            if self.wandb:
                self.wandb.close()
            for sink in (self.board, self.file):
                with contextlib.suppress(OSError):
                    if sink is not None:
                        sink.close()
