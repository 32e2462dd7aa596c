"""Compare the losses of runs in float8 with those of runs in bf16, and print a Markdown table.

    python benchmarks/float8_learning.py bf16/1=a/tb_logs bf16/2=b/tb_logs tensorwise/1=c/tb_logs tensorwise/2=d/tb_logs

A run is RECIPE/SEED=LOGS, its log folder or metrics.jsonl. The first recipe is the reference. Another recipe's run is
compared with the reference's of the same seed, which has the same initial weights and batches. The last rows show how
far the seeds of the reference are apart; float8 is as good if its differences are no larger. "curves" is the mean
absolute difference of the smoothed training losses after the warm-up, which `--output` draws for each seed. A second
run of the reference, under another name, shows how far equal runs are apart. scripts/plot_run.py draws the runs.
"""

import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process, requirements

requirements.require()

import argparse

import numpy as np
from matplotlib import pyplot

from runtime.console import InputError, below
from runtime.files import file_problems
from scripts.plot_run import read_run
from training.flags import ArgumentParser, add_flag, user_path


class Result(NamedTuple):
    """The losses of a run, in nats per token."""

    recipe: str
    seed: str
    loss: float  # on the training data, mean of the last steps
    held_out: float  # at the end
    curve: np.ndarray  # smoothed training loss of each step after the warm-up

    def minus(self, other: "Result") -> list[float]:
        """Return the differences in training and held-out loss, and the mean absolute difference of the curves."""
        gap = float(np.abs(self.curve - other.curve).mean())
        return [self.loss - other.loss, self.held_out - other.held_out, gap]


def result(text: str, args: argparse.Namespace) -> Result:
    """Read a run given on the command line.

    Raises:
        InputError: it has no recipe or seed, too few steps, or no held-out loss of its last step.
    """
    run = read_run(text)
    recipe, _, seed = run.name.partition("/")
    if not recipe or not seed or run.name == text:
        raise InputError(f"{text} is not RECIPE/SEED=LOGS; name it like bf16/1=tb_logs")
    losses = run.columns["loss"]
    if len(losses) < max(args.warmup_steps + args.smooth, args.last):
        raise InputError(f"{run.name} has only {len(losses)} steps; train it to its end, or lower the flags")
    if not run.has("eval_loss") or not np.isfinite(run.columns["eval_loss"][-1]):
        raise InputError(f"{run.name} has no held-out loss of its last step; train it to its end on data with such")
    curve = np.convolve(losses[args.warmup_steps :], np.ones(args.smooth) / args.smooth, "valid")
    return Result(recipe, seed, float(losses[-args.last :].mean()), float(run.columns["eval_loss"][-1]), curve)


def draw(results: list[Result], reference: str, first_step: int) -> pyplot.Figure:
    """Return a figure with a panel per seed: the smoothed training losses, minus the reference's of that seed.

    Args:
        first_step: the optimizer step of a curve's first value.
    """
    seeds = sorted({each.seed for each in results if each.recipe == reference})
    figure, axes = pyplot.subplots(
        1, len(seeds), figsize=(5.5 * len(seeds), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, seed in zip(axes.flat, seeds, strict=True):
        (base,) = [each for each in results if (each.recipe, each.seed) == (reference, seed)]
        for each in results:
            if each.seed == seed and each is not base:
                steps = np.arange(first_step, first_step + len(each.curve))
                axis.plot(steps, each.curve - base.curve, label=each.recipe, linewidth=1)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"seed {seed}: training loss, minus {reference}", fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def main() -> int:
    parser = ArgumentParser(prog="float8_learning.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RECIPE/SEED=LOGS", help="a run's log folder or metrics.jsonl")
    add_flag(parser, "--last", 200, "steps at the end whose mean is the training loss")
    add_flag(parser, "--smooth", 50, "steps in a moving average")
    add_flag(parser, "--warmup_steps", 200, "steps at the start that the curve leaves out")
    add_flag(parser, "-o --output", None, "PNG file for the differences of the curves", type=user_path)
    args = parser.parse_args()
    problems = below(1, last=args.last, smooth=args.smooth) + below(0, warmup_steps=args.warmup_steps)
    if args.output:
        problems += file_problems("--output", args.output)
        if args.output.suffix != ".png":
            problems.append(f"--output: {args.output} does not end in .png; choose a name that does")
    if problems:
        raise InputError(*problems)
    results = [result(text, args) for text in args.runs]
    if len({len(each.curve) for each in results}) > 1:
        raise InputError("the runs have different numbers of steps; give runs of the same length")
    name = results[0].recipe
    references = {each.seed: each for each in results if each.recipe == name}

    print(f"| run | training loss | held-out loss | training, minus {name} | held-out, minus {name} | curves |")
    print("|---|---|---|---|---|---|")
    for each in results:
        reference = references.get(each.seed)
        apart = each.minus(reference) if reference and reference is not each else []
        print_row(f"{each.recipe}, {each.seed}", f"{each.loss:.4f}", f"{each.held_out:.4f}", apart)
    for first, second in combinations(references.values(), 2):
        print_row(f"{name}, {second.seed} minus {first.seed}", "", "", second.minus(first))
    if args.output:
        draw(results, name, args.warmup_steps + args.smooth).savefig(args.output, dpi=80)
    return 0


def print_row(label: str, loss: str, held_out: str, apart: list[float]) -> None:
    training, evaluated, gap = [f"{apart[0]:+.4f}", f"{apart[1]:+.4f}", f"{apart[2]:.4f}"] if apart else [""] * 3
    print(f"| {label} | {loss} | {held_out} | {training} | {evaluated} | {gap} |")


if __name__ == "__main__":
    process.run(main, "float8_learning.py")
