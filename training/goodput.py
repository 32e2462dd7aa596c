"""Goodput: the fraction of the time since a run's first start that went into steps that count, over all restarts.

Checkpoints hold the seconds spent so far. A run that resumes goes on from its checkpoint's, so the time of the steps
that it repeats, and that between a kill and the next start, is in the time since the first start alone.
"""

import contextlib
import json
import statistics
import time
from collections import deque
from pathlib import Path

import psutil

from training.folders import OWNER
from training.run import Outputs, TrainState

STEPS, SAVES, EVALUATIONS, STALLS = "steps", "saves", "evaluations", "stalls"
USUAL_STEPS = 50  # whose median is a usual step
STALL = 2  # usual steps that one may take; a longer one counts as usual, and the rest as a stall


class StepSeconds:
    """The part of each step's seconds that counts: without waiting for data, and without stalls."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.recent: deque[float] = deque(maxlen=USUAL_STEPS)

    def add(self, state: TrainState, seconds: float, waited: float) -> None:
        """Add a step to the state's times.

        Args:
            seconds: of the step, in which the device waited `waited` seconds for data.
        """
        working = seconds - waited
        if self.first is None:  # it compiles: how much of it counts is known after the second
            self.first, counted = working, 0.0
        else:
            usual = statistics.median(self.recent or [working])
            counted = working if working <= STALL * usual else usual
            if not self.recent:
                counted += min(self.first, working)
            self.recent.append(working)
        spend(state, STEPS, counted)
        spend(state, STALLS, seconds - counted)


def spend(state: TrainState, purpose: str, seconds: float) -> None:
    """Add seconds to those that the run has spent on a purpose."""
    state.spent[purpose] = state.spent.get(purpose, 0.0) + seconds


def first_start(outputs: Outputs) -> float:
    """Return when a run without a checkpoint first started, in seconds since 1970: as its logs say if it resumes."""
    if outputs.load:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(Path(outputs.tensorboard_dir, OWNER).read_bytes())["started"])
    return psutil.Process().create_time()


def goodput(state: TrainState) -> float:
    """Return the fraction, from 0 to 1, up to now."""
    return min(1.0, state.spent.get(STEPS, 0.0) / _elapsed(state))


def describe(state: TrainState) -> str:
    """Return a line with the goodput and what took the rest."""
    elapsed, share = _elapsed(state), goodput(state)
    parts = {purpose: state.spent.get(purpose, 0.0) / elapsed for purpose in (SAVES, EVALUATIONS, STALLS)}
    rest = max(0.0, 1 - share - sum(parts.values()))
    return (
        f"goodput: {share:.1%} of {elapsed / 3600:,.3f} hours since the first start; {parts[SAVES]:.1%} saves, "
        f"{parts[EVALUATIONS]:.1%} evaluations, {parts[STALLS]:.1%} data and stalls, {rest:.1%} starts and lost steps"
    )


def _elapsed(state: TrainState) -> float:
    return max(time.time() - state.started, 1e-3)
