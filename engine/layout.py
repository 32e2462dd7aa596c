"""Layout: the ranks divided into data, tensor, pipeline and sequence parallelism; defaults and checks of the sizes."""

import math
from dataclasses import dataclass

from transformers import LlamaConfig

from runtime.console import below, world_size

PIPELINE_STYLES = ("1f1b", "interleaved", "zbv")


@dataclass(frozen=True)
class Traits:
    """Facts about a plugin that flags and estimates need.

    Attributes:
        module: its module in engine/.
        zero_stage: ZeRO's stage: 1 shards the optimizer states, 2 also the gradients, 3 also the weights.
        on_host: what is kept in host memory: weights, gradients, optimizer.
        splits: True if it takes --tp, --pp, --sp and --zero, and chooses those that are not given.
        trains: False if only benchmark.py takes it.
        in_fp32: True if it also trains in fp32.
        compiles_layers: True if whole decoder layers may be compiled; under Gemini not while tensors are split.
    """

    module: str
    zero_stage: int
    on_host: tuple[str, ...] = ()
    splits: bool = False
    trains: bool = True
    in_fp32: bool = True
    compiles_layers: bool = True


PLUGINS = {
    "gemini": Traits("gemini", zero_stage=3, in_fp32=False),
    "gemini_auto": Traits("gemini", zero_stage=3, on_host=("optimizer",), in_fp32=False),
    "zero2": Traits("zero", zero_stage=2),
    "zero2_cpu": Traits("zero", zero_stage=2, on_host=("optimizer",)),
    "hybrid_parallel": Traits("hybrid", zero_stage=1, splits=True),
    "fsdp": Traits("fsdp", zero_stage=3, trains=False, compiles_layers=False),
    "fsdp_cpu": Traits(
        "fsdp", zero_stage=3, on_host=("weights", "gradients", "optimizer"), trains=False, compiles_layers=False
    ),
    "3d": Traits("hybrid", zero_stage=0, splits=True, trains=False),
    "3d_cpu": Traits("hybrid", zero_stage=1, on_host=("optimizer",), splits=True, trains=False),
}


