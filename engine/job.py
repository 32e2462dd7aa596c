"""A job of the engine: the model and all that decides its arithmetic, its speed and its memory."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import LlamaConfig

from engine.layout import Batch, Layout, Parallelism, resolve_layout

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compute:
    """Working precision, activation checkpointing and kernels.

    Attributes:
        recompute: fraction of the decoder layers whose activations are recomputed in the backward pass; None: as few
            as the memory allows, for `planning.memory.settle_recomputation` to choose.
        keep_attention: keep the output of attention in these layers, so that it is computed once.
        compile: torch.compile the model; None: on a GPU.
    """

    mixed_precision: str = "bf16"
    flash_attention: bool = False
    recompute: float | None = 0.0
    keep_attention: bool = False
    compile: bool | None = None


@dataclass(frozen=True)
class Optimization:
    """AdamW and the clipping of its gradients."""

    lr: float = 3e-4
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0  # largest norm; 0: no clipping


@dataclass(frozen=True)
class Placement:
    """Gemini's fractions of weights to shard, and of states and weights to keep in host memory."""

    shard_param_frac: float = 1.0
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    warmup_ratio: float = 0.8  # gemini_auto: GPU memory kept for activations in the first step


@dataclass(frozen=True)
class Job:
    """The engine's part of a run."""

    config: LlamaConfig
    parallelism: Parallelism = field(default_factory=Parallelism)
    batch: Batch = field(default_factory=Batch)
    compute: Compute = field(default_factory=Compute)
    optimization: Optimization = field(default_factory=Optimization)
    placement: Placement = field(default_factory=Placement)
    seed: int = 42
    length_varies: bool = False  # sequences differ in length, as those of fine-tuning

    @cached_property
    def layout(self) -> Layout:
        return resolve_layout(self.parallelism, self.batch, self.compute.mixed_precision, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Working precision."""
        return DTYPES[self.compute.mixed_precision]

    @property
    def recomputed(self) -> float:
        """Fraction of the layers whose activations are recomputed.

        Raises:
            ValueError: it is still to be settled.
        """
        if self.compute.recompute is None:
            raise ValueError("the fraction of recomputed layers is not settled")
        return self.compute.recompute
