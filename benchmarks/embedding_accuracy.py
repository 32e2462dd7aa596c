"""Measure the error of the embedding's gradient in bf16 for micro-batches of several sizes: torch's, padded, compiled.

    python benchmarks/embedding_accuracy.py

Tokens follow Zipf's law, as in text. The reference adds up in float64; "rounding" is the error of that sum rounded to
bf16 once, the least that a bf16 gradient can have.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.embedding import Padding
from runtime.console import say

SIZES = (1024, 2048, 3072, 4096, 8192, 16384)


def gradient_of(embed: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a weight [V, K] from that of its rows for tokens [M], by autograd."""
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(embed(tokens, leaf), leaf, gradient)[0]


def padded(tokens: Tensor, weight: Tensor) -> Tensor:
    """Embed as training does, see engine/embedding.py."""
    module = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    Padding(module)
    return torch.func.functional_call(module, {"weight": weight}, (tokens,))


def error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference relative to the norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden_size", type=int, default=4096)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    frequencies = 1 / torch.arange(1, args.vocabulary + 1, device=device, dtype=torch.float64)
    weight = torch.zeros(args.vocabulary, args.hidden_size, dtype=torch.bfloat16, device=device)
    compiled = torch.compile(F.embedding)
    say("| tokens | torch | padded | compiled | rounding |")
    say("|---|---|---|---|---|")
    for size in SIZES:
        tokens = torch.multinomial(frequencies, size, replacement=True)
        gradient = torch.randn(size, args.hidden_size, device=device).bfloat16()
        exact = torch.zeros(weight.shape, dtype=torch.float64, device=device)
        exact.index_add_(0, tokens, gradient.double())
        found = [gradient_of(embed, tokens, weight, gradient) for embed in (F.embedding, padded, compiled)]
        errors = (f"{error(each, exact):.3%}" for each in (*found, exact.bfloat16()))
        say(f"| {size:,} | {' | '.join(errors)} |")
    return 0


if __name__ == "__main__":
    process.run(main, Path(__file__).name)
