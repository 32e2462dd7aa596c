"""Activation checkpointing (arXiv:1604.06174): chosen decoder layers keep their input alone and are computed twice."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaForCausalLM

from engine.compilation import plain
from engine.job import Job, reenters
from engine.patching import replace


def recomputed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Keep the inputs alone, and call the function once more in the backward pass."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def recomputed_but_attention(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Recompute all but the output of a fused attention kernel, which runs once."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keeping_attention, **kwargs)


def _keeping_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # aten._scaled_dot_product_cudnn_attention and its like, torch_attn._varlen_attn, flash_attn._flash_attn_forward
    kept = "_attention" in str(operator) or "_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed_in_another_pass(function: Callable, *args: Any) -> Any:
    """Recompute in a backward pass inside the backward pass, for plugins that need it (see `reenters`)."""
    return checkpoint(function, *args, use_reentrant=True)


def checkpoint_function(job: Job) -> Callable:
    """Return the function that calls a layer whose activations are recomputed."""
    if reenters(job.layout):
        return recomputed_in_another_pass
    return recomputed_but_attention if job.compute.keep_attention else recomputed


def checkpoint_layers(model: LlamaForCausalLM, layers: set[int], function: Callable = recomputed) -> None:
    """Checkpoint the activations of these decoder layers: keep each one's input, and compute the rest once more.

    Each layer carries the function as `checkpoint_function`; where layers are compiled, the compiled layer takes it
    over (compilation.py).

    Symptom: --recompute and --keep_attention would have no effect: all layers are recomputed in one way, or none.
    Cause: transformers calls every layer by the one function that gradient_checkpointing_enable sets.
    Fix: that function calls each layer as the layer's mark says.
    Remove when: transformers takes a function for each layer.

    Args:
        function: calls the layer, with the layer's own function and its inputs.
    """
    if not layers:
        return
    model.gradient_checkpointing_enable()
    if function is recomputed_in_another_pass:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda layer, inputs, outputs: tuple(map(plain, outputs)))
    for index, layer in enumerate(model.model.layers):
        layer.checkpoint_function = function if index in layers else None

    def call_layer(call: Any, *inputs: Any) -> Any:
        bound: Any = call.func if isinstance(call, partial) else call
        checkpoint_function = bound.__self__.checkpoint_function
        return checkpoint_function(call, *inputs) if checkpoint_function else call(*inputs)

    replace(model.model, "_gradient_checkpointing_func", call_layer)
