"""Activation checkpointing (arXiv:1604.06174): which decoder layers keep their input alone and are computed twice."""

import argparse
from functools import partial
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from fused import plain

AUTO = "auto"  # as many layers as there is no room for; memory_estimate settles how many


def recomputed_share(args: argparse.Namespace) -> float:
    """Share of the decoder layers whose activations are recomputed in the backward pass."""
    return float(args.gradient_checkpoint) if args.recompute is None else args.recompute


def recomputed_layers(config: LlamaConfig, share: float) -> set[int]:
    """Which layers these are: spread evenly, so that pipeline stages have as many each."""
    layers = config.num_hidden_layers
    count = round(share * layers)
    return {layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers}


def recompute(model: LlamaForCausalLM, layers: set[int], reentrant: bool = False) -> None:
    """Makes these decoder layers keep their input alone, and the model compute the rest of them once more.

    They are marked as `recomputed`; where layers are compiled, what is compiled takes that over (fused.py).

    Args:
        reentrant: for Gemini with tensor parallelism. Its weights are fetched when ColossalAI's linear layers multiply
            by them in the backward pass, which takes the parameters themselves; torch's other way of recomputing hands
            out detached ones. And where torch sees Gemini's class in a layer's output, it runs without Gemini's hooks.
    """
    if not layers:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda layer, inputs, outputs: tuple(map(plain, outputs)))
    for index, layer in enumerate(model.model.layers):
        layer.recomputed = index in layers
    checkpoint = model.model._gradient_checkpointing_func

    def checkpoint_some(call: Any, *inputs: Any) -> Any:
        bound: Any = call.func if isinstance(call, partial) else call
        return checkpoint(call, *inputs) if bound.__self__.recomputed else call(*inputs)

    model.model._gradient_checkpointing_func = checkpoint_some
