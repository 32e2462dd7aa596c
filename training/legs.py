"""Legs: the steps that are left of a run, stage by stage, and what checkpoints keep of the stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from data_utils import MixtureDataset, PackedDataset, TrainingData, epochs_of
from engine.job import Job
from engine.layout import Batch
from planning.memory import estimate_memory
from runtime.console import InputError
from training.left_out import Range, position_after
from training.run import Run, TrainState
from training.schedule import CONSTANT, Curve
from training.stages import END, Stages, tokens_text

LAID_DOWN = ("from_token", "max_length")  # of a stage that has begun; its data and learning rate may change


@dataclass(frozen=True)
class Leg:
    """The part of a stage that is left to train.

    Attributes:
        number: of the stage; 0 is that of the flags.
        began: steps after which the stage begins, or has begun.
        first_step, tokens, position: steps and tokens trained before the leg, and its place in the order of the data.
        steps: its optimizer steps; 0 if the checkpoint is at the end of the stage.
        batch: on one data-parallel rank.
        global_batch: sequences per step.
        mixture: what checkpoints keep of the data (see `MixtureDataset.settle`); None of a single data set.
    """

    number: int
    began: int
    first_step: int
    tokens: int
    position: int
    steps: int
    batch: Batch
    global_batch: int
    dataset: TrainingData
    mixture: dict[str, Any] | None = None

    @property
    def stop(self) -> int:
        """Number of steps trained after it."""
        return self.first_step + self.steps

    @property
    def tokens_per_step(self) -> int:
        return round(self.global_batch * self.dataset.mean_length)


def lay_out(
    run: Run, datasets: Sequence[TrainingData], state: TrainState, begun: Sequence[int], left_out: Sequence[Range]
) -> tuple[Leg, ...]:
    """Return the legs of a run with stages, from the stage that its state is in.

    Args:
        datasets: the data of each stage.
        begun: the first step of each stage that has begun, after stage 0.

    Raises:
        InputError: a stage would begin in the past, no later than the one before, or after the end of the run.
    """
    batches, legs = run.stages.batches(run.job.batch), list[Leg]()
    step, tokens, position, mixture = state.step, state.tokens, state.sequences, state.mixture
    for number in range(len(begun), len(datasets)):
        batch, dataset = batches[number], datasets[number]
        global_batch = batch.sequences * run.job.layout.dp
        if isinstance(dataset, MixtureDataset):
            mixture = dataset.settle(mixture or _alone(datasets[0], dataset), position)
        began = step if legs or not begun else begun[-1]
        last_step = 0 if legs else state.global_batch * batch.max_length
        steps = _steps(run, number, (step, tokens), global_batch * batch.max_length, last_step)
        legs.append(Leg(number, began, step, tokens, position, steps, batch, global_batch, dataset, mixture))
        _check(run, legs, left_out)
        step, tokens = legs[-1].stop, tokens + steps * legs[-1].tokens_per_step
        position = position_after(position, steps * global_batch, left_out)
    return tuple(legs)


def _alone(first: TrainingData, mixture: MixtureDataset) -> dict[str, Any] | None:
    """Return the state of the data that a mixture follows, if the run began with a single data set."""
    if mixture.alone is None:
        return None
    assert isinstance(first, PackedDataset)
    return MixtureDataset({mixture.alone: first}, {mixture.alone: 1.0}).state


def _steps(run: Run, number: int, at: tuple[int, int], tokens_per_step: int, last_step: int) -> int:
    """Return the number of steps from a place to the end of a stage; negative if that lies behind.

    Args:
        at: steps and tokens trained.
        last_step: tokens of the last of these steps. A stage that ends inside it ends now.
    """
    step, tokens = at
    stages, end = run.stages, run.stages.end_token
    stop: int | float = stages.later[number].from_token if number < len(stages.later) else 1.0
    if isinstance(stop, float):
        fraction = Fraction(str(stop))  # exactly what is written
        if end is None:
            assert run.length.max_steps is not None
            return math.ceil(fraction * run.length.max_steps) - step
        stop = math.ceil(fraction * end)
    steps = -((tokens - stop) // tokens_per_step)
    return max(0, steps) if stop > tokens - last_step else steps


def _check(run: Run, legs: list[Leg], left_out: Sequence[Range]) -> None:
    """Raise InputError if the last leg cannot begin where it would; the first has begun, if only now."""
    leg, stages = legs[-1], run.stages
    place, after = stages.place(leg.number, "from_token"), f"it would begin after step {leg.first_step:,}"
    if len(legs) == 1:
        if leg.steps < 0 and leg.number < len(stages.later):
            start = tokens_text(stages.later[leg.number].from_token)
            raise InputError(
                f"{stages.place(leg.number + 1, 'from_token')}: {start} lies behind the checkpoint, which has "
                f"{leg.first_step:,} steps and {leg.tokens:,} tokens; begin later, or resume from an earlier checkpoint"
            )
        return
    ends = (run.length.max_steps or math.inf) <= leg.first_step or (stages.end_token or math.inf) <= leg.tokens
    if ends:
        remedy = END if stages.end_token else "--max_steps"
        raise InputError(f"{place}: {after}, where the run has ended; begin it earlier, or raise {remedy}")
    if leg.steps < 1:
        raise InputError(f"{place}: {after}, and so would the next stage; put the stages in order, or further apart")
    if leg.first_step > legs[0].first_step and any(stop > leg.position for _, stop in left_out):
        raise InputError(f"{place}: {after}, before the data that --skip_data leaves out; begin it later")


def largest_job(run: Run) -> Job:
    """Return the job of the stage that takes most memory by the estimate, perhaps not yet settled."""
    job, least = run.job, min(2, run.job.batch.accumulation_steps)  # an engine that sums up micro-batches always does
    if not run.stages.later:
        return job
    parallelism, batches = job.with_layout(), run.stages.batches(job.batch)
    compute = replace(job.compute, recompute=job.compute.recompute or 0.0)

    def memory(batch: Batch) -> float:
        return estimate_memory(replace(job, parallelism=parallelism, batch=batch, compute=compute)).peak.total

    batches = [replace(batch, accumulation_steps=max(least, batch.accumulation_steps)) for batch in batches]
    return replace(job, parallelism=parallelism, batch=max(batches, key=memory))


def stage_settings(run: Run, datasets: Sequence[TrainingData], first_steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return what checkpoints keep of each stage after stage 0.

    Args:
        first_steps: steps after which each begins, or has begun.
    """
    entries, batches = [], run.stages.batches(run.job.batch)[1:]
    for stage, dataset, batch, step in zip(run.stages.later, datasets[1:], batches, first_steps, strict=True):
        assert isinstance(dataset, MixtureDataset)
        ratio = run.job.optimization.min_lr_ratio if stage.min_lr_ratio is None else stage.min_lr_ratio
        entries.append(
            {
                "step": step,
                "from_token": stage.from_token,
                "data": dataset.weights,
                "fingerprint": dataset.fingerprint,
                "max_length": batch.max_length,
                "lr_schedule": stage.lr_schedule,
                "lr": stage.lr,
                "min_lr_ratio": ratio if stage.lr_schedule not in (None, CONSTANT) else None,
            }
        )
    return entries