@dataclass(frozen=True)
class Parallelism:
    """The plugin and the sizes that the user asks for; None leaves a size to `resolve_layout`."""

    plugin: str = "gemini"
    tp: int | None = None
    pp: int | None = None
    sp: int = 1
    zero: int | None = None
    microbatch_size: int = 1
    pp_style: str = "1f1b"
    model_chunks: int | None = None
    extra_dp: int | None = None  # only in benchmark.py, whose gemini also takes --tp
    gpus: int | None = None  # of a dry run; None: the ranks launched

    @property
    def ranks(self) -> int:
        """Number of ranks to plan for."""
        return self.gpus or world_size()

    @property
    def traits(self) -> Traits:
        return PLUGINS[self.plugin]

    def problems(self) -> list[str]:
        """Return a line for each size that is too small."""
        names = ("tp", "pp", "sp", "microbatch_size", "extra_dp", "model_chunks")
        return below(1, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Batch:
    """The sizes of an optimizer step on one data-parallel rank."""

    batch_size: int = 2  # sequences in a micro-batch
    accumulation_steps: int = 1  # micro-batches
    max_length: int = 4096  # tokens in a sequence

    @property
    def sequences(self) -> int:
        return self.batch_size * self.accumulation_steps

    def problems(self) -> list[str]:
        """Return a line for each size that is too small."""
        sizes = below(1, batch_size=self.batch_size, accumulation_steps=self.accumulation_steps)
        return sizes + below(2, max_length=self.max_length)


@dataclass(frozen=True)
class Layout:
    """Sizes of parallelism: tp x pp x sp ranks hold one replica of the model; the dp replicas see different data."""

    plugin: str
    tp: int
    pp: int
    sp: int
    dp: int
    zero_stage: int
    extra_dp: int = 1  # Gemini: copies of the sharded state, each over dp / extra_dp ranks
    chunks: int = 1  # layer ranges per pipeline stage; several if the pipeline is interleaved
    microbatch_size: int = 1  # sequences in a pipeline microbatch

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.sp * self.dp

    @property
    def token_parts(self) -> int:
        """Ranks that each hold a part of the same tokens between tensor-parallel products."""
        return self.tp if self.traits.splits else 1

    @property
    def gradient_ranks(self) -> int:
        """Number of ranks over which gradients are averaged: those that see different tokens."""
        return self.dp * self.sp

    @property
    def traits(self) -> Traits:
        return PLUGINS[self.plugin]


def resolve_layout(asked: Parallelism, batch: Batch, precision: str, config: LlamaConfig) -> Layout:
    """Return the layout asked for on `asked.ranks` ranks, with defaults filled in; `layout_problems` checks it."""
    ranks = asked.ranks
    traits, zero_stage = asked.traits, asked.zero
    if not traits.splits:
        tp, extra_dp = asked.tp or 1, asked.extra_dp or 1
        return Layout(asked.plugin, tp, pp=1, sp=1, dp=ranks // tp, zero_stage=traits.zero_stage, extra_dp=extra_dp)
    chunks = (asked.model_chunks or 2) if asked.pp_style == "interleaved" else 1
    if traits.trains:
        tp = asked.tp or _tensor_parallel_size(asked, config)
        pp = asked.pp or (2 if _divides_in_two_stages(asked, batch, config, tp, chunks) else 1)
    else:  # the benchmark's
        tp, pp = asked.tp or 1, asked.pp or 1
    dp = ranks // (tp * pp * asked.sp)
    if zero_stage is None:
        shards = (dp * asked.sp > 1 and precision != "fp32") or traits.on_host  # ZeRO's partition is offloaded
        zero_stage = traits.zero_stage if shards else 0
    return Layout(
        asked.plugin,
        tp=tp,
        pp=pp,
        sp=asked.sp,
        dp=dp,
        zero_stage=zero_stage,
        chunks=chunks,
        microbatch_size=asked.microbatch_size,
    )


def _tensor_parallel_size(asked: Parallelism, config: LlamaConfig) -> int:
    """Return the largest of 4, 2 and 1 that divides the number of ranks and the model's sizes."""
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    return max(
        n
        for n in (1, 2, 4)
        if asked.ranks % (n * (asked.pp or 1) * asked.sp) == heads % (n * asked.sp) == 0
        and config.vocab_size % n == config.intermediate_size % n == 0
    )


def _divides_in_two_stages(asked: Parallelism, batch: Batch, config: LlamaConfig, tp: int, chunks: int) -> bool:
    microbatches, rest = divmod(batch.sequences, asked.microbatch_size)
    return (
        asked.ranks % (tp * 2) == 0
        and asked.sp == 1
        and asked.zero != 2
        and not config.tie_word_embeddings
        and config.num_hidden_layers % (2 * chunks) == 0
        and rest == 0
        and microbatches >= 2
        and (chunks == 1 or microbatches % 2 == 0)
    )


def layout_problems(asked: Parallelism, batch: Batch, precision: str, config: LlamaConfig) -> list[str]:
    """Return one line, with the numbers, for each size that does not divide and each flag without effect."""
    return (
        asked.problems()
        or _without_effect(asked, precision)
        or _not_dividing(asked, config)
        or (_hybrid_problems(asked, batch, precision, config) if asked.traits.splits else [])
    )


def _lines(*conditions: tuple[bool, str]) -> list[str]:
    """Return the messages of the conditions that hold."""
    return [message for holds, message in conditions if holds]


def _without_effect(asked: Parallelism, precision: str) -> list[str]:
    hybrid, gemini, plugin = asked.traits.splits, asked.traits.module == "gemini", asked.plugin
    takes_tp = hybrid or (gemini and asked.extra_dp is not None)
    needs_hybrid = {
        "--tp": not takes_tp and asked.tp not in (None, 1),
        "--pp": not hybrid and asked.pp not in (None, 1),
        "--zero": not hybrid and asked.zero is not None,
        "--sp": not hybrid and asked.sp != 1,
        "--pp_style": not hybrid and asked.pp_style != "1f1b",
        "--microbatch_size": not hybrid and asked.microbatch_size != 1,
    }
    return [
        f"{flag}: takes effect only with -p hybrid_parallel, not with -p {plugin}"
        for flag, given in needs_hybrid.items()
        if given
    ] + _lines(
        (
            (asked.extra_dp or 1) > 1 and not gemini,
            f"--extra_dp: takes effect only with -p gemini, not with -p {plugin}",
        ),
        (
            precision == "fp32" and not asked.traits.in_fp32,
            f"--mixed_precision: {plugin} trains only in fp16 or bf16; for fp32 use -p zero2",
        ),
        (
            asked.model_chunks is not None and asked.pp_style != "interleaved",
            f"--model_chunks: takes effect only with --pp_style interleaved, not with {asked.pp_style}",
        ),
        (
            asked.pp_style == "zbv",
            "--pp_style: ColossalAI's zero-bubble pipeline, zbv, needs a schedule built from the measured time of each "
            "pass, which these programs do not measure; use interleaved",
        ),
    )


def _not_dividing(asked: Parallelism, config: LlamaConfig) -> list[str]:
    """Return a line for sizes that do not divide the number of ranks or heads."""
    ranks, launched = asked.ranks, "of --gpus" if asked.gpus else "that were launched"
    tp, pp, sp, extra_dp = asked.tp or 1, asked.pp or 1, asked.sp, asked.extra_dp or 1
    if not asked.traits.splits:
        product = tp * extra_dp
        divides = ranks % product == 0
        line = f"--tp/--extra_dp: {tp} x {extra_dp} = {product} does not divide the {ranks} ranks {launched}"
        return _lines((not divides, line)) + _tensor_parallel_problems(tp, config)
    product = tp * pp * sp
    if ranks % product:
        return [f"--tp/--pp/--sp: {tp} x {pp} x {sp} = {product} does not divide the {ranks} ranks {launched}"]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % (tp * sp) or kv_heads % (tp * sp):
        return [f"--tp/--sp: {tp * sp} does not divide the model's {heads} heads and {kv_heads} key-value heads"]
    return []


def _hybrid_problems(asked: Parallelism, batch: Batch, precision: str, config: LlamaConfig) -> list[str]:
    layout = resolve_layout(asked, batch, precision, config)
    layers, ranges = config.num_hidden_layers, layout.pp * layout.chunks
    flag, product = "--pp", ""
    if layout.chunks > 1:
        flag, product = "--model_chunks", f"{layout.pp} stages x {layout.chunks} = "
    problems = _tensor_parallel_problems(layout.tp, config) + _lines(
        (layout.chunks > 1 and layout.pp == 1, "--pp_style: interleaved needs several stages; give --pp"),
        (
            layout.microbatch_size > 1 and layout.pp == 1,
            "--microbatch_size: takes effect only with several stages; give --pp, or leave it out",
        ),
        (layers % ranges > 0, f"{flag}: {product}{ranges} does not divide the model's {layers} layers"),
        (batch.max_length % layout.sp > 0, f"--sp: {layout.sp} does not divide --max_length {batch.max_length}"),
    )
    if layout.pp > 1:
        problems += _pipeline_problems(layout, batch, config)
    if layout.zero_stage and precision == "fp32":
        problems.append(f"--zero: stage {layout.zero_stage} needs --mixed_precision fp16 or bf16, not fp32")
    return problems


def _pipeline_problems(layout: Layout, batch: Batch, config: LlamaConfig) -> list[str]:
    stages, size, sequences = layout.pp, layout.microbatch_size, batch.sequences
    microbatches = sequences // size
    product = "--batch_size x --accumulation_steps"
    problems = []
    if sequences % size:
        problems = [f"--microbatch_size: {size} does not divide {product} = {sequences}"]
    elif microbatches < stages:
        problems = [
            f"--pp: {stages} stages need at least {stages} microbatches, but {product} / --microbatch_size = "
            f"{microbatches}"
        ]
    elif layout.chunks > 1 and microbatches % stages:
        problems = [
            f"--pp_style: interleaved needs a number of microbatches divisible by {stages} stages, but {product} / "
            f"--microbatch_size = {microbatches}"
        ]
    return problems + _lines(
        (layout.sp > 1, "--sp: sequence parallelism does not combine with --pp; use --pp 1"),
        (layout.zero_stage == 2, "--zero: stage 2 does not combine with --pp; use --zero 1"),
        (
            config.tie_word_embeddings,
            "--pp: the model ties its embeddings, which cannot be split over stages; use --pp 1",
        ),
    )


def describe_layout(layout: Layout) -> str:
    """Return one line: the plugin and how it divides the ranks."""
    stages = (
        f"pp {layout.pp}" if layout.chunks == 1 else f"pp {layout.pp} (interleaved, {layout.chunks} ranges per stage)"
    )
    split = f", tp {layout.tp} x {stages} x sp {layout.sp}, ZeRO {layout.zero_stage}"
    if not layout.traits.splits:
        split = f", tp {layout.tp} x {layout.extra_dp} copies" if layout.tp * layout.extra_dp > 1 else ""
    return f"plugin: {layout.plugin}, {layout.dp} data-parallel{split}"


def _tensor_parallel_problems(tp: int, config: LlamaConfig) -> list[str]:
    sizes = {
        "heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "FFN size": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }
    return [f"--tp: {tp} does not divide the model's {name} of {size}" for name, size in sizes.items() if size % tp]
