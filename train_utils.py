"""What pretraining and fine-tuning share beyond their flags: the run's state and plan, and the training loop."""

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig

import checkpoint_utils
from booster_utils import forward_backward, loss_scaler, optimizer_step
from checkpoint_writer import CheckpointWriter
from console import InputError, RunError, rank, say
from data_utils import IGNORE_INDEX, PackedDataset, ShardedSampler
from evaluation import evaluate
from layout import Layout, describe_layout
from metrics import Metrics
from model_utils import count_parameters
from performance_evaluator import PerformanceEvaluator

MIN_LR_RATIO = 0.1  # the cosine ends at a tenth of the peak (LLaMA, arXiv:2302.13971, section 2.3)
WARMUP_RATIO = 0.03  # of the steps of fine-tuning
MAX_SKIPPED_IN_A_ROW = 50
PREFETCHED_BATCHES = 8  # by each loader process: a long document in a stream takes longer than a step of a small model
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GENERATE = Path("scripts", "generate.py")
INTERRUPTED = 75  # exit status of a run that a signal ended after its checkpoint was saved (EX_TEMPFAIL)


# ------------------------------------------------------------------------------------------------------- state and plan


@dataclass
class TrainState:
    """Everything that a run carries from one step to the next beside weights and optimizer, saved as one."""

    epoch: int = 0
    step: int = 0  # optimizer steps since the start of training
    sequences: int = 0  # consumed, over all ranks and epochs: the position in the global order
    tokens: int = 0
    skipped_steps: int = 0  # of `step`, those whose fp16 gradients overflowed
    settings: dict = field(default_factory=dict)  # what must not change unnoticed on a resume, by name
    stream: dict | None = None  # where a data set that is read as a stream goes on

    @property
    def adam_steps(self) -> int:
        return self.step - self.skipped_steps


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: sequences x tokens a step, and where it ends."""

    layout: Layout
    global_batch: int  # sequences in an optimizer step
    mean_length: float  # tokens in a sequence; packed ones are all of max_length
    total_steps: int
    total_sequences: int  # in all epochs

    @property
    def tokens_per_step(self) -> int:
        return round(self.global_batch * self.mean_length)


LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_modules")  # of fine-tuning
SETTINGS = ("seed", "max_length", "lr", "warmup_steps", "weight_decay", "gradient_clipping", *LORA_SETTINGS)


def resume_state(args: argparse.Namespace, dataset: PackedDataset) -> tuple[TrainState, Path | None]:
    """A fresh state, or the one of the checkpoint that `--load` names, and that checkpoint.

    Raises:
        InputError: `--load` names no checkpoint, or the run would mix its own with those of another that are there.
    """
    if args.load is None:
        if checkpoint_utils.complete_checkpoints(args.save_dir):
            raise InputError(
                f"--save_dir: {args.save_dir} holds the checkpoints of a run; resume it with -f latest, or give another"
            )
        return TrainState(), None
    folder = checkpoint_utils.find_checkpoint(args.load, args.save_dir)
    saved = checkpoint_utils.read_running_states(folder)
    state = TrainState(**{name: saved[name] for name in asdict(TrainState()) if name in saved})
    if later := checkpoint_utils.complete_checkpoints(args.save_dir, after=state.step):
        raise InputError(
            f"--load: {folder} is at step {state.step}, and --save_dir {args.save_dir} holds later checkpoints, up to "
            f"{later[-1][1].name}, which would be taken for this run's; move them away, or give another --save_dir"
        )
    order = {"data": dataset.fingerprint, "seed": args.seed, "max_length": args.max_length}
    order["slice_weights"] = getattr(args, "slice_weights", None)
    if args.allow_changes and any(state.settings.get(name) != value for name, value in order.items()):
        state.sequences, state.stream = 0, None  # the position was one in another order
    return state, folder


def make_plan(args: argparse.Namespace, layout: Layout, dataset: PackedDataset, state: TrainState) -> Plan:
    """Works out the run's length, and takes this run's settings into the state.

    Raises:
        InputError: too little data for a step, a run that has passed its end, a warm-up longer than the run that nobody
            asked for, or settings that differ from the checkpoint's.
    """
    global_batch = args.batch_size * args.accumulation_steps * layout.dp
    total_sequences = args.num_epochs * len(dataset)
    total_steps = state.step + max(0, total_sequences - state.sequences) // global_batch
    if total_steps == 0:
        raise InputError(
            f"--dataset: {len(dataset)} sequences x --num_epochs {args.num_epochs} do not fill one global batch of "
            f"{global_batch}; lower --batch_size, --accumulation_steps or --max_length"
        )
    if args.max_steps is not None:
        total_steps = min(total_steps, args.max_steps)
    if total_steps < state.step:
        raise InputError(
            f"--load: the checkpoint is at step {state.step} and the run ends at step {total_steps}; "
            "raise --max_steps or --num_epochs"
        )
    if args.warmup_steps is not None and args.warmup_steps > total_steps and not args.warmup_steps_given:
        raise InputError(
            f"--warmup_steps: the default of {args.warmup_steps} is longer than the run of {total_steps} steps; "
            f"give a shorter one, such as -s {max(1, total_steps // 20)}"
        )
    if args.warmup_steps is None:
        args.warmup_steps = math.ceil(WARMUP_RATIO * total_steps)
    settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    settings |= {"schedule_steps": total_steps, "data": dataset.fingerprint}
    settings |= dataset.fix_order(state.settings, global_batch)
    changes = [
        f"--load: {_setting(name)} was {state.settings.get(name)} in the checkpoint and is {value} now"
        for name, value in settings.items()
        if state.settings and state.settings.get(name) != value
    ]
    if changes and not args.allow_changes:
        raise InputError(*changes[:-1], f"{changes[-1]}; --allow_changes resumes all the same")
    for change in changes:
        say(f"{change}, as --allow_changes allows")
    state.settings = settings
    return Plan(layout, global_batch, dataset.mean_length, total_steps, total_sequences)


def _setting(name: str) -> str:
    names = {"schedule_steps": "the length of the run, with it of the learning-rate schedule,", "data": "the data"}
    return names.get(name, f"--{name}")


def announce(args: argparse.Namespace, config: LlamaConfig, dataset: PackedDataset, plan: Plan, attention: str) -> None:
    """Prints what is about to run, in a few lines on rank 0."""
    name = getattr(args, "model_path", None) or args.config
    say(f"model: {name}, {count_parameters(config):,} parameters, {args.mixed_precision}; {attention}")
    say(f"data: {dataset.description}")
    say(describe_layout(args.plugin, plan.layout))
    say(
        f"global batch: {args.batch_size} x {args.accumulation_steps} accumulated x {plan.layout.dp} ranks = "
        f"{plan.global_batch} sequences x {plan.mean_length:.0f} tokens = {plan.tokens_per_step:,} tokens"
    )
    say(f"length: {plan.total_steps:,} optimizer steps, {plan.total_steps * plan.tokens_per_step:,} tokens")


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """Fraction of the peak learning rate for the optimizer step of index `step`: linear up, cosine down to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: OptimizerWrapper, args: argparse.Namespace, state: TrainState, plan: Plan) -> LambdaLR:
    """The schedule at the state's step; a function of the step alone, so that a resume needs nothing else."""
    for group in optimizer.optim.param_groups:
        group["initial_lr"] = args.lr
    schedule = partial(cosine_with_warmup, warmup_steps=args.warmup_steps, total_steps=plan.total_steps)
    return LambdaLR(optimizer.optim, schedule, last_epoch=state.step - 1)


