"""The plan of a run: its position, its length, and the settings that a resume must not change unnoticed."""

import contextlib
import copy
import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from attn import select_attention
from checkpointing.adapters import Lora
from checkpointing.folder import (
    check_room,
    check_shared,
    claim_save_dir,
    complete_checkpoints,
    find_checkpoint,
    read_running_states,
)
from checkpointing.writer import Retention
from data_utils import ENDLESS, MixtureDataset, TrainingData
from engine.job import Job
from engine.layout import Layout
from runtime.collectives import gather, on_rank_zero
from runtime.console import InputError, NoRoom, below, rank, say
from runtime.files import LOCK, claim_folder, is_plain_name
from training.inspection import Inspection
from training.left_out import Range, leave_out, merged, position_after, sequences_between
from training.legs import Leg, check_begun, check_parts, lay_out, stage_changes, stage_settings
from training.schedule import DECAY_RATIO, EXTENDED, SHAPES, WSD, Curve, Schedule
from training.spikes import SpikeRule
from training.stages import END, Stages
from training.tasks import Tasks
from training.wandb_run import wandb_problems

OWNER = "run.json"  # in the folder of logs: the run that owns them
WARMUP_RATIO = 0.03  # of the steps, in fine-tuning
LORA_SIZES = ("lora_rank", "lora_modules")  # a resume cannot change them, since they set the shapes of tensors


