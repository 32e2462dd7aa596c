"""One optimizer step: the loss over tokens, forward and backward under any plugin, clipping and the update."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.pipeline.schedule import InterleavedSchedule, PipelineSchedule

from attn import document_boundaries
from engine import compilation
from engine.boost import Engine
from engine.loss import summed_cross_entropy
from engine.patching import replace
from model_utils import IGNORE_INDEX
from runtime import watchdog


def token_loss(logits: torch.Tensor, labels: torch.Tensor, engine: Engine) -> torch.Tensor:
    """Return the cross-entropy of the next token, in float32, summed over the labels that count.

    Its backward pass overwrites the logits.

    Args:
        logits: [B, S, V], or this rank's part: S/sp positions under sequence parallelism, V/tp columns under tensor
            parallelism. Under the latter perhaps all tokens as one sequence, with further rows at the end.
        labels: [B, S], unshifted and whole; IGNORE_INDEX does not count.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    shard_config = getattr(engine.plugin, "shard_config", None)
    if shard_config is not None and shard_config.enable_sequence_parallelism:
        group = shard_config.sequence_parallel_process_group
        targets = targets.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]
    logits, targets = compilation.plain(logits).flatten(0, 1), targets.flatten()
    targets = F.pad(targets, (0, len(logits) - len(targets)), value=IGNORE_INDEX)
    group = None
    if shard_config is not None and shard_config.enable_tensor_parallelism:
        group = shard_config.tensor_parallel_process_group
    return summed_cross_entropy(logits, targets, group, compiled=engine.fusion is not compilation.Fusion.NONE)


def _model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's arguments for a batch on the host."""
    inputs = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
        inputs["attention_mask"] = document_boundaries(batch["position_ids"])
    return inputs