def build_dataloader(
    plugin: Plugin, dataset: PackedDataset, args: argparse.Namespace, state: TrainState, plan: Plan
) -> DataLoader:
    """This rank's batches from the state's position to the end, in the plugin's own data-parallel coordinate."""
    if state.stream is not None:
        dataset.resume(state.stream)
    stop = state.sequences + (plan.total_steps - state.step) * plan.global_batch
    sampler = partial(ShardedSampler, seed=args.seed, start=state.sequences, stop=stop, order=dataset.order)
    loader = plugin.prepare_dataloader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
        prefetch_factor=PREFETCHED_BATCHES if args.num_workers else None,
        pin_memory=torch.cuda.is_available(),
        distributed_sampler_cls=sampler,
        collate_fn=dataset.collate,
    )
    loader.worker_init_fn = _ignore_stop_signals
    return loader


def _ignore_stop_signals(worker: int) -> None:
    """Launchers signal a rank's loader processes with it; they are to last until the rank has saved and ended."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------- loop


class StopRequest:
    """Set by any of STOP_SIGNALS on any rank; the ranks agree on it at the next step. A second SIGINT kills."""

    def __init__(self):
        self.received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.received

    def _receive(self, number, frame) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_same_batch(loader: DataLoader, batch: dict[str, torch.Tensor], data_parallel: int) -> None:
    """Asserts that there is one share of the data a data-parallel rank, and one batch among the ranks of a share."""
    digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (loader.sampler.positions.start, digest))
    by_share = {}
    for number, (share, other) in enumerate(gathered):
        if by_share.setdefault(share, other) != other:
            raise AssertionError(f"rank {number} reads another batch than its model-parallel peers at {share}")
    if len(by_share) != data_parallel:
        raise AssertionError(f"{len(by_share)} shares of the data are read by {data_parallel} data-parallel ranks")


def count_tokens(micro_batches: list[dict[str, torch.Tensor]], layout: Layout) -> tuple[int, int, int]:
    """Labels that count, tokens, and positions with padding, in one optimizer step over all ranks. Collective."""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in micro_batches:
        positions = batch["input_ids"].numel()
        labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        counts += torch.tensor([labels, int(batch.get("token_count", positions)), positions])
    counts = counts.to(get_accelerator().get_current_device())
    dist.all_reduce(counts)
    label_tokens, tokens, positions = (counts // (layout.tp * layout.pp * layout.sp)).tolist()
    return label_tokens, tokens, positions


def train(
    args: argparse.Namespace,
    config: LlamaConfig,
    booster: Booster,
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    lr_scheduler: LambdaLR,
    loader: DataLoader,
    state: TrainState,
    plan: Plan,
    checkpoint: Path | None = None,
    held_out: DataLoader | None = None,
) -> tuple[Path, bool]:
    """Trains from `state` to the end of `plan`; returns the last checkpoint and whether a signal ended the run early.

    Args:
        checkpoint: the one that the run resumes from, to be named if training fails before the next.
        held_out: data to evaluate on, from `evaluation_loader`.

    Raises:
        RunError: the loss or the gradient is no longer finite, data cannot be read, or a checkpoint not be written.
    """
    accelerator = get_accelerator()
    device = accelerator.get_current_device()
    evaluator = PerformanceEvaluator(
        config, round(plan.mean_length), dist.get_world_size(), accelerator.get_device_name()
    )
    metrics = Metrics(args.tensorboard_dir, state.step, plan.total_steps, args.log_interval)
    metrics.describe(state.step, _flags(args), _descriptions(args, config, plan))
    writer = CheckpointWriter(args.save_dir, config, args.keep_checkpoints, args.keep_every)
    stop = StopRequest()
    skipped_in_a_row = 0
    batches = iter(loader)
    first_step = state.step
    evaluator.restart()
    while state.step < plan.total_steps:
        waited = time.perf_counter()
        micro_batches = [_next_batch(batches) for _ in range(args.accumulation_steps)]
        waited = time.perf_counter() - waited
        if state.step == first_step:
            check_same_batch(loader, micro_batches[0], plan.layout.dp)

        for batch in micro_batches:
            if "stream" in batch:
                state.stream = json.loads(batch.pop("stream"))
        label_tokens, tokens, positions = count_tokens(micro_batches, plan.layout)
        loss_sum = forward_backward(booster, model, optimizer, micro_batches, label_tokens)
        totals = torch.tensor([0.0, stop.received, writer.error is not None], dtype=torch.float64, device=device)
        totals[0] = loss_sum / plan.layout.tp
        dist.all_reduce(totals)
        total_loss, stopping, save_failed = totals.tolist()
        loss = total_loss / label_tokens
        if save_failed:
            writer.wait()
        lr = lr_scheduler.get_last_lr()[0]
        if not math.isfinite(loss):
            raise RunError(_diverged(f"loss {loss}", state.step + 1, lr, writer, checkpoint))
        scaler = loss_scaler(optimizer)
        loss_scale = scaler.loss_scale if scaler else 1.0
        grad_norm, skipped = optimizer_step(model, optimizer)
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW or not (skipped or math.isfinite(grad_norm)):
            raise RunError(_diverged(f"gradient norm {grad_norm}", state.step + 1, lr, writer, checkpoint))
        lr_scheduler.step()

        state.step += 1
        state.sequences += plan.global_batch
        state.tokens += tokens
        state.epoch = (state.sequences - 1) // len(loader.dataset)
        state.skipped_steps += skipped
        seconds = time.perf_counter() - evaluator.last
        throughput = evaluator.lap(tokens)
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": None if skipped else grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": throughput.tokens_per_second,
            "tflops": throughput.tflops,
            "mfu": throughput.mfu,
            "data_wait": waited / seconds,
            "padding": 1 - tokens / positions,
            "memory_gb": accelerator.max_memory_allocated() / 1e9,
            "loss_scale": loss_scale,
            "skipped_steps": state.skipped_steps,
        }
        last = state.step == plan.total_steps
        if held_out is not None and not stopping and (last or state.step % args.eval_interval == 0):
            row |= evaluate(booster, model, held_out, plan.layout, stop) or {}
            stopping = "eval_loss" not in row
            evaluator.restart()
        metrics.log(row)
        metrics.note(writer.take_reports())
        if state.step % args.save_interval == 0 or last or stopping:
            writer.save(booster.plugin, model, optimizer, _documents(optimizer, lr_scheduler, state))
            evaluator.restart()
        if stopping:
            break
    writer.wait()
    metrics.note([*writer.take_reports(), *metrics.summary()])
    metrics.close()
    return writer.latest, state.step < plan.total_steps


def nothing_left(state: TrainState, plan: Plan, checkpoint: Path | None, export: Callable[[Path], None]) -> bool:
    """Whether the run had ended: killed after its last checkpoint, or started once more. Then `final` is made anew."""
    if state.step < plan.total_steps:
        return False
    say(f"nothing is left to train: {checkpoint} is the end of the run; more --max_steps or --num_epochs go on")
    if rank() == 0:
        export(checkpoint)
    return True


def conclude(args: argparse.Namespace, checkpoint: Path, export: Callable[[Path], None], interrupted: bool) -> int:
    """Leaves the folder `final`, made by `export` on rank 0; returns the exit status of the run. Collective."""
    checkpoint_utils.on_rank_zero(lambda: export(checkpoint))
    final = args.save_dir / "final"
    say(f"model: {final}, for AutoModelForCausalLM and AutoTokenizer")
    if interrupted:
        say(f"interrupted: the same command with -f latest goes on from {checkpoint}")
    else:
        say(f'try it: {shlex.join(["python", str(GENERATE), "--model", str(final), "--prompt"])} "Once upon a time"')
    return INTERRUPTED if interrupted else 0


def _flags(args: argparse.Namespace) -> dict[str, object]:
    """The run's settings by flag, without the marks that parsing leaves."""
    return {name: value for name, value in vars(args).items() if not name.endswith("_given")}


