"""Schedule, batches and the training loop that pretraining and fine-tuning share."""

import argparse
import importlib.metadata
import json
import math
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.interface import ModelWrapper, OptimizerWrapper
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from checkpointing import folder, reader
from checkpointing.writer import CheckpointWriter
from corpus.order import splitmix64
from engine.gemini import may_evaluate
from engine.layout import describe_layout
from engine.step import forward_backward, loss_scaler, optimizer_step
from planning.throughput import PerformanceEvaluator
from runtime.collectives import gather, on_rank_zero
from runtime.console import RunError, rank, say
from runtime.process import INTERRUPTED, StopRequest
from training.batches import check_same_batch, count_tokens, next_batches
from training.evaluation import evaluate
from training.flags import settings
from training.metrics import Metrics
from training.plan import Plan, TrainState

MAX_SKIPPED_IN_A_ROW = 50
GENERATE = Path("scripts", "generate.py")


def step_seed(seed: int, step: int) -> int:
    """Of this rank's random numbers in a step, dropout's: nothing has to be saved for a resume to draw the same.

    All ranks differ, model-parallel ones too, whose attention heads are other ones. A layer whose activations are
    recomputed draws its numbers again by itself.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ rank())


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
    reader.refuse_damaged(checkpoint)
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
        "loss_scaler": folder.loss_scaler_state(optimizer),
    }
    schedule = {"last_epoch": lr_scheduler.last_epoch, "base_lrs": lr_scheduler.base_lrs}
    return {folder.RUNNING_STATES: running_states, folder.LR_SCHEDULER: schedule}


def _diverged(what: str, step: int, lr: float, writer: CheckpointWriter) -> str:
    writer.wait()
    where = f"{what} at step {step}, learning rate {lr:.3e}"
    return f"{where}: training stopped; {writer.how_to_resume}, with a lower --lr or other data"
