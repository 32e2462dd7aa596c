"""Division of the ranks among data, tensor, pipeline and sequence parallelism: flags, their defaults, their checks."""

import argparse
import math
from dataclasses import dataclass

from transformers import LlamaConfig

from runtime.console import world_size

PLUGINS = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "hybrid_parallel")
BENCHMARK_PLUGINS = (*PLUGINS, "fsdp", "fsdp_cpu", "3d", "3d_cpu")
GEMINI_PLUGINS = ("gemini", "gemini_auto")
HYBRID_PLUGINS = ("hybrid_parallel", "3d", "3d_cpu")
PIPELINE_STYLES = ("1f1b", "interleaved", "zbv")


@dataclass(frozen=True)
class Layout:
    """Division of the ranks: tp x pp x sp of them hold one replica of the model; dp replicas see different data."""

    tp: int
    pp: int
    sp: int
    dp: int
    zero_stage: int
    extra_dp: int = 1  # Gemini: copies of the sharded state, each over dp / extra_dp ranks
    chunks: int = 1  # layer ranges that a pipeline stage holds; several where the pipeline is interleaved

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.sp * self.dp


def resolve_layout(args: argparse.Namespace, config: LlamaConfig) -> Layout:
    """The layout that the flags ask for on the ranks of `planned_ranks`, defaults filled in. Not yet checked."""
    ranks = planned_ranks(args)
    if args.plugin not in HYBRID_PLUGINS:
        tp = args.tp or 1
        stage = 2 if args.plugin.startswith("zero2") else 3
        return Layout(tp=tp, pp=1, sp=1, dp=ranks // tp, zero_stage=stage, extra_dp=getattr(args, "extra_dp", 1))
    chunks = (args.model_chunks or 2) if args.pp_style == "interleaved" else 1
    if args.plugin != "hybrid_parallel":  # 3d, 3d_cpu: what is offloaded is ZeRO's part
        tp, pp = args.tp or 1, args.pp or 1
        zero_stage = args.zero if args.zero is not None else int(args.plugin == "3d_cpu")
        dp = ranks // (tp * pp * args.sp)
        return Layout(tp=tp, pp=pp, sp=args.sp, dp=dp, zero_stage=zero_stage, chunks=chunks)
    pp_given = args.pp or 1
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    tp = args.tp or max(
        n
        for n in (1, 2, 4)
        if ranks % (n * pp_given * args.sp) == heads % (n * args.sp) == 0
        and config.vocab_size % n == config.intermediate_size % n == 0
    )
    sequences = args.batch_size * args.accumulation_steps
    microbatches = sequences // args.microbatch_size
    two_stages = (
        ranks % (tp * 2) == 0
        and args.sp == 1
        and args.zero != 2
        and not config.tie_word_embeddings
        and config.num_hidden_layers % (2 * chunks) == 0
        and sequences % args.microbatch_size == 0
        and microbatches >= 2
        and (chunks == 1 or microbatches % 2 == 0)
    )
    pp = args.pp or (2 if two_stages else 1)
    dp = ranks // (tp * pp * args.sp)
    sharded = dp * args.sp > 1 and args.mixed_precision != "fp32"
    zero_stage = args.zero if args.zero is not None else int(sharded)
    return Layout(tp=tp, pp=pp, sp=args.sp, dp=dp, zero_stage=zero_stage, chunks=chunks)


def planned_ranks(args: argparse.Namespace) -> int:
    """The number of ranks to plan for: `--gpus` of a dry run, else those that were launched."""
    return getattr(args, "gpus", None) or world_size()


def layout_problems(args: argparse.Namespace, config: LlamaConfig) -> list[str]:
    """One line for each size that does not divide, naming the flag and the numbers."""
    hybrid = args.plugin in HYBRID_PLUGINS
    extra_dp = getattr(args, "extra_dp", 1)  # a flag of the benchmark, whose gemini takes --tp too
    takes_tp = hybrid or (hasattr(args, "extra_dp") and args.plugin.startswith("gemini"))
    sizes = {"--tp": args.tp, "--pp": args.pp, "--sp": args.sp, "--microbatch_size": args.microbatch_size}
    sizes |= {"--extra_dp": extra_dp, "--model_chunks": args.model_chunks}
    problems = [
        f"{flag}: {value} is not a positive number" for flag, value in sizes.items() if value is not None and value < 1
    ]
    if problems:
        return problems
    given = {
        "--tp": not takes_tp and args.tp not in (None, 1),
        "--pp": not hybrid and args.pp not in (None, 1),
        "--zero": not hybrid and args.zero is not None,
        "--sp": not hybrid and args.sp != 1,
        "--pp_style": not hybrid and args.pp_style != "1f1b",
        "--microbatch_size": not hybrid and args.microbatch_size != 1,
    }
    problems = [
        f"{flag}: takes effect with -p hybrid_parallel alone, not with -p {args.plugin}"
        for flag, without_effect in given.items()
        if without_effect
    ]
    if extra_dp > 1 and not args.plugin.startswith("gemini"):
        problems.append(f"--extra_dp: takes effect with -p gemini alone, not with -p {args.plugin}")
    if args.mixed_precision == "fp32" and args.plugin.startswith("gemini"):
        problems.append(f"--mixed_precision: {args.plugin} trains in fp16 or bf16 alone; fp32 goes with -p zero2")
    if args.model_chunks is not None and args.pp_style != "interleaved":
        problems.append(f"--model_chunks: takes effect with --pp_style interleaved alone, not with {args.pp_style}")
    if args.pp_style == "zbv":
        problems.append(
            "--pp_style: ColossalAI's zero-bubble pipeline, zbv, takes a schedule that is made from measured times "
            "of each pass, which these programs do not make; use interleaved"
        )
    if problems:
        return problems
    ranks, launched = planned_ranks(args), "of --gpus" if getattr(args, "gpus", None) else "that were launched"
    if not hybrid:
        tp = args.tp or 1
        if ranks % (tp * extra_dp):
            problems.append(
                f"--tp/--extra_dp: {tp} x {extra_dp} = {tp * extra_dp} does not divide the {ranks} ranks {launched}"
            )
        return problems + _tensor_parallel_problems(tp, config)

    given = (args.tp or 1) * (args.pp or 1) * args.sp
    if ranks % given:
        return [
            f"--tp/--pp/--sp: {args.tp or 1} x {args.pp or 1} x {args.sp} = {given} does not divide "
            f"the {ranks} ranks {launched}"
        ]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    split = (args.tp or 1) * args.sp
    if heads % split or kv_heads % split:
        return [f"--tp/--sp: {split} does not divide the model's {heads} heads and {kv_heads} key-value heads"]

    layout = resolve_layout(args, config)
    problems = _tensor_parallel_problems(layout.tp, config)
    if layout.chunks > 1 and layout.pp == 1:
        problems.append("--pp_style: interleaved needs several stages; give --pp")
    if args.microbatch_size > 1 and layout.pp == 1:
        problems.append("--microbatch_size: takes effect with several stages alone; give --pp, or leave it out")
    if config.num_hidden_layers % (layout.pp * layout.chunks):
        flag, ranges = ("--pp", layout.pp) if layout.chunks == 1 else ("--model_chunks", layout.pp * layout.chunks)
        product = "" if layout.chunks == 1 else f"{layout.pp} stages x {layout.chunks} = "
        problems.append(f"{flag}: {product}{ranges} does not divide the model's {config.num_hidden_layers} layers")
    if args.max_length % layout.sp:
        problems.append(f"--sp: {layout.sp} does not divide --max_length {args.max_length}")
    if layout.pp > 1:
        sequences = args.batch_size * args.accumulation_steps
        if sequences % args.microbatch_size:
            problems.append(
                f"--microbatch_size: {args.microbatch_size} does not divide "
                f"--batch_size x --accumulation_steps = {sequences}"
            )
        elif sequences // args.microbatch_size < layout.pp:
            problems.append(
                f"--pp: {layout.pp} stages need as many microbatches, but --batch_size x --accumulation_steps / "
                f"--microbatch_size = {sequences // args.microbatch_size}"
            )
        elif layout.chunks > 1 and sequences // args.microbatch_size % layout.pp:
            problems.append(
                f"--pp_style: interleaved needs a multiple of the {layout.pp} stages as microbatches, but "
                f"--batch_size x --accumulation_steps / --microbatch_size = {sequences // args.microbatch_size}"
            )
        if layout.sp > 1:
            problems.append("--sp: sequence parallelism does not combine with --pp; use --pp 1")
        if layout.zero_stage == 2:
            problems.append("--zero: stage 2 does not combine with --pp; use --zero 1")
        if config.tie_word_embeddings:
            problems.append("--pp: the model ties its embeddings, which cannot be split over stages; use --pp 1")
    if layout.zero_stage and args.mixed_precision == "fp32":
        problems.append(f"--zero: stage {layout.zero_stage} needs --mixed_precision fp16 or bf16, not fp32")
    return problems


def describe_layout(plugin: str, layout: Layout) -> str:
    """One line: the plugin and how it divides the ranks."""
    stages = (
        f"pp {layout.pp}" if layout.chunks == 1 else f"pp {layout.pp} (interleaved, {layout.chunks} ranges a stage)"
    )
    split = f", tp {layout.tp} x {stages} x sp {layout.sp}, ZeRO {layout.zero_stage}"
    if plugin not in HYBRID_PLUGINS:
        split = f", tp {layout.tp} x {layout.extra_dp} copies" if layout.tp * layout.extra_dp > 1 else ""
    return f"plugin: {plugin}, {layout.dp} data-parallel{split}"


def _tensor_parallel_problems(tp: int, config: LlamaConfig) -> list[str]:
    sizes = {
        "heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "FFN size": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }
    return [f"--tp: {tp} does not divide the model's {name} of {size}" for name, size in sizes.items() if size % tp]
