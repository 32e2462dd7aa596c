"""The functions that every plugin's module has: zero.py, gemini.py, hybrid.py and fsdp.py."""

import math
from typing import Any, NamedTuple, Protocol

import torch
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.interface import ModelWrapper
from transformers import LlamaForCausalLM

from engine.job import Job

INITIAL_LOSS_SCALE = 2.0**16
UNPADDED_VOCABULARY = 1  # padded columns would count in the vocabulary-parallel loss


class LocalPart(NamedTuple):
    """This rank's range of a parameter, flattened after tensor parallelism has split it.

    Attributes:
        start, stop: the range; empty where this rank holds nothing.
        storage: the optimizer's own float32 master weight, [stop - start] or longer by padding.
        adam_state: the optimizer's own state of it, `step` and tensors like `storage`; empty before the first step.
        replicated: True if every data-parallel rank holds all of it.
    """

    start: int
    stop: int
    storage: torch.Tensor
    adam_state: dict[str, Any]
    replicated: bool


class PluginModule(Protocol):
    """A module that builds a plugin and knows where it keeps weights, gradients and optimizer states."""

    def build(self, job: Job, /) -> Plugin:
        """Return the plugin; say in one line what a machine without a GPU does instead."""
        ...

    def empty_model(self, job: Job, device: torch.device, /) -> LlamaForCausalLM:
        """Return the model with its weights not yet set, allocated as the plugin wants it."""
        ...

    def prepare(self, plugin: Any, model: ModelWrapper, optimizer: Any, /) -> None:
        """Change the boosted model and optimizer."""
        ...

    def gradient_ranks(self, plugin: Any, /) -> int:
        """Return the number of ranks over which gradients are averaged."""
        ...

    def local_part(self, optimizer: Any, parameter: torch.nn.Parameter, /) -> LocalPart:
        """Return this rank's part of a parameter, and of its optimizer state."""
        ...

    def update_working_weights(self, optimizer: Any, /) -> None:
        """Set the weights that the model computes with from the master weights."""
        ...


def common_options(job: Job) -> dict[str, Any]:
    """Return the arguments that ColossalAI's plugins share."""
    return dict(
        precision=job.compute.mixed_precision,
        # Plugins compute the norm only to clip by it; an infinite bound gives the norm and clips nothing.
        max_norm=job.optimization.gradient_clipping or math.inf,
        initial_scale=INITIAL_LOSS_SCALE,
    )
