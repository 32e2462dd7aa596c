"""The learning rate: linear warm-up, then constant, falling, or constant and falling at the end; parts of stages."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from engine.boost import Engine
from runtime.console import below

COSINE, LINEAR, CONSTANT, WSD = SCHEDULES = ("cosine", "linear", "constant", "wsd")
EXTENDED = (CONSTANT, WSD)  # those with which a run may be made longer
SHAPES = ("linear", "1-sqrt")
PARTS = (COSINE, *SHAPES, CONSTANT)  # of stages
DECAY_RATIO = 0.1  # of the steps, in wsd


@dataclass(frozen=True)
class Schedule:
    """The form of the learning rate after the warm-up.

    Attributes:
        lr_schedule: cosine or linear, to the end of the run; constant; or wsd (warm-up, stable, decay; Hu et al.,
            arXiv:2404.06395): constant, and falling in the last `decay_steps`.
        decay_steps: None: DECAY_RATIO of the run.
        decay_shape: of wsd's end: linear, or 1-sqrt, which falls fast at first (Hägele et al., arXiv:2405.18392);
            None: linear.
    """

    lr_schedule: str = COSINE
    decay_steps: int | None = None
    decay_shape: str | None = None

    def problems(self) -> list[str]:
        """Return a line for each setting that is out of range, or has no effect."""
        given = {"decay_steps": self.decay_steps, "decay_shape": self.decay_shape}
        without_effect = [
            f"--{name}: takes effect only with --lr_schedule wsd, not with {self.lr_schedule}"
            for name, value in given.items()
            if value is not None and self.lr_schedule != WSD
        ]
        return without_effect or below(1, decay_steps=self.decay_steps)


@dataclass(frozen=True)
class Part:
    """The learning rate of a stage that has a schedule of its own, as a fraction of the run's peak.

    Attributes:
        start, stop: its first step, counted from 0, and the one after its last.
        lr_schedule: one of PARTS.
        first, last: at `start`; at `stop`.
    """

    start: int
    stop: int
    lr_schedule: str
    first: float
    last: float

    def __call__(self, step: int) -> float:
        """Return the fraction at a step."""
        if self.lr_schedule == CONSTANT:
            return self.first
        progress = (step - self.start) / max(1, self.stop - self.start)
        return self.last + (self.first - self.last) * _height(self.lr_schedule, progress)


@dataclass(frozen=True)
class Curve:
    """The learning rate of a run, as a fraction of its peak."""

    warmup_steps: int
    schedule_steps: int  # length of the run
    min_lr_ratio: float = 0.1  # at the end, unless it is constant
    lr_schedule: str = COSINE
    decay_steps: int | None = None  # of wsd
    decay_shape: str = SHAPES[0]
    parts: tuple[Part, ...] = ()  # of stages; each replaces what is before it

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that checkpoints keep; the parts follow from the stages."""
        return {name: value for name, value in asdict(self).items() if name != "parts"}

    @property
    def decay_start(self) -> int:
        """The step from which the learning rate falls."""
        return self.warmup_steps if self.decay_steps is None else self.schedule_steps - self.decay_steps

    def __call__(self, step: int) -> float:
        """Return the fraction at a step, counted from 0."""
        for part in reversed(self.parts):
            if step >= part.start:
                return part(step)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_schedule == CONSTANT:
            return 1.0
        progress = (step - self.decay_start) / max(1, self.schedule_steps - self.decay_start)
        shape = self.lr_schedule if self.lr_schedule == COSINE else self.decay_shape
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * _height(shape, min(1.0, max(0.0, progress)))

    def with_parts(self, stages: Iterable[dict[str, Any]], peak: float) -> "Curve":
        """Return the curve with a part for each stage that has a schedule: from its `step` to the next such one's.

        Args:
            stages: as checkpoints keep them (see `legs.stage_settings`).
            peak: `--lr`.
        """
        curve, own = self, [stage for stage in stages if stage["lr_schedule"]]
        steps = [*(stage["step"] for stage in own), self.schedule_steps]
        for stage, start, stop in zip(own, steps, steps[1:], strict=False):
            first = curve(start) if stage["lr"] is None else stage["lr"] / peak
            last = first if stage["min_lr_ratio"] is None else stage["min_lr_ratio"]
            curve = replace(curve, parts=(*curve.parts, Part(start, stop, stage["lr_schedule"], first, last)))
        return curve

    def agrees(self, other: "Curve", steps: int) -> bool:
        """Return True if both are the same in the first steps, and made for runs that end at any time."""
        extended = self.lr_schedule in EXTENDED and other.lr_schedule in EXTENDED
        return extended and all(self(step) == other(step) for step in range(steps))


def _height(shape: str, progress: float) -> float:
    """Return what is left at a progress from 0 to 1 of a fall from 1 to 0."""
    if shape == COSINE:
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (math.sqrt(progress) if shape == SHAPES[1] else progress)


def build_scheduler(engine: Engine, step: int, curve: Curve) -> LambdaLR:
    """Return the schedule positioned at `step`; it depends only on the step, so a resume needs no other state."""
    optimizer = engine.optimizer.optim
    for group in optimizer.param_groups:
        group["initial_lr"] = engine.job.optimization.lr
    return LambdaLR(optimizer, curve, last_epoch=step - 1)