def check_begun(stages: Stages, begun: int) -> None:
    """Raise InputError if the file lacks a stage that has begun."""
    if len(stages.later) < begun:
        there = f"{stages.file} has only {len(stages.later)}" if stages.file else "the flag is left out"
        raise InputError(f"--stages: the checkpoint is in stage {begun}, and {there}; give the stages of the run")


def stage_changes(
    stages: Stages, before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], begun: int
) -> list[str]:
    """Return a line for each change of the stages since the checkpoint, all of those ahead in one.

    Args:
        before, now: from `stage_settings`.
        begun: number of stages that have begun.

    Raises:
        InputError: what has changed lies behind.
    """
    lines = []
    for number, (old, new) in enumerate(zip(before[:begun], now[:begun], strict=True), start=1):
        for key in (key for key in new if key != "step" and old.get(key) != new[key]):
            place = stages.place(number, "data" if key == "fingerprint" else key)
            change = f"was {old.get(key)} in the checkpoint and is {new[key]} now"
            if number < begun or key in LAID_DOWN:
                raise InputError(
                    f"{place}: {change}, but lies behind; change it back, or resume from an earlier checkpoint"
                )
            lines.append(f"{place}: {change}")
    ahead, ahead_now = ("; ".join(map(_described, entries[begun:])) or "none" for entries in (before, now))
    if ahead != ahead_now:
        lines.append(f"--stages: those ahead were, in the checkpoint, {ahead}, and are {ahead_now} now")
    return lines


