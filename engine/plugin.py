"""The functions that each plugin's module provides: zero.py, gemini.py, hybrid.py and fsdp.py."""

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
        start, stop: the range; empty if this rank holds nothing.
        storage: the optimizer's own float32 master weight, [stop - start] or padded to more.
        adam_state: the optimizer's own state for it, `step` and tensors like `storage`; empty before the first step.
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
        """Return the plugin; print one line if it works differently without a GPU."""
        ...

    def empty_model(self, job: Job, device: torch.device, /) -> LlamaForCausalLM:
        """Return the model, its weights not yet set, allocated as the plugin needs it."""
        ...

    def prepare(self, plugin: Any, model: ModelWrapper, optimizer: Any, /) -> None:
        """Patch the boosted model and optimizer."""
        ...

    def gradient_ranks(self, plugin: Any, /) -> int:
        """Return the number of ranks over which gradients are averaged."""
        ...

    def local_part(self, optimizer: Any, parameter: torch.nn.Parameter, /) -> LocalPart:
        """Return this rank's part of a parameter and its optimizer state."""
        ...

    def update_working_weights(self, optimizer: Any, /) -> None:
        """Copy the master weights to the working weights, with which the model computes."""
        ...


def common_options(job: Job) -> dict[str, Any]:
    """Return the arguments that ColossalAI's plugins share."""
    return dict(
        precision=job.compute.mixed_precision,
        # Plugins compute the norm only if they clip; an infinite bound yields the norm without clipping.
        max_norm=job.optimization.gradient_clipping or math.inf,
        initial_scale=INITIAL_LOSS_SCALE,
    )
