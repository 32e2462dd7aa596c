"""A job of the engine: the model, and the settings that decide its arithmetic, speed and memory."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from engine.layout import Batch, Layout, Parallelism, layout_problems, resolve_layout

AUTO, MICRO_BATCH, STEP = "auto", "micro_batch", "step"  # --exchange
TENSORWISE, ROWWISE = "tensorwise", "rowwise"  # --fp8_recipe
FLOAT8_ALIGNMENT = 16  # elements: kernels for float8 take sizes divisible by it
FLOAT32 = torch.finfo(torch.float32)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def recomputed_layers(layers: int, fraction: float) -> set[int]:
    """Return the layers to recompute: a fraction of all, spread evenly so that pipeline stages have equal shares."""
    count = round(fraction * layers)
    return {layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers}


def reenters(layout: Layout | Parallelism) -> bool:
    """Return True if recomputation needs torch's reentrant checkpoint: under Gemini with tensor parallelism.

    Gemini gathers weights when ColossalAI's linear layers multiply by the parameters themselves in the backward pass.
    torch's other checkpoint passes them detached copies. If torch sees Gemini's tensor class in a layer's output, it
    runs without Gemini's hooks.
    """
    return layout.traits.module == "gemini" and (layout.tp or 1) > 1


@dataclass(frozen=True)
class Compute:
    """Working precision, activation checkpointing and kernels.

    Attributes:
        recompute: fraction of the decoder layers whose activations are recomputed in the backward pass; None: as few
            as memory allows (see `planning.memory.settle_recomputation`).
        keep_attention: keep the output of attention in these layers, so that it is computed once.
        compile: torch.compile the model; None: only on a GPU.
        fp8: multiply in float8 in the decoder's linear layers.
        fp8_recipe: scale each tensor as a whole, `tensorwise`, or each of its rows, `rowwise`; None: tensorwise.
        deterministic: compute the same bits as any equal run (see engine/determinism.py).
    """

    mixed_precision: str = "bf16"
    flash_attention: bool = False
    recompute: float | None = 0.0
    keep_attention: bool = False
    compile: bool | None = None
    fp8: bool = False
    fp8_recipe: str | None = None
    deterministic: bool = False

    @property
    def recipe(self) -> str:
        """Scaling of operands for float8, tensorwise or rowwise; empty without float8."""
        return (self.fp8_recipe or TENSORWISE) if self.fp8 else ""

    def problems(self, layout: Parallelism, layers: int) -> list[str]:
        """Return a line for each setting that is out of range, or conflicts with others in a model of `layers`."""
        problems = []
        fraction = 1.0 if self.recompute is None else self.recompute
        if not 0 <= fraction <= 1:
            problems.append(f"--recompute: must be auto or from 0 to 1, not {fraction}")
        if self.keep_attention:
            if 0 <= fraction <= 1 and not recomputed_layers(layers, fraction):
                problems.append(
                    "--keep_attention: nothing is recomputed; give -g or a larger --recompute, or leave it out"
                )
            if not self.flash_attention and layout.sp == 1:
                problems.append("--keep_attention: needs a fused attention kernel; give -a too")
            if reenters(layout):
                problems.append(f"--keep_attention: {layout.plugin} does not support it with --tp; leave it out")
        return problems


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW and gradient clipping. All parameters are decayed, norms and embeddings too, as in LLaMA.

    The defaults but `adam_eps` are LLaMA's (arXiv:2302.13971, section 2.3).
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0  # largest norm; 0: no clipping
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    min_lr_ratio: float = 0.1  # fraction of `lr` at which the cosine ends

    def problems(self) -> list[str]:
        """Return a line for each number that cannot be used."""
        problems = []
        for name, positive in dict(lr=True, weight_decay=False, gradient_clipping=False, adam_eps=True).items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                problems.append(f"--{name}: {value} is not a {'positive' if positive else 'non-negative'} number")
            elif value and not FLOAT32.tiny <= value <= FLOAT32.max:
                bounds = f"{FLOAT32.tiny:.2g} to {FLOAT32.max:.2g}"
                problems.append(f"--{name}: {value} is outside the range of float32, {bounds}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            first, second = self.adam_betas
            problems.append(f"--adam_betas: must be at least 0 and below 1, not {first} {second}")
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"--min_lr_ratio: must be from 0 to 1, not {self.min_lr_ratio}")
        return problems


@dataclass(frozen=True)
class Exchange:
    """Reduction of gradients between ranks; their sums over micro-batches are float32 in any case.

    Attributes:
        reduce_dtype: precision of the reduction: fp32, or the working precision.
        exchange: reduce the gradients of each `micro_batch`, or once a `step` their sum, which takes memory for
            unsharded float32 gradients; `auto`: as `planning.memory.settle` decides, until then each micro-batch's.
    """

    reduce_dtype: str = "fp32"
    exchange: str = AUTO

    def problems(self, precision: str, layout: Layout, accumulation_steps: int) -> list[str]:
        """Return a line for each setting that conflicts with others, or has no effect."""
        problems = []
        if self.reduce_dtype not in ("fp32", precision):
            problems.append(
                f"--reduce_dtype: must be fp32 or the --mixed_precision {precision}, not {self.reduce_dtype}"
            )
        if self.exchange != AUTO and accumulation_steps == layout.pp == 1:
            problems.append("--exchange: takes effect only with --accumulation_steps; give that too, or leave it out")
        if self.exchange == STEP and layout.traits.module == "gemini" and layout.traits.on_host:
            problems.append(f"--exchange: {layout.plugin} keeps gradients in host memory; leave it out")
        return problems


@dataclass(frozen=True)
class Placement:
    """Gemini's fractions of weights to shard, and of optimizer states and weights to keep in host memory."""

    shard_param_frac: float = 1.0
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    warmup_ratio: float = 0.8  # gemini_auto: GPU memory kept for activations in the first step