def _described(entry: dict[str, Any]) -> str:
    data = ", ".join(f"{name} {weight:.2%}" for name, weight in sorted(entry["data"].items()))
    text = (
        f"from {tokens_text(entry['from_token'])} {data} ({entry['fingerprint'][:8]}) of {entry['max_length']} tokens"
    )
    if entry["lr_schedule"] is None:
        return text
    first = "" if entry["lr"] is None else f" from {entry['lr']:g}"
    last = "" if entry["min_lr_ratio"] is None else f" to {entry['min_lr_ratio']:g} of --lr"
    return f"{text}, {entry['lr_schedule']}{first}{last}"


def check_parts(stages: Stages, curve: Curve) -> None:
    """Raise InputError if a stage's learning rate begins in the warm-up, or rises."""
    numbers = [number for number, stage in enumerate(stages.later, start=1) if stage.lr_schedule]
    for number, part in zip(numbers, curve.parts, strict=True):
        if part.start < curve.warmup_steps:
            raise InputError(
                f"{stages.place(number, 'lr_schedule')}: it would begin after step {part.start:,}, within the "
                f"{curve.warmup_steps:,} steps of warm-up; shorten these with -s, or begin the stage later"
            )
        if part.last > part.first:
            raise InputError(
                f"{stages.place(number, 'min_lr_ratio')}: {part.last:g} of --lr is above the {part.first:g} where it "
                "begins; give a lower one, or lr"
            )


def describe(leg: Leg, before: Leg | None, end: int, rates: tuple[float, float], data_parallel: int) -> list[str]:
    """Return lines on a leg for people: its steps, learning rate and batch, and the epochs of each data set.

    Args:
        before: the leg before it, if there is one.
        end: the place in the order of the data where it ends.
        rates: learning rates of its first and last step.
    """
    batch, length = leg.batch, leg.dataset.mean_length
    lines = [
        f"stage {leg.number}: steps {leg.first_step + 1:,} to {leg.stop:,}, "
        f"{leg.steps * leg.tokens_per_step:,} tokens; learning rate {rates[0]:.2e} to {rates[1]:.2e}; a step: "
        f"{batch.batch_size} x {batch.accumulation_steps} accumulated x {data_parallel} data-parallel = "
        f"{leg.global_batch} sequences x {length:.0f} tokens"
    ]
    if not isinstance(leg.dataset, MixtureDataset):
        epochs = f"{leg.position / len(leg.dataset):.2f} to {end / len(leg.dataset):.2f}"
        return [*lines, f"  epochs {epochs} of {len(leg.dataset):,} sequences"]
    assert leg.mixture is not None
    known = (before.mixture or _alone(before.dataset, leg.dataset) or {}) if before else {}
    first, last = (epochs_of(leg.mixture, position) for position in (leg.position, end))
    for name, weight in sorted(leg.dataset.weights.items()):
        anew = known.get("max_lengths", {}).get(name, length) != length
        lines.append(
            f"  {name}: {weight:.2%}, epochs {first[name]:.2f} to {last[name]:.2f} of {leg.mixture['lengths'][name]:,} "
            f"sequences{'; an epoch begins, since its sequences have another length' if anew else ''}"
        )
    return lines
