"""Measure time, memory and error of the loss of a batch's logits, forward and backward, beside torch's.

    python benchmarks/loss_speed.py [--vocabulary 128256]

Memory is what a pass takes beyond the logits in bf16 themselves; the reference for the error of the logits' gradient is
float64, on the first rows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.loss import summed_cross_entropy
from runtime.console import say

CHECKED_ROWS = 64


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss in float32, as transformers computes it."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def gradient_error(found: Tensor, logits: Tensor, targets: Tensor) -> float:
    """Return the error of the gradient [N, V], as a fraction of its norm."""
    exact = logits.double().softmax(1).sub_(F.one_hot(targets, logits.shape[1]))
    return ((found.double() - exact).norm() / exact.norm()).item()


def measure(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, rounds: int) -> str:
    """Return a row of the table: milliseconds, GB and error."""
    on_gpu = logits.is_cuda
    seconds, extra = [], 0.0
    for _ in range(rounds + 2):
        leaf = logits.clone().requires_grad_()  # the backward pass may overwrite it
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        (gradient,) = torch.autograd.grad(loss(leaf, targets), leaf)
        if on_gpu:
            torch.cuda.synchronize()
            extra = (torch.cuda.max_memory_allocated() - before) / 1e9
        seconds.append(time.perf_counter() - started)
    rows = slice(0, CHECKED_ROWS)
    error = gradient_error(gradient[rows], logits[rows], targets[rows])
    memory = f"{extra:.2f}" if on_gpu else "-"
    return f"{1000 * statistics.median(seconds[2:]):.2f} | {memory} | {error:.2e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    logits = torch.randn(args.tokens, args.vocabulary, device=device).bfloat16()
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch, eager": torch_loss,
        "torch, compiled": torch.compile(torch_loss),
        "engine/loss.py, --no-compile": summed_cross_entropy,
        "engine/loss.py": partial(summed_cross_entropy, compiled=True),
    }
    say(f"{args.tokens:,} tokens, {args.vocabulary:,} in the vocabulary, logits of {logits.nbytes / 1e9:.2f} GB")
    say("| loss | ms | GB | error |")
    say("|---|---|---|---|")
    for name, loss in losses.items():
        say(f"| {name} | {measure(loss, logits, targets, args.rounds)} |")
    return 0


if __name__ == "__main__":
    process.run(main, Path(__file__).name)
