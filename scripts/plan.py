"""Find the fastest ways to train a model on given GPUs, before they are rented; needs no GPU.

    python scripts/plan.py -c 7b --gpus 8
    python scripts/plan.py -c 70b --gpus 256 --gpus_per_node 8 --gpu H100 --network 400Gb --fp8

It tries every plugin, layout, micro-batch and share of recomputed layers by the estimates of a dry run, and prints the
fastest layouts whose memory fits, as commands for pretrain.py. docs/planner.md has the errors of the estimates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import argparse
import math
import shlex

from model_utils import MODEL_CONFIGS, load_config
from planning.cards import Card
from planning.machines import DryRun, card_problems, planned_card, planned_machines
from planning.report import describe_machines
from planning.search import ALIKE, Found, Wish, fastest, flags_of, leanest, simplest
from runtime.console import InputError, below, say
from training.flags import ArgumentParser, add_flag, add_machine_args, take, user_name

RECIPE_TOKENS = 4_194_304  # of an optimizer step of LLaMA (arXiv:2302.13971, table 2)
REDPAJAMA_TOKENS = 1.2e12


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="plan.py", description=__doc__)
    parser.set_defaults(dry_run=True, mfu=None)
    known = ", ".join(MODEL_CONFIGS)
    add_flag(parser, "-c --config", "7b", f"{known}, or a config.json or its folder", type=user_name)
    add_flag(parser, "--gpus", int, "number of GPUs", required=True)
    add_machine_args(parser)
    text = "sequence length in tokens (default: 4096, or the model's context if that is shorter)"
    add_flag(parser, "-l --max_length", int, text)
    text = "tokens of an optimizer step (default: LLaMA's, 4194304)"
    add_flag(parser, "--batch_tokens", RECIPE_TOKENS, text)
    add_flag(parser, "--tokens", REDPAJAMA_TOKENS, "tokens of the whole training (default: RedPajama's, 1.2e12)")
    add_flag(parser, "--fp8", False, "also consider float8")
    add_flag(parser, "-n --count", 10, "layouts to print")
    return parser.parse_args()


def wish_of(args: argparse.Namespace) -> tuple[Wish, Card]:
    """Return what the flags ask for. Raises InputError with a line for each that is wrong."""
    config, plan = load_config(args.config), take(DryRun, args)
    length = min(4096, config.max_position_embeddings) if args.max_length is None else args.max_length
    problems = below(1, gpus=args.gpus, count=args.count, batch_tokens=args.batch_tokens)
    problems += below(2, max_length=length)
    problems += card_problems(plan, args.fp8)
    if not 0 < args.tokens < float("inf"):
        problems.append(f"--tokens: must be a positive number, not {args.tokens}")
    if problems:
        raise InputError(*problems)
    card, machines = planned_card(plan), planned_machines(plan)
    if machines is None or not card.memory_gb > 0:
        raise InputError(f"--gpu: speed or memory of {card.name} is unknown; give --gpu, or --facts and --gpu_memory")
    wish = Wish(config, machines, args.gpus, card.memory_gb * 1e9, length, args.batch_tokens, args.fp8)
    if problems := wish.problems():
        raise InputError(*problems)
    return wish, card


def refusal(wish: Wish, card: Card) -> str:
    """Return the reason why no layout was found."""
    if closest := leanest(wish):
        job, peak = closest
        return (
            f"--gpus: {wish.gpus} x {card.name} do not hold the model: {flags_of(job)} needs least, "
            f"{peak / 1e9:.1f} of {card.memory_gb:g} GB; take more GPUs, or larger ones"
        )
    return (
        f"--gpus: {wish.gpus} fit no layout, since {wish.sequences:,} sequences of a step do not divide among them; "
        f"take a power of two, or --batch_tokens {wish.even_tokens}"
    )


def row(number: int, found: Found, card: Card, tokens: float) -> list[str]:
    """Return the cells of a layout's row."""
    job, layout = found.job, found.job.layout
    split = [f"{name} {size}" for name, size in (("tp", layout.tp), ("pp", layout.pp), ("sp", layout.sp)) if size > 1]
    if layout.chunks > 1:
        split.append(f"interleaved {layout.chunks}")
    micro = layout.microbatch_size if layout.pp > 1 else job.batch.batch_size
    hours = tokens / found.tokens_per_second / 3600
    recomputed = f"{job.recomputed:.0%}" if job.recomputed else "-"
    return [
        str(number),
        layout.plugin,
        ", ".join([*split, f"dp {layout.dp}"]),
        f"{micro} x {job.batch.sequences // micro}",
        recomputed + (" but attention" if job.compute.keep_attention else ""),
        "float8" if job.compute.fp8 else "bf16",
        f"{found.tokens_per_second:,.0f}",
        "-" if math.isnan(card.peak_tflops) else f"{found.mfu(card.peak_tflops):.1%}",
        f"{found.peak / 1e9:.1f}",
        f"{hours / 24:,.1f}",
        f"{hours * layout.ranks:,.0f}",
        found.bound,
    ]


def launcher(gpus: int, per_host: int) -> str:
    """Return the start of a command that launches so many ranks."""
    if gpus <= per_host:
        return f"torchrun --standalone --nproc_per_node {gpus}"
    return f"python scripts/run_on_hosts.py --hostfile hosts.txt --nproc_per_node {per_host}"


def main() -> int:
    args = parse_args()
    wish, card = wish_of(args)
    found = fastest(wish, args.count)
    if not found:
        raise InputError(refusal(wish, card))
    say(
        f"{args.config} on {args.gpus} x {card.name} ({describe_machines(wish.machines, args.gpus)}), "
        f"{wish.sequences:,} sequences of {wish.max_length:,} tokens per step:"
    )
    head = ["", "plugin", "layout", "micro-batches", "recomputed", "precision", "tokens/s", "MFU", "GB", "days"]
    table = [[*head, "GPU-hours", "bound by"]]
    table += [row(number, each, card, args.tokens) for number, each in enumerate(found, 1)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    say(f"days and GPU-hours are for {args.tokens:,.0f} tokens, without restarts, saves and evaluations")
    say(f"row {simplest(found) + 1} is the simplest of those within {ALIKE:.0%} of the fastest; the commands:")
    start = launcher(args.gpus, wish.machines.per_host)
    for number, each in enumerate(found, 1):
        say(f"{number:2}  {start} pretrain.py -c {shlex.quote(args.config)} {flags_of(each.job)}")
    return 0


if __name__ == "__main__":
    process.run(main, "plan.py")
