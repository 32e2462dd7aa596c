"""The functions that each plugin's module provides: zero.py, gemini.py, hybrid.py and fsdp.py."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
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

    def checkpoint_layers(self, job: Job, model: LlamaForCausalLM, /) -> None:
        """Checkpoint the activations of the layers to recompute, unless the plugin does so itself."""
        ...

    def prepare(self, job: Job, plugin: Any, model: ModelWrapper, optimizer: Any, /) -> None:
        """Patch the boosted model and optimizer."""
        ...

    def compile_layers(self, model: ModelWrapper, /) -> None:
        """Compile each decoder layer as a whole."""
        ...

    def may_evaluate(self, model: ModelWrapper, /) -> bool:
        """Return True if a pass without gradients may run now."""
        ...

    def precision_mixin(self, optimizer: Any, /) -> MixedPrecisionMixin | None:
        """Return ColossalAI's object for mixed precision, which scales the loss in fp16; None without one."""
        ...

    def step(self, optimizer: Any, rejects: Callable[[float], bool] | None, /) -> float:
        """Clip and update; return the gradient norm before clipping, times the loss scale.

        Args:
            rejects: called with that norm unless fp16 overflowed; True skips the update, which then changes nothing.
        """
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


def may_evaluate(model: ModelWrapper) -> bool:
    """Return True: a pass without gradients may run at any time."""
    return True
