"""Activation checkpointing (arXiv:1604.06174): which decoder layers keep their input alone and are computed twice."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM

from engine.compilation import plain
from engine.layout import GEMINI_PLUGINS
from engine.patching import replace

AUTO = "auto"  # as many layers as there is no room for; memory_estimate settles how many


def recomputed_share(args: argparse.Namespace) -> float:
    """Share of the decoder layers whose activations are recomputed in the backward pass."""
    return float(args.gradient_checkpoint) if args.recompute is None else args.recompute


def recomputed_layers(config: LlamaConfig, share: float) -> set[int]:
    """Which layers these are: spread evenly, so that pipeline stages have as many each."""
    layers = config.num_hidden_layers
    count = round(share * layers)
    return {layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers}


def recomputed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Keeps the inputs alone, and calls the function once more in the backward pass."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def recomputed_but_attention(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The same, but keeps what a fused kernel of attention puts out, so that it runs once."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keeping_attention, **kwargs)


def _keeping_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # aten._scaled_dot_product_cudnn_attention and its like, torch_attn._varlen_attn, flash_attn._flash_attn_forward
    kept = "_attention" in str(operator) or "_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed_in_another_pass(function: Callable, *args: Any) -> Any:
    """As `recomputed`, where the plugin needs a backward pass inside the backward pass; see `reenters`."""
    return checkpoint(function, *args, use_reentrant=True)


def reenters(args: argparse.Namespace) -> bool:
    """Whether the backward pass starts another inside itself for what it recomputes: Gemini with tensor parallelism.

    Its weights are fetched when ColossalAI's linear layers multiply by them in the backward pass, which takes the
    parameters themselves; torch's other way of recomputing hands out detached ones. And where torch sees Gemini's class
    in a layer's output, it runs without Gemini's hooks.
    """
    return args.plugin in GEMINI_PLUGINS and (args.tp or 1) > 1


def recomputed_by(args: argparse.Namespace) -> Callable:
    """How a layer is called that is recomputed."""
    if reenters(args):
        return recomputed_in_another_pass
    return recomputed_but_attention if args.keep_attention else recomputed


def recompute(model: LlamaForCausalLM, layers: set[int], how: Callable = recomputed) -> None:
    """Makes these decoder layers keep their input alone, and the model compute the rest of them once more.

    They are marked by `recomputed_by`; where layers are compiled, what is compiled takes that over (compilation.py).

    Symptom: --recompute and --keep_attention would have no effect: all layers are recomputed in one way, or none.
    Cause: transformers calls every layer by the one function that gradient_checkpointing_enable sets.
    Fix: that function calls each layer as the layer's mark says.
    Remove when: transformers takes a function for each layer.

    Args:
        how: what calls them, with the function and its inputs.
    """
    if not layers:
        return
    model.gradient_checkpointing_enable()
    if how is recomputed_in_another_pass:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda layer, inputs, outputs: tuple(map(plain, outputs)))
    for index, layer in enumerate(model.model.layers):
        layer.recomputed_by = how if index in layers else None

    def call_once_or_twice(call: Any, *inputs: Any) -> Any:
        bound: Any = call.func if isinstance(call, partial) else call
        twice = bound.__self__.recomputed_by
        return twice(call, *inputs) if twice else call(*inputs)

    replace(model.model, "_gradient_checkpointing_func", call_once_or_twice)