@dataclass(frozen=True)
class Job:
    """The engine's part of a run. Nothing writes to it or to its configuration; a change makes a new job."""

    config: LlamaConfig
    parallelism: Parallelism = field(default_factory=Parallelism)
    batch: Batch = field(default_factory=Batch)
    compute: Compute = field(default_factory=Compute)
    optimization: Optimization = field(default_factory=Optimization)
    exchange: Exchange = field(default_factory=Exchange)
    placement: Placement = field(default_factory=Placement)
    seed: int = 42
    length_varies: bool = False  # sequences differ in length, as in fine-tuning
    adapters: LoraConfig | None = None  # trained on frozen weights; None: all weights are trained

    @cached_property
    def layout(self) -> Layout:
        return resolve_layout(self.parallelism, self.batch, self.compute.mixed_precision, self.config)

    def with_layout(self) -> Parallelism:
        """Return the parallelism asked for with the sizes of the layout, which then do not depend on the batch."""
        asked, layout = self.parallelism, self.layout
        return (
            dataclasses.replace(asked, tp=layout.tp, pp=layout.pp, zero=layout.zero_stage)
            if asked.traits.splits
            else asked
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step of all ranks, in sequences of the largest length."""
        return self.batch.sequences * self.batch.max_length * self.layout.dp

    @property
    def dtype(self) -> torch.dtype:
        """Working precision."""
        return DTYPES[self.compute.mixed_precision]

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Precision in which gradients are reduced between ranks."""
        return DTYPES[self.exchange.reduce_dtype]

    @property
    def accumulates(self) -> bool:
        """True if a step sums up the gradients of several micro-batches, or of a pipeline's microbatches."""
        return self.batch.accumulation_steps > 1 or self.layout.pp > 1

    @property
    def offloads(self) -> bool:
        """True if weights or optimizer states are in host memory, all or some."""
        fractions = self.placement.offload_optim_frac + self.placement.offload_param_frac
        return bool(self.layout.traits.on_host) or fractions > 0

    @property
    def exchanges_at_update(self) -> bool:
        """True if gradients are reduced once a step, after all micro-batches or a pipeline's microbatches."""
        return self.accumulates and self.exchange.exchange == STEP

    @property
    def recomputed(self) -> float:
        """Fraction of the layers whose activations are recomputed.

        Raises:
            ValueError: it is not settled yet.
        """
        if self.compute.recompute is None:
            raise ValueError("the fraction of recomputed layers is not settled")
        return self.compute.recompute

    def problems(self) -> list[str]:
        """Return the problems of the layout (see `layout_problems`), or those of the exchange of gradients in it."""
        precision, batch = self.compute.mixed_precision, self.batch
        if problems := layout_problems(self.parallelism, batch, precision, self.config):
            return problems
        problems = self._float8_problems() + self._determinism_problems()
        return problems + self.exchange.problems(precision, self.layout, batch.accumulation_steps)

    def _determinism_problems(self) -> list[str]:
        compute, traits, problems = self.compute, self.layout.traits, []
        if compute.deterministic and traits.module == "gemini" and traits.on_host:
            problems.append(
                f"--deterministic: {self.layout.plugin} chooses during the run which states the GPU updates, and the "
                "host rounds them differently; take another plugin, or leave the flag out"
            )
        if compute.deterministic and self.length_varies and (compute.compile or compute.fp8):
            flag = "compile" if compute.compile else "fp8"
            problems.append(
                f"--deterministic: compiled kernels depend on the lengths met before, which a resume does not repeat; "
                f"leave it or --{flag} out"
            )
        return problems

    def _float8_problems(self) -> list[str]:
        compute, config, layout = self.compute, self.config, self.layout
        if not compute.fp8:
            unused = "--fp8_recipe: takes effect only with --fp8; give that too, or leave it out"
            return [unused] if compute.fp8_recipe else []
        problems = []
        if compute.mixed_precision == "fp32":
            problems.append("--fp8: needs --mixed_precision bf16 or fp16, not fp32")
        elif compute.mixed_precision == "fp16" and compute.fp8_recipe == ROWWISE:
            problems.append("--fp8_recipe: rowwise needs --mixed_precision bf16: not every GPU has it for fp16")
        if compute.compile is False:
            problems.append("--fp8: not compiled, it is slower than bf16; leave --no-compile or --fp8 out")
        if layout.traits.module == "gemini" and layout.tp > 1:
            problems.append(f"--fp8: {layout.plugin} does not support it with --tp; leave one out")
        sizes = {
            "hidden size": config.hidden_size,
            "size of a rank's queries": config.num_attention_heads * config.head_dim // layout.tp,
            "size of a rank's keys": config.num_key_value_heads * config.head_dim // layout.tp,
            "FFN size of a rank": config.intermediate_size // layout.tp,
        }
        return problems + [
            f"--fp8: the {name} is {size}, not divisible by {FLOAT8_ALIGNMENT} as float8 products need; leave --fp8 out"
            for name, size in sizes.items()
            if size % FLOAT8_ALIGNMENT
        ]