def _descriptions(args: argparse.Namespace, config: LlamaConfig, plan: Plan) -> dict[str, str]:
    """Markdown by title: what TensorBoard tells of a run beside its flags. Nothing of the environment is in it."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "colossalai", "transformers")
    )
    device = get_accelerator().get_device_name()
    return {
        "model": f"```\n{json.dumps(config.to_diff_dict(), indent=2, default=str)}\n```",
        "plan": f"{describe_layout(args.plugin, plan.layout)}; {plan.total_steps:,} steps of {plan.global_batch:,} "
        f"sequences, {plan.tokens_per_step:,} tokens, {plan.total_steps * plan.tokens_per_step:,} in all",
        "machine": f"{plan.layout.ranks} x {device}; {versions}",
    }


def _next_batch(batches: Iterator[dict]) -> dict[str, torch.Tensor]:
    try:
        return next(batches)
    except (InputError, RunError) as error:  # a loader process puts its traceback before it
        last = str(error).strip().splitlines()[-1]
        raise RunError(re.sub(r"^console\.\w+: ", "", last)) from error


def _documents(optimizer: OptimizerWrapper, lr_scheduler: LambdaLR, state: TrainState) -> dict[str, dict]:
    """The JSON files of a checkpoint."""
    running_states = asdict(state) | {
        "adam_steps": state.adam_steps,
        "loss_scaler": checkpoint_utils.loss_scaler_state(optimizer),
    }
    schedule = {"last_epoch": lr_scheduler.last_epoch, "base_lrs": lr_scheduler.base_lrs}
    return {checkpoint_utils.RUNNING_STATES: running_states, checkpoint_utils.LR_SCHEDULER: schedule}


def _diverged(what: str, step: int, lr: float, writer: CheckpointWriter, checkpoint: Path | None) -> str:
    writer.wait()
    last = writer.latest or checkpoint
    resume = f"resume from {last}" if last else "no checkpoint was saved yet; start again"
    return f"{what} at step {step}, learning rate {lr:.3e}: training stopped; {resume}, with a lower --lr or other data"
