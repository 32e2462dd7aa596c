"""The plan of a run: its position, its length, and the settings that a resume must not change unnoticed."""

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpointing.folder import check_shared
from checkpointing.writer import Retention
from data_utils import ENDLESS, MixtureDataset, TrainingData
from engine.layout import Layout
from runtime.collectives import gather
from runtime.console import InputError, say
from training.left_out import Range, leave_out, merged, position_after, sequences_between
from training.legs import Leg, check_begun, check_parts, lay_out, stage_changes, stage_settings
from training.run import Run, TrainState
from training.schedule import Curve
from training.spikes import SpikeRule
from training.stages import END

LORA_SIZES = ("lora_rank", "lora_modules")  # a resume cannot change them, since they set the shapes of tensors
LATER_SETTINGS = {  # that older checkpoints lack, which were made with these
    "adam_betas": [0.9, 0.95],
    "adam_eps": 1e-8,
    "deterministic": False,
    **asdict(SpikeRule()),
    **{name: value for name, value in Curve(0, 0).settings.items() if name not in ("warmup_steps", "schedule_steps")},
}


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: its legs, one for each stage that is left, and its length."""

    layout: Layout
    legs: Sequence[Leg]
    total_sequences: int  # in all epochs of the flags' data
    num_epochs: int = 1
    curve: Curve = field(default_factory=partial(Curve, 0, 0))  # the learning rate
    left_out: Sequence[Range] = ()  # of the global order, apart and ascending

    @property
    def epoch_sequences(self) -> int:
        return self.total_sequences // self.num_epochs

    @property
    def trained_steps(self) -> int:
        """Steps up to the checkpoint."""
        return self.legs[0].first_step

    @property
    def trained_tokens(self) -> int:
        """Tokens up to the checkpoint."""
        return self.legs[0].tokens

    @property
    def total_steps(self) -> int:
        return self.legs[-1].stop

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, in the first leg."""
        return self.legs[0].global_batch

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, in the first leg."""
        return self.legs[0].tokens_per_step

    @property
    def remaining_tokens(self) -> int:
        return sum(leg.steps * leg.tokens_per_step for leg in self.legs)

    @property
    def total_tokens(self) -> int:
        return self.trained_tokens + self.remaining_tokens

    def leg_at(self, step: int) -> Leg:
        """Return the leg with the step after `step` others; the last one at the end of the run."""
        return next((leg for leg in self.legs if step < leg.stop), self.legs[-1])

    def sequences_at(self, step: int) -> int:
        """Return the position in the data after a step."""
        leg = next((leg for leg in self.legs if step <= leg.stop), self.legs[-1])
        return position_after(leg.position, (step - leg.first_step) * leg.global_batch, self.left_out)

    def flags_for(self, steps: int) -> str:
        """Return the flags for a run of this many steps."""
        epochs = -(-self.sequences_at(steps) * self.num_epochs // self.total_sequences)
        several = epochs > self.num_epochs and self.legs[-1].number == 0
        return f"--num_epochs {epochs} --max_steps {steps}" if several else f"--max_steps {steps}"

    def advance(self, state: TrainState, tokens: int, stream: dict[str, Any] | None, skipped: bool) -> None:
        """Add a completed step to the state."""
        leg = self.leg_at(state.step)
        state.step += 1
        state.sequences = position_after(state.sequences, leg.global_batch, self.left_out)
        state.tokens += tokens
        state.global_batch, state.mixture = leg.global_batch, leg.mixture
        if leg.number == 0:
            state.epoch = (state.sequences - 1) // self.epoch_sequences
        state.skipped_steps += skipped
        if stream is not None:
            state.stream = stream

    def saves_after(self, step: int, retention: Retention) -> bool:
        """Return True if a checkpoint is due after a step: by its number, or since it is the last one of a stage."""
        ends = retention.save_interval > 0 and any(step == leg.stop for leg in self.legs)
        return ends or retention.is_due(step)


def _settle_position(run: Run, dataset: TrainingData, state: TrainState, stage: int) -> None:
    """Reset the position in the data if --allow_changes permits an order that differs from the checkpoint's.

    Args:
        stage: that of the checkpoint.

    Raises:
        InputError: the order differs, and was that of an earlier stage.
    """
    order = {"data": dataset.fingerprint, "seed": run.job.seed, "max_length": run.job.batch.max_length}
    order["slice_weights"] = getattr(dataset, "slice_weights", None)
    order["mixture"] = getattr(dataset, "weights", None)
    changed = [name for name, value in order.items() if state.settings.get(name) != value]
    if stage and changed:
        first = changed[0]
        raise InputError(
            f"--load: {_setting(first)} was {state.settings.get(first)} in the checkpoint and is {order[first]} now; "
            f"this lies behind, since the checkpoint is in stage {stage}: change it back"
        )
    if not (state.settings and run.outputs.allow_changes and changed):
        return
    if state.mixture and order["mixture"] and set(changed) <= {"data", "mixture"}:
        return  # each data set that is the same continues where it stopped
    stream = changed == ["data"] and state.stream and hasattr(dataset, "continues")
    if stream and dataset.continues(state.settings["data"]):  # type: ignore[attr-defined]
        say("--load: the content of the stream's files has changed; it continues at the row where it stopped")
    else:
        say("--load: the order of the data has changed, so they are read from the beginning")
        state.sequences, state.stream, state.left_out, state.mixture = 0, None, {}, None


def _legs(
    run: Run, datasets: Sequence[TrainingData], state: TrainState, begun: Sequence[int], total_sequences: int
) -> Sequence[Leg]:
    """Return the legs of the run: the stages that are left, or without stages all that is left of the data."""
    left_out = merged(state.left_out.values())
    if run.stages.later:
        return lay_out(run, datasets, state, begun, left_out)
    dataset, batch = datasets[0], run.job.batch
    mixture = dataset.settle(state.mixture, state.sequences) if isinstance(dataset, MixtureDataset) else None
    global_batch = batch.sequences * run.job.layout.dp
    steps = sequences_between(state.sequences, total_sequences, left_out) // global_batch
    if run.length.max_steps is not None:
        steps = min(steps, run.length.max_steps - state.step)
    return [Leg(0, 0, state.step, state.tokens, state.sequences, steps, batch, global_batch, dataset, mixture)]


def make_plan(run: Run, datasets: Sequence[TrainingData], state: TrainState) -> Plan:
    """Return the plan of the run, and store its settings in the state.

    Args:
        datasets: the data of each stage, first those of the flags.

    Raises:
        InputError: the data are too few for a step, the checkpoint is past the end of the run, the default warm-up is
            longer than the run, a stage begins in the past, or settings differ from the checkpoint's.
    """
    dataset, stages_before = datasets[0], state.settings.get("stages", [])
    begun = [stage["step"] for stage in stages_before if stage["step"] < state.step]
    check_begun(run.stages, len(begun))
    _settle_position(run, dataset, state, len(begun))
    total_sequences = run.length.num_epochs * len(dataset)
    legs = _legs(run, datasets, state, begun, total_sequences)
    if run.outputs.skip_data:
        _leave_out(run, run.outputs.skip_data, state, legs, total_sequences)
        legs = _legs(run, datasets, state, begun, total_sequences)
    _check_length(run, dataset, state, legs)
    stages = stage_settings(run, datasets, [*begun, *(leg.began for leg in legs[1:])])
    curve = _learning_rate(run, state, legs[-1].stop, stages)
    left_out = merged(state.left_out.values())
    plan = Plan(run.job.layout, legs, total_sequences, run.length.num_epochs, curve, left_out)
    settings = run.settings(curve) | {"data": dataset.fingerprint}
    settings |= dataset.fix_order(state.settings, plan.global_batch)
    if state.settings:
        changes = _changes(run, state, curve, settings, stages, len(begun))
        _accept(changes, run, state, plan)
    if plan.total_steps > state.step > 0:
        _tell_of_next_steps(run, state, plan)
    state.settings, state.mixture = settings | ({"stages": stages} if stages else {}), legs[0].mixture
    state.global_batch, state.fp8 = plan.global_batch, run.job.compute.recipe
    return plan


def _leave_out(run: Run, steps: tuple[int, int], state: TrainState, legs: Sequence[Leg], total_sequences: int) -> None:
    """Add the sequences of the steps of --skip_data to those that the state leaves out.

    Args:
        legs: of the run as if it left out no more.

    Raises:
        InputError: the run is new, or the steps are not all ahead and of one stage.
    """
    if state.step == 0:
        raise InputError("--skip_data: there is no checkpoint to resume from; give -f, or leave it out")
    leg = next((leg for leg in legs if leg.steps), legs[-1])
    if leg is not legs[-1] and steps[1] > leg.stop:
        raise InputError(
            f"--skip_data: stage {leg.number} ends after step {leg.stop}; give steps of one stage, and resume in it"
        )
    end = ENDLESS if run.stages.later else total_sequences
    say(leave_out(state.left_out, steps, state.step, state.sequences, leg.global_batch, end, legs[-1].stop))


def _check_length(run: Run, dataset: TrainingData, state: TrainState, legs: Sequence[Leg]) -> None:
    """Raise InputError if the run has no steps, ends before the checkpoint, or is too short for a flag."""
    length, total_steps = run.length, legs[-1].stop
    if total_steps == 0:
        raise InputError(
            f"--dataset: {len(dataset)} sequences x --num_epochs {length.num_epochs} do not fill one global batch of "
            f"{legs[0].global_batch}; lower --batch_size, --accumulation_steps or --max_length"
        )
    if total_steps < state.step:
        remedy = END if run.stages.end_token else "--max_steps" if run.stages.later else "--max_steps or --num_epochs"
        raise InputError(
            f"--load: the checkpoint is at step {state.step} and the run ends at step {total_steps}; raise {remedy}"
        )
    if length.warmup_steps is not None and length.warmup_steps > total_steps and not length.warmup_given:
        raise InputError(
            f"--warmup_steps: the default of {length.warmup_steps} is longer than the run of {total_steps} steps; "
            f"give a shorter one, such as -s {max(1, total_steps // 20)}"
        )
    run.inspection.check_end(total_steps)


def _learning_rate(run: Run, state: TrainState, total_steps: int, stages: Sequence[dict[str, Any]]) -> Curve:
    """Return the learning rate of the run with its stages.

    Raises:
        InputError: warm-up, decay and the stages' own schedules do not fit into the run.
    """
    curve = run.curve(total_steps, state.settings)
    if curve.decay_steps is not None and curve.decay_start < curve.warmup_steps:
        raise InputError(
            f"--decay_steps: {curve.warmup_steps} steps of warm-up and {curve.decay_steps} of decay do not fit into "
            f"the run of {total_steps} steps; shorten one"
        )
    curve = curve.with_parts(stages, run.job.optimization.lr)
    check_parts(run.stages, curve)
    return curve


def _changes(
    run: Run,
    state: TrainState,
    curve: Curve,
    settings: dict[str, Any],
    stages: Sequence[dict[str, Any]],
    begun: int,
) -> dict[str, str]:
    """Return a line for each setting that differs from the checkpoint's and matters to the steps that are left.

    Args:
        begun: number of stages that have begun.

    Raises:
        InputError: a stage was changed that lies behind.
    """
    before, stages_before = LATER_SETTINGS | state.settings, state.settings.get("stages", [])
    changes = {
        name: f"--load: {_setting(name)} was {before.get(name)} in the checkpoint and is {value} now"
        for name, value in settings.items()
        if before.get(name) != value
    }
    if "mixture" in changes:
        changes.pop("data", None)  # whose change the mixture tells too
    if changes.keys() <= curve.settings.keys():
        earlier = Curve(**{name: before[name] for name in curve.settings})
        if curve.agrees(earlier.with_parts(stages_before, run.job.optimization.lr), state.step):
            for change in changes.values():
                say(f"{change}; the learning rate so far is the same")
            changes = {}
    lines = stage_changes(run.stages, stages_before, stages, begun)
    return changes | {f"stages {number}": line for number, line in enumerate(lines)}


def _accept(changes: dict[str, str], run: Run, state: TrainState, plan: Plan) -> None:
    """Tell of changed settings if --allow_changes allows them.

    Raises:
        InputError: it does not, or cannot.
    """
    if sizes := [change for name, change in changes.items() if name in LORA_SIZES]:
        raise InputError(sizes[0])
    if state.stream and "shuffle_buffer" in changes:
        buffer = state.settings["shuffle_buffer"]
        raise InputError(f"{changes['shuffle_buffer']}; give {buffer}, or the stream cannot continue exactly")
    if changes and not run.outputs.allow_changes:
        if (steps := state.settings.get("schedule_steps")) and "schedule_steps" in changes:
            changes["schedule_steps"] += f"; {plan.flags_for(steps)} keeps it"
        *others, last = changes.values()
        raise InputError(*others, f"{last}; --allow_changes resumes anyway")
    for change in changes.values():
        say(f"{change}, as --allow_changes allows")


def _tell_of_next_steps(run: Run, state: TrainState, plan: Plan) -> None:
    """Tell if the next step has another number of sequences, or another precision, than the checkpoint's last."""
    if state.global_batch not in (0, plan.global_batch):
        say(
            f"--load: a step had {state.global_batch} sequences up to the checkpoint and has {plan.global_batch} now; "
            "--batch_size and --accumulation_steps can restore it"
        )
    if state.fp8 != run.job.compute.recipe:
        earlier = f"with --fp8 {state.fp8}" if state.fp8 else "without it"
        say(f"--fp8: steps up to the checkpoint were trained {earlier}, unlike the next")


