"""Schedule, batches and the training loop that pretraining and fine-tuning share."""

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing.connection
import re
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from arguments import settings
from checkpoint_writer import CheckpointWriter
from collectives import gather, on_rank_zero
from console import InputError, RunError, rank, say
from data_order import ShardedSampler, TrainingData, splitmix64
from data_utils import IGNORE_INDEX
from evaluation import evaluate
from gemini import may_evaluate
from layout import Layout, describe_layout
from metrics import Metrics
from performance_evaluator import PerformanceEvaluator
from run_plan import Plan, TrainState
from signals import INTERRUPTED, StopRequest, follow_rank
from training_step import forward_backward, loss_scaler, optimizer_step

MIN_LR_RATIO = 0.1  # the cosine ends at a tenth of the peak (LLaMA, arXiv:2302.13971, section 2.3)
MAX_SKIPPED_IN_A_ROW = 50
PREFETCHED_BATCHES = 8  # by each loader process: a long document in a stream takes longer than a step of a small model
ENDING_SECONDS = 2  # for a loader process
GENERATE = Path("scripts", "generate.py")


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
    plugin: Plugin, dataset: TrainingData, args: argparse.Namespace, state: TrainState, plan: Plan
) -> DataLoader:
    """This rank's batches from the state's position to the end, in the plugin's own data-parallel coordinate."""
    if state.stream is not None:
        dataset.resume(state.stream)  # type: ignore[attr-defined]  # a stream has a position of its own
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
    loader.worker_init_fn = follow_rank
    return loader


def check_same_batch(loader: DataLoader, batch: dict[str, torch.Tensor], data_parallel: int) -> None:
    """Asserts that there is one share of the data a data-parallel rank, and one batch among the ranks of a share."""
    digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
    first = loader.sampler.positions.start  # type: ignore[attr-defined]
    by_share: dict[int, str] = {}
    for number, (share, other) in enumerate(gather((first, digest))):
        if by_share.setdefault(share, other) != other:
            raise AssertionError(f"rank {number} reads another batch than its model-parallel peers at {share}")
    if len(by_share) != data_parallel:
        raise AssertionError(f"{len(by_share)} shares of the data are read by {data_parallel} data-parallel ranks")