@dataclass(frozen=True)
class Length:
    """The length of a run and of its warm-up."""

    num_epochs: int = 1
    max_steps: int | None = None  # None: to the end of the data
    warmup_steps: int | None = None  # None: WARMUP_RATIO of the run
    warmup_given: bool = False  # True if it is on the command line

    def problems(self) -> list[str]:
        """Return a line for each number that is too small."""
        return below(1, num_epochs=self.num_epochs, max_steps=self.max_steps) + below(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class Outputs:
    """Folders and intervals of a run's results, and the checkpoint to resume from."""

    save_dir: Path = Path("checkpoint")
    tensorboard_dir: Path = Path("tb_logs")
    run_name: str | None = None  # a folder of its own in --tensorboard_dir, which `tensorboard_dir` already includes
    wandb: str | None = None  # project
    log_interval: int = 10  # steps
    eval_interval: int = 1000  # steps
    eval_first: bool = False  # evaluate before the first step too
    load: str | None = None  # a checkpoint, or `latest`
    allow_changes: bool = False  # resume although data, seed, recipe or length have changed
    hang_timeout: int | None = None  # seconds without progress after which a run ends; 0: never; None: as it needs
    skip_data: tuple[int, int] | None = None  # first and last of the steps whose sequences are left out

    def problems(self) -> list[str]:
        """Return a line for each number that is too small, and for a flag without effect."""
        problems = below(1, log_interval=self.log_interval, eval_interval=self.eval_interval)
        problems += below(0, hang_timeout=self.hang_timeout) + wandb_problems(self.wandb)
        if self.run_name is not None and not is_plain_name(self.run_name):
            problems.append(f"--run_name: {self.run_name!r} is not a name for a folder; give one without slashes")
        for name in ("allow_changes", "skip_data"):
            if getattr(self, name) and not self.load:
                problems.append(f"--{name}: takes effect only with --load; give that too, or leave it out")
        return problems


@dataclass(frozen=True)
class Run:
    """A training run as the user requests it."""

    model: str  # name, for messages
    job: Job
    length: Length = field(default_factory=Length)
    outputs: Outputs = field(default_factory=Outputs)
    retention: Retention = field(default_factory=Retention)
    schedule: Schedule = field(default_factory=Schedule)
    spikes: SpikeRule = field(default_factory=SpikeRule)
    inspection: Inspection = field(default_factory=Inspection)
    tasks: Tasks = field(default_factory=Tasks)
    lora: Lora | None = None  # None: a program without adapters
    num_workers: int = 1  # loader processes per rank
    flags: dict[str, Any] = field(default_factory=dict)  # all flags, for TensorBoard
    stages: Stages = field(default_factory=Stages)

    def saves_after(self, step: int, plan: "Plan") -> bool:
        """Return True if a checkpoint is due after a step: by its number, or since it is the last one of a stage."""
        ends = self.retention.save_interval > 0 and any(step == leg.stop for leg in plan.legs)
        return ends or self.retention.is_due(step)

    def settings(self, curve: Curve) -> dict[str, Any]:
        """Return the flags that a resume must not change unnoticed; `make_plan` adds the data."""
        optimization = self.job.optimization
        return {
            "seed": self.job.seed,
            "max_length": self.job.batch.max_length,
            "lr": optimization.lr,
            "weight_decay": optimization.weight_decay,
            "gradient_clipping": optimization.gradient_clipping,
            "adam_betas": list(optimization.adam_betas),
            "adam_eps": optimization.adam_eps,
            "deterministic": self.job.compute.deterministic,
            **asdict(self.spikes),
            **curve.settings,
            **(self.lora.settings if self.lora else {}),
        }

    def curve(self, total_steps: int, before: dict[str, Any]) -> Curve:
        """Return the learning rate of a run of this many steps.

        Args:
            before: settings of the checkpoint, if there is one. A run that is made longer keeps its warm-up.
        """
        warmup_steps, schedule = self.length.warmup_steps, self.schedule
        if warmup_steps is None and schedule.lr_schedule in EXTENDED:
            warmup_steps = before.get("warmup_steps")
        if warmup_steps is None:
            warmup_steps = math.ceil(WARMUP_RATIO * total_steps)
        decay_steps = schedule.decay_steps
        if schedule.lr_schedule == WSD and decay_steps is None:
            decay_steps = math.ceil(DECAY_RATIO * total_steps)
        return Curve(
            warmup_steps,
            total_steps,
            self.job.optimization.min_lr_ratio,
            schedule.lr_schedule,
            decay_steps,
            schedule.decay_shape or SHAPES[0],
        )

    def problems(self) -> list[str]:
        """Return a line for each mistake in the flags other than the job's."""
        return (
            self.length.problems()
            + self.schedule.problems()
            + self.spikes.problems()
            + self.inspection.problems()
            + self.outputs.problems()
            + self.retention.problems()
            + self.tasks.problems(self.retention)
            + self.stages.problems(self.schedule, self.length.max_steps, self.length.num_epochs)
            + below(0, num_workers=self.num_workers)
        )


LATER_SETTINGS = {  # that older checkpoints lack, which were made with these
    "adam_betas": [0.9, 0.95],
    "adam_eps": 1e-8,
    "deterministic": False,
    **asdict(SpikeRule()),
    **{name: value for name, value in Curve(0, 0).settings.items() if name not in ("warmup_steps", "schedule_steps")},
}


@dataclass
class TrainState:
    """The state of a run besides weights and optimizer; checkpoints save it as a whole."""

    epoch: int = 0
    step: int = 0  # optimizer steps since the start of training
    sequences: int = 0  # trained on, over all ranks and epochs: the position in the global order
    tokens: int = 0
    skipped_steps: int = 0  # that updated nothing: fp16 gradients overflowed, no label counted, or --skip_spikes
    settings: dict[str, Any] = field(default_factory=dict)  # a resume must not change them unnoticed
    stream: dict[str, Any] | None = None  # position in a data set that is streamed
    unevaluated: dict[str, Any] | None = None  # the last step's metrics, if a signal interrupted its evaluation
    global_batch: int = 0  # sequences in the last step; 0 in older checkpoints
    fp8: str = ""  # recipe with which the last step multiplied in float8
    spikes: int = 0  # of the skipped steps, those that --skip_spikes skipped
    window: list[list[float]] = field(default_factory=list)  # loss and gradient norm of each of the last steps
    left_out: dict[str, Range] = field(default_factory=dict)  # ranges of the global order, by steps (--skip_data)
    started: float = 0.0  # seconds since 1970 at the run's first start; 0 in older checkpoints
    spent: dict[str, float] = field(default_factory=dict)  # seconds, by purpose; see `training.goodput`
    mixture: dict[str, Any] | None = None  # of several data sets; see `MixtureDataset.settle`

    @property
    def adam_steps(self) -> int:
        """The number of updates, for Adam's bias correction."""
        return self.step - self.skipped_steps

    def saved(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return asdict(self) | {"adam_steps": self.adam_steps}

    def advance(self, plan: "Plan", tokens: int, stream: dict[str, Any] | None, skipped: bool) -> None:
        """Add a completed step."""
        leg = plan.leg_at(self.step)
        self.step += 1
        self.sequences = position_after(self.sequences, leg.global_batch, plan.left_out)
        self.tokens += tokens
        self.global_batch, self.mixture = leg.global_batch, leg.mixture
        if leg.number == 0:
            self.epoch = (self.sequences - 1) // plan.epoch_sequences
        self.skipped_steps += skipped
        if stream is not None:
            self.stream = stream


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


def complete(run: Run, tokenizer: PreTrainedTokenizerBase, inside_documents: bool) -> tuple[Run, str]:
    """Return the run with the model's configuration as it is trained and saved, and a line on its attention.

    Args:
        inside_documents: attention stays inside each document of a sequence (see `select_attention`).
    """
    job, config = run.job, copy.deepcopy(run.job.config)
    config.torch_dtype = job.dtype
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    compute = job.compute
    attention = select_attention(
        config, compute.flash_attention, job.layout.sp > 1, inside_documents, compute.deterministic
    )
    return replace(run, job=replace(job, config=config)), attention


def resume_state(outputs: Outputs, tell: Callable[[str], None] = say) -> tuple[TrainState, Path | None]:
    """Return the state and the path of the checkpoint that `--load` names, or a fresh state and None.

    Args:
        tell: called with a message for each checkpoint that is skipped.

    Raises:
        InputError: `--load` names no checkpoint, or `--save_dir` holds some that this run would mix with its own.
    """
    folder = find_checkpoint(outputs.load, outputs.save_dir, tell) if outputs.load else None
    newest = next(complete_checkpoints(outputs.save_dir), None)
    if folder is None:
        if newest or (outputs.save_dir / "final").exists():
            raise InputError(
                f"--save_dir: {outputs.save_dir} holds the {'checkpoints' if newest else 'final model'} of a run; "
                f"{'resume it with -f latest, or ' if newest else ''}give another folder"
            )
        return TrainState(), None
    saved = read_running_states(folder)
    state = TrainState(**{name: saved[name] for name in asdict(TrainState()) if name in saved})
    if newest and folder.resolve().parent != outputs.save_dir.resolve():
        raise InputError(
            f"--save_dir: {outputs.save_dir} holds checkpoints of another run than --load {folder}; give another folder"
        )
    if newest and newest[0] > state.step:
        raise InputError(
            f"--load: {folder} is at step {state.step}, and --save_dir {outputs.save_dir} holds later checkpoints, up "
            f"to {newest[1].name}, which would be taken for this run's; move them away, or give another --save_dir"
        )
    return state, folder


def resume_together(outputs: Outputs) -> tuple[TrainState, Path | None]:
    """Return rank 0's `resume_state` on every rank: others may not yet see what it has renamed. Collective."""
    found: list[tuple[TrainState, Path | None]] = []
    on_rank_zero(lambda: found.append(resume_state(outputs)), "the run could not be resumed")
    return gather(found)[0][0]


def log_owner(save_dir: Path, folder: Path) -> dict[str, str]:
    """Return the owner of logs: the relative path to its checkpoints, which stays valid if both folders move."""
    return {"save_dir": os.path.relpath(save_dir.resolve(), folder.resolve())}


def refuse_foreign_logs(outputs: Outputs, step: int) -> None:
    """Refuse a folder of logs that this run does not continue.

    Raises:
        InputError: they belong to another --save_dir, or the run is new and their owner unknown.
    """
    folder, owner = outputs.tensorboard_dir, None  # None: logs of an older version
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = {"save_dir": json.loads((folder / OWNER).read_bytes())["save_dir"]}
    logs = any(next(folder.glob(pattern), None) for pattern in ("metrics*.jsonl", "events.out.tfevents.*"))
    if logs and owner != log_owner(outputs.save_dir, folder) and (owner or not step):
        raise InputError(
            f"--tensorboard_dir: {folder} holds the logs of another run, not of --save_dir {outputs.save_dir}; "
            "give another folder, or move the logs away"
        )


def check_folders(outputs: Outputs, job: Job, step: int) -> None:
    """Refuse early, before hours of data preparation, what `claim_folders` would refuse later; make no folder.

    Raises:
        InputError: another run writes to --save_dir or --tensorboard_dir, or there is no room for one checkpoint.
        NoRoom: the same of a resume, whose flags cannot be at fault.
    """
    if rank():
        return
    if (outputs.save_dir / LOCK).exists():
        claim_save_dir(outputs.save_dir)
    if (outputs.tensorboard_dir / LOCK).exists():
        claim_folder(outputs.tensorboard_dir, "--tensorboard_dir")
    refuse_foreign_logs(outputs, step)
    check_room(outputs.save_dir, job, NoRoom if step else InputError)


def claim_folders(outputs: Outputs, state: TrainState, checkpoint: Path | None) -> None:
    """Lock the folders of checkpoints and logs for this run until it ends.

    Args:
        state, checkpoint: from `resume_state`; the plan is based on them.

    Raises:
        InputError: another run holds a folder, or has added or removed checkpoints since.
    """
    if rank() != 0:
        return
    claim_save_dir(outputs.save_dir)
    claim_folder(outputs.tensorboard_dir, "--tensorboard_dir")
    refuse_foreign_logs(outputs, state.step)
    new_state, new_checkpoint = resume_state(outputs, tell=lambda _: None)
    if (new_checkpoint, new_state.step, new_state.tokens) != (checkpoint, state.step, state.tokens):
        raise InputError(
            f"--load: another run has written to --save_dir {outputs.save_dir} since this one started: the "
            f"checkpoint to resume was {checkpoint or 'none'} and is {new_checkpoint or 'none'} now; start again"
        )


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
    dataset, length = datasets[0], run.length
    stages_before = state.settings.get("stages", [])
    begun = [stage["step"] for stage in stages_before if stage["step"] < state.step]
    check_begun(run.stages, len(begun))
    _settle_position(run, dataset, state, len(begun))
    total_sequences = length.num_epochs * len(dataset)
    legs = _legs(run, datasets, state, begun, total_sequences)
    if steps := run.outputs.skip_data:
        if state.step == 0:
            raise InputError("--skip_data: there is no checkpoint to resume from; give -f, or leave it out")
        leg = next((leg for leg in legs if leg.steps), legs[-1])
        if leg is not legs[-1] and steps[1] > leg.stop:
            raise InputError(
                f"--skip_data: stage {leg.number} ends after step {leg.stop}; give steps of one stage, and resume in it"
            )
        end = ENDLESS if run.stages.later else total_sequences
        say(leave_out(state.left_out, steps, state.step, state.sequences, leg.global_batch, end, legs[-1].stop))
        legs = _legs(run, datasets, state, begun, total_sequences)
    total_steps, global_batch = legs[-1].stop, legs[0].global_batch
    if total_steps == 0:
        raise InputError(
            f"--dataset: {len(dataset)} sequences x --num_epochs {length.num_epochs} do not fill one global batch of "
            f"{global_batch}; lower --batch_size, --accumulation_steps or --max_length"
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
    curve = run.curve(total_steps, state.settings)
    if curve.decay_steps is not None and curve.decay_start < curve.warmup_steps:
        raise InputError(
            f"--decay_steps: {curve.warmup_steps} steps of warm-up and {curve.decay_steps} of decay do not fit into "
            f"the run of {total_steps} steps; shorten one"
        )
    stages = stage_settings(run, datasets, [*begun, *(leg.began for leg in legs[1:])])
    curve = curve.with_parts(stages, run.job.optimization.lr)
    check_parts(run.stages, curve)
    left_out = merged(state.left_out.values())
    plan = Plan(run.job.layout, legs, total_sequences, length.num_epochs, curve, left_out)
    settings = run.settings(curve) | {"data": dataset.fingerprint}
    settings |= dataset.fix_order(state.settings, global_batch)
    before = state.settings and LATER_SETTINGS | state.settings
    changes = {
        name: f"--load: {_setting(name)} was {before.get(name)} in the checkpoint and is {value} now"
        for name, value in settings.items()
        if before and before.get(name) != value
    }
    if "mixture" in changes:
        changes.pop("data", None)  # whose change the mixture tells too
    if before and changes.keys() <= curve.settings.keys():
        earlier = Curve(**{name: before[name] for name in curve.settings})
        if curve.agrees(earlier.with_parts(stages_before, run.job.optimization.lr), state.step):
            for change in changes.values():
                say(f"{change}; the learning rate so far is the same")
            changes = {}
    if before:
        lines = stage_changes(run.stages, stages_before, stages, len(begun))
        changes |= {f"stages {number}": line for number, line in enumerate(lines)}
    if sizes := [change for name, change in changes.items() if name in LORA_SIZES]:
        raise InputError(sizes[0])  # --allow_changes does not cover them
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
    state.settings, state.mixture = settings | ({"stages": stages} if stages else {}), legs[0].mixture
    if state.global_batch not in (0, global_batch) and total_steps > state.step:
        say(
            f"--load: a step had {state.global_batch} sequences up to the checkpoint and has {global_batch} now; "
            "--batch_size and --accumulation_steps can restore it"
        )
    state.global_batch = global_batch
    if state.fp8 != run.job.compute.recipe and total_steps > state.step > 0:
        earlier_steps = f"with --fp8 {state.fp8}" if state.fp8 else "without it"
        say(f"--fp8: steps up to the checkpoint were trained {earlier_steps}, unlike the next")
    state.fp8 = run.job.compute.recipe
    return plan


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
