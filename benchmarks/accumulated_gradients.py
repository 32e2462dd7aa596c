"""Compare steps of 64 sequences, in one micro-batch or in 64, and on 8 ranks, with a plain PyTorch loop.

    python benchmarks/accumulated_gradients.py

Prints three relative differences: the largest of the losses and the largest of the gradient norms in 20 steps, and that
of the first step's norm, before the weights differ. The plain loop takes a step's sequences in the same micro-batches
and sums their gradients in float32. In its own rows it is compared with itself, in other micro-batches and with a
learning rate that differs by a rounding of float32. All run on the CPU; --tp, --pp and --sp take at least 2 ranks,
and --pp at least 2 microbatches.
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from runtime import process

process.prepare()

import torch

from engine.job import DTYPES
from engine.shards import initialize_weights
from engine.step import forward_backward, optimizer_step
from model_utils import load_config
from plain_loop import learnable_tokens, train_plainly
from processes import boosted, run_ranks
from training.loop import agree

STEPS, SEQUENCES, LENGTH, LAYERS = 20, 64, 32, 2
LR = 1e-3
IN_BOTH = {  # the ranks of one replica, by flags
    "zero2": 1,
    "zero2_cpu": 1,
    "hybrid_parallel --tp 1 --pp 1 --zero 0": 1,
    "hybrid_parallel --tp 2 --pp 1 --zero 0": 2,
    "hybrid_parallel --tp 1 --pp 2 --zero 0": 2,
    "hybrid_parallel --tp 1 --pp 1 --sp 2 --zero 0": 2,
}
IN_BF16 = {
    "hybrid_parallel --tp 1 --pp 1 --zero 1": 1,
    "hybrid_parallel --tp 1 --pp 1 --zero 2": 1,
    "hybrid_parallel --tp 2 --pp 1 --zero 1": 2,
    "hybrid_parallel --tp 1 --pp 2 --zero 1": 2,
    "hybrid_parallel --tp 1 --pp 1 --sp 2 --zero 1": 2,
    "gemini": 1,
    "gemini_auto": 1,
}
COLUMNS = ((1, SEQUENCES), (1, 1), (8, 1))  # ranks, and sequences in a micro-batch
Curves = tuple[Sequence[float], Sequence[float]]  # losses and gradient norms


@functools.cache
def batches() -> torch.Tensor:
    """Return the sequences of all steps, [STEPS, SEQUENCES, LENGTH]."""
    return torch.from_numpy(learnable_tokens(STEPS * SEQUENCES * LENGTH)).view(STEPS, SEQUENCES, LENGTH)


@functools.cache
def plain(precision: str, size: int, lr: float = LR) -> Curves:
    """Return the plain loop's losses and norms, with `size` sequences in a micro-batch."""
    config = load_config("test")
    config.num_hidden_layers = LAYERS
    return train_plainly(config, DTYPES[precision], list(batches()), size, [lr] * STEPS, clipping=1.0)


def curves(flags: str, micro_batches: int) -> Curves:
    """Train on this rank, and return the loss and the gradient norm of each step."""
    engine = boosted(f"{flags} --accumulation_steps {micro_batches} --lr {LR}", num_hidden_layers=LAYERS)
    initialize_weights(engine)
    data = [{"input_ids": ids, "labels": ids} for ids in batches().flatten(0, 1)]
    loader = iter(engine.plugin.prepare_dataloader(data, engine.job.batch.batch_size))
    label_tokens = SEQUENCES * (LENGTH - 1)
    losses, norms = [], []
    for _ in range(STEPS):
        loss_sum = forward_backward(engine, list(itertools.islice(loader, micro_batches)), label_tokens)
        losses.append(agree(engine, loss_sum, False, False).loss_sum / label_tokens)
        norms.append(optimizer_step(engine)[0])
    return losses, norms


def trained(precision: str, layout: str, replica: int, ranks: int, size: int) -> str:
    """Train a layout on `ranks` ranks, at least the `replica` that it takes, and return its differences."""
    ranks, flags = max(ranks, replica), f"-x {precision} -p {layout}"
    if "--pp 2" in layout:
        size = min(size, SEQUENCES // 2)
        flags += f" --microbatch_size {size}"
    micro_batches = SEQUENCES * replica // (ranks * size)
    return differences(run_ranks(ranks, curves, f"{flags} -b {size}", micro_batches)[0], plain(precision, size))


def differences(found: Curves, right: Curves) -> str:
    """Return the largest relative differences of losses and norms, and that of the first norm."""
    losses, norms = ([abs(a / b - 1) for a, b in zip(*pair, strict=True)] for pair in zip(found, right, strict=True))
    return f"{max(losses):.0e}, {max(norms):.0e} ({norms[0]:.0e})"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)  # as on each rank
    print("| flags | 1 rank, one micro-batch of 64 | 1 rank, 64 micro-batches | 8 ranks, 8 micro-batches each |")
    print("|---|---|---|---|")
    for precision, layouts in (("bf16", IN_BOTH | IN_BF16), ("fp32", IN_BOTH)):
        one, many = (plain(precision, size) for size in (SEQUENCES, 1))
        cells = f"{differences(one, many)} | {differences(many, one)}"
        print(f"| `-x {precision}`: plain loop, in the other column's micro-batches | {cells} | |", flush=True)
        nearly = (plain(precision, size, LR * (1 + 1e-7)) for size in (SEQUENCES, 1))
        cells = " | ".join(map(differences, nearly, (one, many)))
        print(f"| plain loop, learning rate 1.0000001 times | {cells} | |", flush=True)
        for layout, replica in layouts.items():
            cells = " | ".join(trained(precision, layout, replica, *column) for column in COLUMNS)
            print(f"| `-p {layout}` | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    process.run(main, "accumulated_gradients.py")
