"""The training loop that pretraining and fine-tuning share."""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from checkpointing.writer import CheckpointWriter
from corpus.order import splitmix64
from engine.boost import Engine
from engine.compilation import forget_shapes
from engine.device import current_device, device_name
from engine.layout import describe_layout
from engine.step import forward_backward, loss_scaler, optimizer_step
from engine.waits import waiting
from model_utils import model_flops_per_token
from planning.throughput import PerformanceEvaluator
from runtime.collectives import gather
from runtime.console import RunError, rank, say
from runtime.process import StopRequest
from runtime.watchdog import REDUCE, Watchdog, mark
from training.announcements import stage_lines
from training.batches import Batches, StepBatch
from training.evaluation import evaluate
from training.goodput import EVALUATIONS, SAVES, StepSeconds, describe, first_start, spend
from training.inspection import Inspector
from training.legs import Leg
from training.metrics import Metrics, StepResult, step_row
from training.plan import Plan
from training.run import Run, TrainState
from training.schedule import build_scheduler
from training.spikes import remember
from training.step_times import StepTimes
from training.task_evaluator import TaskEvaluator

MAX_SKIPPED_IN_A_ROW = 50


def train(
    engine: Engine,
    run: Run,
    plan: Plan,
    state: TrainState,
    batches: Batches,
    held_out: Mapping[int, Mapping[str, DataLoader[Any]]],
    writer: CheckpointWriter,
    inspector: Inspector,
    tasks: TaskEvaluator,
) -> tuple[Path, bool]:
    """Train from `state` to the end of `plan`.

    Args:
        held_out: for each stage, data to evaluate on by name, from `evaluation_loader`.
        writer: its `latest` is the checkpoint that the run resumes from, if any.

    Returns:
        The last checkpoint, and True if a signal ended the run early.

    Raises:
        RunError: the loss or the gradient is not finite, data cannot be read, or a checkpoint cannot be written.
    """
    metrics, stop = open_metrics(run, plan, state), StopRequest()
    evaluated = held_out[plan.legs[0].number]
    if writer.latest and state.unevaluated and not _catch_up(engine, run, state, evaluated, metrics, stop):
        return writer.latest, True
    if run.outputs.eval_first and not state.step:
        _evaluate_first(engine, evaluated, metrics, stop)
    if state.step and engine.config.attention_dropout:
        say("dropout: draws the masks of an uninterrupted run only if ranks and layout are the same as before")
    scheduler = build_scheduler(engine, state.step, plan.curve)
    if state.step < plan.total_steps:
        batches.prefetch()
    watchdog = Watchdog(run.outputs.hang_timeout, run.outputs.tensorboard_dir)
    times, turn = StepTimes(engine, run.outputs.log_interval), Turn(engine)
    speed, seconds = turn.into(plan.leg_at(state.step), state, watchdog, times, metrics)
    with writer:
        guard, first_step = Guard(writer), state.step
        while state.step < plan.total_steps:
            leg = plan.leg_at(state.step)
            if leg is not turn.leg:
                speed, seconds = turn.into(leg, state, watchdog, times, metrics)
            watchdog.begin(state.step + 1)
            times.begin(state.step + 1)
            inspector.begin(state.step + 1)
            batch = batches.take()
            if batch.ranks_without:
                unsaved = state.step > first_step and not plan.saves_after(state.step, run.retention)
                _end_without_data(state if unsaved else None, batch, writer, metrics)
            torch.manual_seed(step_seed(run.job.seed, state.step))
            loss_sum = torch.zeros(())
            if batch.label_tokens:
                loss_sum = forward_backward(engine, batch.micro_batches, batch.label_tokens)
            if state.step + 1 < plan.total_steps:
                batches.prefetch()
            agreed = agree(engine, loss_sum, stop.received, writer.error is not None, times)
            if agreed.save_failed:
                writer.wait()
            result = _update(engine, run, scheduler, agreed.loss_sum, batch.label_tokens, guard, state)
            scheduler.step()
            times.end(batches.waited)
            plan.advance(state, batch.tokens, batch.stream, result.skipped)
            lap = speed.lap(batch.tokens)
            seconds.add(state, lap.seconds, batches.waited)
            row = step_row(state, result, lap, batches.waited, batch.padding) | times.figures
            row |= {"stage": leg.number} if run.stages.later else {}

            last, stopping = state.step == plan.total_steps, agreed.stopping
            due = last or state.step % run.outputs.eval_interval == 0
            if (evaluated := held_out[leg.number]) and due and engine.may_evaluate:
                stopping = not _evaluate(engine, evaluated, state, row, stop if not stopping else None)
                spend(state, EVALUATIONS, speed.restart())
            metrics.log(row)
            metrics.note([*times.reports, *inspector.end(state.step), *writer.take_reports()])
            tasks.log(metrics)
            if plan.saves_after(state.step, run.retention) or last or stopping:
                writer.save(state.saved())
                spend(state, SAVES, speed.restart())
            if stopping:
                break
        writer.wait()
        spend(state, SAVES, speed.restart())
        metrics.note([*writer.take_reports(), *metrics.summary(), describe(state)])
    tasks.take_over(metrics, stop)
    assert writer.latest is not None  # the last step saves
    return writer.latest, state.step < plan.total_steps or state.unevaluated is not None