def step_seed(seed: int, step: int) -> int:
    """Of this rank's random numbers in a step, dropout's: nothing has to be saved for a resume to draw the same.

    All ranks differ, model-parallel ones too, whose attention heads are other ones. A layer whose activations are
    recomputed draws its numbers again by itself.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ rank())


def next_batches(batches: Iterator[dict], number: int) -> tuple[list[dict], str | None]:
    """The micro-batches of a step, or none and the reason, whatever it is: the other ranks wait for this one."""
    try:
        return [next(batches) for _ in range(number)], None
    except Exception as error:
        processes = getattr(batches, "_workers", ())
        # One that is killed loses its connections, which may be what is reported, a moment before it has ended.
        sentinels = [process.sentinel for process in processes]
        ending = multiprocessing.connection.wait(sentinels, timeout=ENDING_SECONDS)
        for process in processes:
            if process.sentinel in ending:
                process.join()
            if process.exitcode:
                return [], f"a loader process, {process.pid}, {_end_of(process.exitcode)}"
        if not isinstance(error, InputError | RunError | OSError):
            traceback.print_exc()
        # A loader process puts its traceback before it.
        last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return [], re.sub(r"^console\.\w+: ", "", last_line)


def _end_of(status: int) -> str:
    """Describe the end of a process by its exit status, as `multiprocessing` has it."""
    if status > 0:
        return f"ended with status {status}"
    number = signal.Signals(-status)
    causes = {signal.SIGKILL: "out of host memory?", signal.SIGBUS: "a file that cannot be read, or /dev/shm full?"}
    return f"was killed by {number.name}; {causes.get(number, 'see its own message')}"


def count_tokens(micro_batches: list[dict[str, torch.Tensor]], layout: Layout) -> tuple[int, int, int, int]:
    """In one optimizer step, over all ranks: labels that count, tokens, positions with padding; ranks without a batch.

    Collective.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    counts[3] = not micro_batches
    for batch in micro_batches:
        positions = batch["input_ids"].numel()
        labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        counts[:3] += torch.tensor([labels, int(batch.get("token_count", positions)), positions])
    counts = counts.to(get_accelerator().get_current_device())
    dist.all_reduce(counts)
    failed = int(counts[3])
    return *(counts[:3] // (layout.tp * layout.pp * layout.sp)).tolist(), failed


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
    done = state.step - bool(state.unevaluated)
    metrics = Metrics(args.tensorboard_dir, args.save_dir, done, plan.total_steps, args.log_interval)
    metrics.describe(state.step, settings(args), _descriptions(args, config, plan))
    stop = StopRequest()
    if checkpoint and state.unevaluated:
        evaluation: dict[str, float] | None = {}
        if held_out and may_evaluate(model):
            evaluation = evaluate(booster, model, held_out, plan.layout, stop)
        elif held_out:
            metrics.note(
                [f"evaluation: that of step {state.step} is left out: {args.plugin} has to train a step first"]
            )
        metrics.log(state.unevaluated | (evaluation or {}))
        if evaluation is None:
            return checkpoint, True
        state.unevaluated = None
    skipped_in_a_row = 0
    batches = iter(loader)
    # torch's handler would raise anywhere, inside a collective operation too; next_batches sees that a process is gone.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first_step = state.step
    if first_step and config.attention_dropout:
        say("dropout: goes on as it would have if ranks and layout are the same; with others it draws other masks")
    if state.step < plan.total_steps:
        micro_batches, broken = next_batches(batches, args.accumulation_steps)
    evaluator.restart()
    with CheckpointWriter(args.save_dir, config, args.keep_checkpoints, args.keep_every, latest=checkpoint) as writer:
        while state.step < plan.total_steps:
            label_tokens, tokens, positions, without_batch = count_tokens(micro_batches, plan.layout)
            if without_batch:
                if state.step > first_step and state.step % args.save_interval:
                    writer.save(booster.plugin, model, optimizer, _documents(optimizer, lr_scheduler, state))
                writer.wait()
                metrics.note(writer.take_reports())
                reason = next(text for text in gather(broken) if text)
                raise RunError(f"{reason}; {writer.how_to_resume}")
            if state.step == first_step:
                check_same_batch(loader, micro_batches[0], plan.layout.dp)

            for batch in micro_batches:
                if "stream" in batch:
                    state.stream = json.loads(batch.pop("stream"))
            torch.manual_seed(step_seed(args.seed, state.step))
            loss_sum = torch.zeros(())
            if label_tokens:
                loss_sum = forward_backward(booster, model, optimizer, micro_batches, label_tokens)
            launched = accelerator.Event()
            launched.record()
            waited = time.perf_counter()
            if state.step + 1 < plan.total_steps:  # while the GPU works; a resume starts from what was trained
                micro_batches, broken = next_batches(batches, args.accumulation_steps)
            waited = time.perf_counter() - waited if launched.query() else 0.0
            totals = torch.tensor([0.0, stop.received, writer.error is not None], dtype=torch.float64, device=device)
            totals[0] = loss_sum / plan.layout.tp
            dist.all_reduce(totals)
            total_loss, stopping, save_failed = totals.tolist()
            loss = total_loss / label_tokens if label_tokens else None
            if save_failed:
                writer.wait()
            lr = float(lr_scheduler.get_last_lr()[0])
            if loss is not None and not math.isfinite(loss):
                raise RunError(_diverged(f"loss {loss}", state.step + 1, lr, writer))
            scaler = loss_scaler(optimizer)
            loss_scale = scaler.loss_scale if scaler else 1.0
            grad_norm, skipped = math.inf, True  # nothing is learnt where no label counts
            if label_tokens:
                grad_norm, skipped = optimizer_step(model, optimizer)
                skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW or not (skipped or math.isfinite(grad_norm)):
                raise RunError(_diverged(f"gradient norm {grad_norm}", state.step + 1, lr, writer))
            lr_scheduler.step()

            state.step += 1
            state.sequences += plan.global_batch
            state.tokens += tokens
            state.epoch = (state.sequences - 1) // len(loader.dataset)  # type: ignore[arg-type]
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
            if held_out is not None and may_evaluate(model) and (last or state.step % args.eval_interval == 0):
                evaluation = None if stopping else evaluate(booster, model, held_out, plan.layout, stop)
                state.unevaluated = row if evaluation is None else None
                stopping = evaluation is None
                row |= evaluation or {}
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
    assert writer.latest is not None  # the last step saves
    return writer.latest, state.step < plan.total_steps or state.unevaluated is not None


def nothing_left(
    args: argparse.Namespace, state: TrainState, plan: Plan, checkpoint: Path | None, export: Callable[[Path], None]
) -> bool:
    """Return True if the run had ended: killed after its last checkpoint, or started once more. Makes `final` anew.

    Collective.
    """
    if checkpoint is None or state.step < plan.total_steps or state.unevaluated:
        return False
    say(f"nothing is left to train: {checkpoint} is the end of the run; more --max_steps or --num_epochs go on")
    checkpoint_utils.refuse_damaged(checkpoint)
    conclude(args, checkpoint, export, interrupted=False)
    return True


def conclude(args: argparse.Namespace, checkpoint: Path, export: Callable[[Path], None], interrupted: bool) -> int:
    """Leaves the folder `final`, made by `export` on rank 0; returns the exit status of the run. Collective."""
    final = args.save_dir / "final"
    on_rank_zero(lambda: export(checkpoint), f"{final} could not be made of {checkpoint}; make room and resume")
    say(f"model: {final}, for AutoModelForCausalLM and AutoTokenizer")
    if interrupted:
        say(f"interrupted: the same command with -f latest goes on from {checkpoint}")
    else:
        say(f'try it: {shlex.join(["python", str(GENERATE), "--model", str(final), "--prompt"])} "Once upon a time"')
    return INTERRUPTED if interrupted else 0


def _descriptions(args: argparse.Namespace, config: LlamaConfig, plan: Plan) -> dict[str, str]:
    """Markdown by title: what TensorBoard tells of a run beside its flags. Nothing of the environment is in it."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "colossalai", "transformers")
    )
    device = get_accelerator().get_device_name()
    return {
        "model": f"```\n{json.dumps(config.to_diff_dict(), indent=2, default=str)}\n```",
        "plan": f"{describe_layout(args.plugin, plan.layout)}; {plan.total_steps:,} steps of {plan.global_batch:,} "
        f"sequences, {plan.tokens_per_step:,} tokens, {plan.total_tokens:,} in all",
        "machine": f"{plan.layout.ranks} x {device}; {versions}",
    }


def _documents(optimizer: OptimizerWrapper, lr_scheduler: LambdaLR, state: TrainState) -> dict[str, dict]:
    """The JSON files of a checkpoint."""
    running_states = asdict(state) | {
        "adam_steps": state.adam_steps,
        "loss_scaler": checkpoint_utils.loss_scaler_state(optimizer),
    }
    schedule = {"last_epoch": lr_scheduler.last_epoch, "base_lrs": lr_scheduler.base_lrs}
    return {checkpoint_utils.RUNNING_STATES: running_states, checkpoint_utils.LR_SCHEDULER: schedule}


def _diverged(what: str, step: int, lr: float, writer: CheckpointWriter) -> str:
    writer.wait()
    where = f"{what} at step {step}, learning rate {lr:.3e}"
    return f"{where}: training stopped; {writer.how_to_resume}, with a lower --lr or other data"
