"""Activation checkpointing (arXiv:1604.06174): chosen decoder layers keep only their input and are computed twice."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import LlamaForCausalLM

from engine.compilation import plain
from engine.job import Job, recomputed_layers, reenters
from engine.patching import replace


def recomputed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function, keep only its inputs, and call it again in the backward pass.

    Symptom: with torch 2.11 a compiled layer keeps the outputs of its float8, tensor- and sequence-parallel products.
    Cause: torch.compile does not mark as recomputed what autograd functions compute (pytorch pull request 177396).
    Fix: say of each operation that it is recomputed, which reaches all of them.
    Remove when: torch is 2.12 or later.
    """
    contexts = _keeping_nothing if torch.compiler.is_compiling() else noop_context_fn
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def recomputed_but_attention(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function and recompute all but the output of its fused attention kernel, which runs once."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keeping_attention, **kwargs)


def _keeping_nothing() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_keep_nothing)


def _keep_nothing(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keeping_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # aten._scaled_dot_product_cudnn_attention and its like, torch_attn._varlen_attn, flash_attn._flash_attn_forward
    kept = "_attention" in str(operator) or "_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed_reentrantly(function: Callable, *args: Any) -> Any:
    """Call a function and recompute it with torch's reentrant checkpoint (see `reenters`)."""
    return checkpoint(function, *args, use_reentrant=True)


def checkpoint_function(job: Job) -> Callable:
    """Return the function that calls a layer whose activations are recomputed."""
    if reenters(job.layout):
        return recomputed_reentrantly
    return recomputed_but_attention if job.compute.keep_attention else recomputed


def checkpoint_layers(job: Job, model: LlamaForCausalLM) -> None:
    """Checkpoint the activations of the job's layers to recompute: keep each layer's input, and recompute the rest.

    Each of the layers stores the function as `checkpoint_function`; a compiled layer takes it over (compilation.py).

    Symptom: --recompute and --keep_attention have no effect: all layers are recomputed in the same way, or none.
    Cause: transformers calls every layer through the one function that gradient_checkpointing_enable sets.
    Fix: that function calls each layer through the layer's `checkpoint_function`.
    Remove when: transformers takes a function for each layer.
    """
    layers = recomputed_layers(job.config.num_hidden_layers, job.recomputed)
    function = checkpoint_function(job)
    if not layers:
        return
    model.gradient_checkpointing_enable()
    if function is recomputed_reentrantly:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda layer, inputs, outputs: tuple(map(plain, outputs)))
    for index, layer in enumerate(model.model.layers):
        layer.checkpoint_function = function if index in layers else None

    def call_layer(call: Any, *inputs: Any) -> Any:
        bound: Any = call.func if isinstance(call, partial) else call
        checkpoint_function = bound.__self__.checkpoint_function
        return checkpoint_function(call, *inputs) if checkpoint_function else call(*inputs)

    replace(model.model, "_gradient_checkpointing_func", call_layer)