def _setting(name: str) -> str:
    names = {
        "schedule_steps": "the length of the run and its learning-rate schedule",
        "data": "the data",
        "mixture": "the mixture of --dataset",
        "base_weights": "the sampled fingerprint of --model_path's weights",
    }
    return names.get(name, f"--{name}")


def check_agreement(save_dir: Path, state: TrainState, checkpoint: Path | None, exchange: str) -> None:
    """Refuse to train if ranks do not share --save_dir, or differ in checkpoint, data or flags. Collective.

    Args:
        exchange: the settled `--exchange`; ranks whose GPUs differ in memory may have settled `auto` differently, and
            would wait for one another in the first step.

    Raises:
        InputError: on every rank; the message names the first rank that differs from rank 0.
    """
    check_shared(save_dir)
    own = {"--load: the checkpoint": str(checkpoint), "--load: its step": state.step}
    own["--exchange auto (give step or micro_batch if GPUs differ)"] = exchange
    own |= {_setting(name): value for name, value in state.settings.items()} | {"--skip_data": state.left_out}
    views = gather((socket.gethostname(), own))
    for number, (host, other) in enumerate(views):
        for name, expected in views[0][1].items():
            if other.get(name) != expected:
                raise InputError(
                    f"{name} is {expected} on rank 0 ({views[0][0]}) and {other.get(name)} on rank {number} "
                    f"({host}); give all ranks the same flags and files"
                )
