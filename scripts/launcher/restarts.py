"""Restarts of a run that failed: the decision, the pause before it, and the program's arguments."""

import json
import os.path
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.process import INTERRUPTED, NO_ROOM, USAGE_ERROR
from scripts.launcher.attempt import POLL_SECONDS, Fleet
from scripts.launcher.hosts import say

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5, 300  # doubled after each attempt that trained no further
SAME_STEP = 3  # failures at one step: a fault of data or code, not of a machine
TAIL_BYTES = 2**16  # hold the last row of metrics.jsonl


def value_of(arguments: Sequence[str], short: str, long: str, default: str | None = None) -> str | None:
    """Return the last value of a flag on a program's command line."""
    value = default
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word in (short, long):
            value = following
        elif word.startswith(f"{long}="):
            value = word.partition("=")[2]
        elif word.startswith(short) and not word.startswith("--"):
            value = word.removeprefix(short).removeprefix("=")
    return value


def folder_of(arguments: Sequence[str], short: str, long: str, default: str) -> Path:
    """Return the folder that a flag names, with `~` expanded as the program does."""
    return Path(os.path.expanduser(value_of(arguments, short, long, default) or ""))


def logs_of(arguments: Sequence[str]) -> Path:
    """Return the folder where a program writes metrics.jsonl."""
    name = value_of(arguments, "--run_name", "--run_name") or ""
    return folder_of(arguments, "-t", "--tensorboard_dir", "tb_logs") / name


def last_step(logs: Path) -> int | None:
    """Return the step in the last complete row of metrics.jsonl, or None."""
    try:
        with open(logs / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            rows = file.read().split(b"\n")
        return int(json.loads(rows[-2])["step"])
    except (OSError, LookupError, ValueError, TypeError):
        return None


class Restarts:
    """Decides after each attempt whether another one can help."""

    def __init__(self, limit: int, program: list[str], fleet: Fleet):
        """
        Args:
            limit: number of restarts.
            program: the program's own arguments.
        """
        self.limit, self.program, self.fleet = limit, program, fleet
        self.save_dir = folder_of(program, "-o", "--save_dir", "checkpoint")
        self.logs = logs_of(program)
        self.restarted = 0
        self.failed_after: list[int | None] = []  # the last step before each failure of the program
        self.reached: tuple[int | None] | None = None  # the last step before the latest end
        self.pause = FIRST_PAUSE_SECONDS

    def problem(self) -> str | None:
        """Return a line if the program could not go on from what an earlier attempt has saved."""
        if not self.limit or value_of(self.program, "-o", "--save_dir") or self._load() == "latest":
            return None
        return "--max_restarts: give the program --save_dir or -f latest, so that a restart finds its checkpoints"

    def note(self) -> str | None:
        """Return a line if a restart would repeat the whole attempt."""
        if not self.limit or value_of(self.program, "-i", "--save_interval") != "0":
            return None
        return "note: --save_interval 0 saves only at the end, so a restart repeats every step"

    def _load(self) -> str | None:
        return value_of(self.program, "-f", "--load")

    def arguments(self) -> list[str]:
        """Return the program's arguments for the next attempt, which resumes from the newest checkpoint.

        Until the run has saved its first, a checkpoint that the command names stays in force.
        """
        saved = any(self.save_dir.glob("epoch*-step*/manifest.json"))
        if not self.restarted or self._load() == "latest" or (self._load() and not saved):
            return self.program
        return [*self.program, "-f", "latest"]  # of a flag that is given twice, the last counts

    def again(self, status: int) -> bool:
        """Return True, after a pause, if the run is to be started again after it has ended with `status`."""
        refused = status == USAGE_ERROR and not self.restarted  # later, what the same flags name has changed
        if not self.limit or self.fleet.word or refused or status in (0, INTERRUPTED):
            return False
        step = last_step(self.logs)
        place = f"after step {step}" if step else "before its first step"
        moved, self.reached = self.reached != (step,), (step,)
        if not self.fleet.unreachable and status != NO_ROOM:
            self.failed_after.append(step)
        if len(self.failed_after) >= SAME_STEP and set(self.failed_after[-SAME_STEP:]) == {step}:
            say(f"giving up: the run has failed {SAME_STEP} times {place}, so the fault is in data or code; see above")
            return False
        if self.restarted == self.limit:
            say(f"giving up {place}, after {self.limit} restarts")
            return False
        self.restarted += 1
        self.pause = FIRST_PAUSE_SECONDS if moved else min(2 * self.pause, LONGEST_PAUSE_SECONDS)
        say(f"restart {self.restarted} of {self.limit} in {self.pause} s; the run has ended {place}")
        end = time.monotonic() + self.pause
        while time.monotonic() < end and not self.fleet.word:
            time.sleep(POLL_SECONDS)
        return not self.fleet.word