def open_metrics(run: Run, plan: Plan, state: TrainState) -> Metrics:
    """Open the logs and describe the run in TensorBoard, without environment variables, which may hold secrets."""
    outputs = run.outputs
    done = state.step - bool(state.unevaluated)
    state.started = state.started or first_start(outputs)
    folder, save_dir = outputs.tensorboard_dir, outputs.save_dir
    total_steps, total_tokens = plan.total_steps, plan.total_tokens
    metrics = Metrics(folder, save_dir, done, total_steps, total_tokens, outputs.log_interval, state.started)
    names = ("torch", "colossalai", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    texts = {
        "model": f"```\n{json.dumps(run.job.config.to_diff_dict(), indent=2, default=str)}\n```",
        "plan": f"{describe_layout(plan.layout)}; {plan.total_steps:,} steps of {plan.global_batch:,} sequences, "
        f"{plan.tokens_per_step:,} tokens, {plan.total_tokens:,} in all",
        "machine": f"{plan.layout.ranks} x {device_name()}; {versions}",
    }
    if run.stages.later:
        texts["stages"] = "\n".join(["```", *stage_lines(plan, run.job.optimization.lr), "```"])
    settled = run.settings(plan.curve) | asdict(run.job.compute) | asdict(run.job.exchange)
    metrics.describe(state.step, run.flags | settled, texts)
    if outputs.wandb:
        metrics.open_wandb(outputs.wandb, outputs.run_name or save_dir.name, run.flags | settled)
    return metrics


class Turn:
    """The turn from one leg to the next, whose batches may have another shape, and whose steps take another time."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.leg: Leg | None = None

    def into(
        self, leg: Leg, state: TrainState, watchdog: Watchdog, times: StepTimes, metrics: Metrics
    ) -> tuple[PerformanceEvaluator, StepSeconds]:
        """Begin a leg, and return the measures of its speed and of its seconds that count."""
        engine, before, self.leg = self.engine, self.leg, leg
        if leg.number and leg.began == state.step:
            metrics.note([f"stage {leg.number} begins after step {state.step:,}"])
            state.window.clear()  # a loss on other data is no spike
        if before is not None:
            watchdog.restart()
            if (before.batch.batch_size, before.batch.max_length) != (leg.batch.batch_size, leg.batch.max_length):
                times.first = True
                forget_shapes(engine.fusion)
        length = round(leg.dataset.mean_length)
        flops = model_flops_per_token(engine.config, length, engine.job.adapters is not None)
        return PerformanceEvaluator(flops, dist.get_world_size(), device_name()), StepSeconds()


class Agreement(NamedTuple):
    """Facts about a step that all ranks must share before the update."""

    loss_sum: float  # over all ranks
    stopping: bool  # any rank has received a signal
    save_failed: bool  # any rank could not write its part of a checkpoint


def agree(
    engine: Engine, loss_sum: torch.Tensor, stopping: bool, save_failed: bool, times: StepTimes | None = None
) -> Agreement:
    """Combine the ranks' losses, signals, failures and times in one all-reduce. Collective."""
    mark(REDUCE)
    own = [0.0, stopping, save_failed, *(times.to_exchange() if times else ())]
    totals = torch.tensor(own, dtype=torch.float64, device=current_device())
    totals[0] = loss_sum / engine.layout.tp
    with waiting():
        dist.all_reduce(totals)
    loss, stops, failures, *seconds = totals.tolist()
    if times:
        times.exchanged(seconds)
    return Agreement(loss, stops > 0, failures > 0)


@dataclass
class Guard:
    """End the run if its loss or gradient is not finite, or too many steps in a row overflow."""

    writer: CheckpointWriter
    skipped_in_a_row: int = 0

    def check_loss(self, loss: float | None, step: int, lr: float) -> None:
        if loss is not None and not math.isfinite(loss):
            self._end(f"loss {loss}", step, lr)

    def check_update(self, grad_norm: float, skipped: bool, step: int, lr: float) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW or not (skipped or math.isfinite(grad_norm)):
            self._end(f"gradient norm {grad_norm}", step, lr)

    def _end(self, reason: str, step: int, lr: float) -> None:
        self.writer.wait()
        failure = f"{reason} at step {step}, learning rate {lr:.3e}"
        raise RunError(f"{failure}: training stopped; {self.writer.how_to_resume}, with a lower --lr or other data")


def _update(
    engine: Engine,
    run: Run,
    scheduler: LambdaLR,
    loss_sum: float,
    label_tokens: int,
    guard: Guard,
    state: TrainState,
) -> StepResult:
    """Clip the gradients and update the weights; skip a step without labels that count, and a spike."""
    step, lr = state.step + 1, float(scheduler.get_last_lr()[0])
    scaler = loss_scaler(engine)
    loss_scale = scaler.loss_scale if scaler else 1.0
    if not label_tokens:
        return StepResult(None, lr, math.inf, True, loss_scale)
    loss = loss_sum / label_tokens
    guard.check_loss(loss, step, lr)
    spikes = partial(run.spikes.spikes, state.window, loss)
    grad_norm, skipped = optimizer_step(engine, spikes if run.spikes.skip_spikes else None)
    spike = skipped and math.isfinite(grad_norm)
    guard.check_update(grad_norm, skipped and not spike, step, lr)
    if math.isfinite(grad_norm):
        remember(state.window, loss, grad_norm)
    state.spikes += spike
    return StepResult(loss, lr, grad_norm, skipped, loss_scale)


def _evaluate(
    engine: Engine,
    held_out: Mapping[str, DataLoader[Any]],
    state: TrainState,
    row: dict[str, Any],
    stop: StopRequest | None,
) -> bool:
    """Evaluate, and add the loss on held-out data to the step's row.

    Args:
        stop: None if the run is stopping already.

    Returns:
        False if a signal interrupted it; the state then keeps the row, and a resume evaluates.
    """
    evaluation = evaluate(engine, held_out, stop) if stop else None
    state.unevaluated = row if evaluation is None else None
    row |= evaluation or {}
    return evaluation is not None


def _evaluate_first(
    engine: Engine, held_out: Mapping[str, DataLoader[Any]], metrics: Metrics, stop: StopRequest
) -> None:
    """Evaluate the weights that training starts from. A signal interrupts it, and ends the run after the first step."""
    if not engine.may_evaluate:
        say("--eval_first: left out, since gemini with offloading evaluates only after its first training step")
    elif evaluation := evaluate(engine, held_out, stop):
        metrics.log_start(evaluation)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of this rank's random numbers, which dropout draws, in a step.

    It depends only on seed, step and rank, so a resume draws the same numbers. It differs on all ranks, even
    model-parallel ones, since they hold different attention heads. Recomputed layers restore their random state.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ rank())


def _catch_up(
    engine: Engine,
    run: Run,
    state: TrainState,
    held_out: Mapping[str, DataLoader[Any]],
    metrics: Metrics,
    stop: StopRequest,
) -> bool:
    """Run the evaluation that a signal interrupted in the run before; return False if one interrupts it again."""
    assert state.unevaluated is not None
    evaluation: dict[str, float] | None = {}
    if held_out and engine.may_evaluate:
        evaluation = evaluate(engine, held_out, stop)
    elif held_out:
        plugin = engine.layout.plugin
        metrics.note([f"evaluation: skipped for step {state.step}: {plugin} must train a step first"])
    metrics.log(state.unevaluated | (evaluation or {}))
    if evaluation is None:
        return False
    state.unevaluated = None
    return True


def _end_without_data(unsaved: TrainState | None, batch: StepBatch, writer: CheckpointWriter, metrics: Metrics) -> None:
    """Save the `unsaved` state, if any, and raise RunError with the reason why a rank has no data. Collective."""
    if unsaved:
        writer.save(unsaved.saved())
    writer.wait()
    metrics.note(writer.take_reports())
    reason = next(text for text in gather(batch.error) if text)
    raise RunError(f"{reason}; {writer.how_to_resume}")