def _on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = get_accelerator().get_current_device()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _batch_loss(engine: Engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = _on_device({**_model_inputs(batch), "labels": batch["labels"]})
    labels = inputs.pop("labels")
    return token_loss(engine.model(**inputs).logits, labels, engine)


def _concatenated(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate batches, padded on the right to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.cat([F.pad(batch[name], (0, longest - batch[name].shape[1]), value=filler) for batch in batches])

    fillers = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {name: padded(name, filler) for name, filler in fillers.items() if name in batches[0]}


_kinds_of_batch: weakref.WeakKeyDictionary[PipelineSchedule, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _begin_batch(schedule: PipelineSchedule, batch: dict[str, torch.Tensor]) -> None:
    """Let a schedule take batches of another shape, and switch between training and evaluation.

    Symptom: after an evaluation, or in a stage of another length, the schedule refuses the batches, or stages deadlock.
    Cause: it keeps the number of microbatches, and the metadata of the tensors that stages exchange. With its metadata
        cache off, so that lengths may vary, InterleavedSchedule's last range of layers sends no new metadata.
    Fix: reset these fields when the kind of batch changes.
    Remove when: the schedules reset them in load_batch.
    """
    kind = (batch["input_ids"].shape, torch.is_grad_enabled())
    if kind == _kinds_of_batch.get(schedule):
        return
    _kinds_of_batch[schedule] = kind
    fields = {
        "num_microbatch" if isinstance(schedule, InterleavedSchedule) else "num_microbatches": None,
        "last_batch_size": len(batch["input_ids"]),
        "tensor_metadata_recv": None,
        "grad_metadata_recv": None,
        "send_tensor_metadata": True,
        "send_grad_metadata": True,
    }
    for name, value in fields.items():
        replace(schedule, name, value)


def _pipeline_loss(
    engine: Engine, micro_batches: list[dict[str, torch.Tensor]], scale: float, train: bool = True
) -> torch.Tensor:
    """Return the sum of all batches' token losses, times `scale`; zero on stages before the last."""
    plugin = engine.plugin
    batch = _concatenated(micro_batches)
    _begin_batch(plugin.scheduler, batch)
    # If they were named `labels`, the model would compute a second loss.
    inputs = _on_device({**_model_inputs(batch), "criterion_labels": batch["labels"]})
    microbatches = len(batch["input_ids"]) // plugin.scheduler.microbatch_size

    def criterion(outputs: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        # Undo the schedule's division by the number of microbatches.
        return token_loss(outputs.logits, inputs["criterion_labels"], engine) * scale * microbatches

    optimizer = engine.optimizer if train else None
    loss = engine.booster.execute_pipeline(iter([inputs]), engine.model, criterion, optimizer, return_loss=True)["loss"]
    return torch.zeros((), device=get_accelerator().get_current_device()) if loss is None else loss.detach()


def forward_backward(engine: Engine, micro_batches: list[dict[str, torch.Tensor]], label_tokens: int) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over one optimizer step's tokens.

    Args:
        micro_batches: this rank's batches of the step, on the host: `input_ids` and `labels`, [B, S]. If sequences hold
            several documents, also `position_ids`, [B, S], which restart at 0 with each document (see attn.py).
        label_tokens: number of labels that count in the step, over all ranks and micro-batches. The summed loss is
            divided by it, so that layout and accumulation do not change the result.

    Returns:
        This rank's sum of token losses, a scalar; zero on pipeline stages before the last.
    """
    scale = engine.layout.gradient_ranks / label_tokens

    if engine.layout.pp > 1:
        watchdog.mark(f"{watchdog.FORWARD} and {watchdog.BACKWARD}")
        return _pipeline_loss(engine, micro_batches, scale) / scale

    total = torch.zeros((), device=get_accelerator().get_current_device())
    for micro in micro_batches:
        watchdog.mark(watchdog.FORWARD)
        loss = _batch_loss(engine, micro)
        watchdog.mark(watchdog.BACKWARD)
        engine.booster.backward(loss * scale, engine.optimizer)
        total += loss.detach()
    return total


def forward_loss(engine: Engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return this rank's sum of token losses for one of `forward_backward`'s batches, without gradients."""
    with torch.no_grad():
        if engine.layout.pp == 1:
            return _batch_loss(engine, batch)
        with engine.model.no_sync():  # or the plugin would exchange gradients, which do not exist
            return _pipeline_loss(engine, [batch], 1.0, train=False)


def loss_scaler(engine: Engine) -> FP16MixedPrecisionMixin | None:
    """Return the dynamic loss scale under fp16; None under bf16 and fp32."""
    mixin = engine.module.precision_mixin(engine.optimizer)
    return mixin if isinstance(mixin, FP16MixedPrecisionMixin) else None


def optimizer_step(engine: Engine, rejects: Callable[[float], bool] | None = None) -> tuple[float, bool]:
    """Clip and update.

    Args:
        rejects: called with the gradient norm before clipping; True skips the update. Weights, moments and Adam's step
            count then stay as they are; fp16's loss scale counts a step without an overflow.

    Returns:
        The norm, infinite if fp16 overflowed, and True if the update was skipped.
    """
    watchdog.mark(watchdog.UPDATE)
    engine.copies.protect()
    scaler = loss_scaler(engine)
    scale = scaler.loss_scale if scaler else 1.0
    rejected = False

    def judge(scaled_norm: float) -> bool:
        nonlocal rejected
        rejected = rejects is not None and rejects(scaled_norm / scale)
        return rejected

    norm = engine.module.step(engine.optimizer, judge if rejects else None)
    overflowed = bool(scaler.found_overflow.item()) if scaler else False
    engine.optimizer.zero_grad()
    return (math.inf if overflowed else norm / scale), overflowed or rejected


def loss_scaler_state(engine: Engine) -> dict[str, Any] | None:
    """Return the dynamic loss scale and its counters under fp16; None under bf16 and fp32."""
    mixin = loss_scaler(engine)
    if mixin is None:
        return None
    scaler = mixin.grad_scaler
    return {
        "scale": scaler.scale.item(),
        "growth_step": scaler._growth_step,
        "hysteresis_step": scaler._hysteresis_step,
    }


def restore_loss_scaler(engine: Engine, state: dict[str, Any] | None) -> None:
    """Set the loss scale and its counters to what `loss_scaler_state` returned, if both runs have them."""
    mixin = loss_scaler(engine)
    if mixin is not None and state is not None:
        scaler = mixin.grad_scaler
        scaler._scale.fill_(state["scale"])
        scaler._growth_step, scaler._hysteresis_step = state["growth_step"], state["hysteresis_step"]
