"""Compare every attention kernel of this machine with plain float64 attention, forward and backward.

    python benchmarks/attention_accuracy.py
    python benchmarks/attention_accuracy.py --shift 0 -30 -60 -120 --spread 1 10

An error is the norm of the difference over the norm of the reference, the largest of the output and three gradients.
bf16 itself rounds to 2e-3. All kernels get the same random inputs, of even and odd lengths, with and without grouped
heads. Trained models have heads whose logits are far from zero, or far apart: --shift adds a number to all logits, and
--spread multiplies the rest, whose standard deviation is 1.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import process

process.prepare()

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn import VARIABLE_LENGTH, document_boundaries

KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
SHAPES = (
    (2, 32, 32, 4096, 128),
    (2, 32, 8, 2047, 128),
    (2, 12, 4, 129, 64),
    (2, 16, 16, 1024, 64),
)  # batch, heads, KV heads, length, width
REPETITIONS = 5  # of the timed passes
NO_KERNEL = ("No available kernel", "No viable backend")  # starts of torch's messages about unsupported inputs
Tensors = Sequence[torch.Tensor]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return plain attention [B, H, S, D], one head at a time, as the weights of all heads would not fit."""
    heads = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        scores = query[:, head] @ key[:, group].transpose(1, 2) / math.sqrt(query.shape[-1])
        heads.append(scores.masked_fill(~visible[:, 0], -math.inf).softmax(-1) @ value[:, group])
    return torch.stack(heads, dim=1)


def result(attention: Callable, inputs: Tensors, cotangent: torch.Tensor) -> Tensors:
    """Return the output and the gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = attention(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def kernels(inside_documents: bool, visible: torch.Tensor, boundaries: torch.Tensor) -> dict[str, Callable]:
    """Return the kernels by name, as functions of query, key and value, [B, H, S, D] each."""

    def scaled_dot_product(backend: SDPBackend) -> Callable:
        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
            mask = {"attn_mask": visible} if inside_documents else {"is_causal": True}
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, **mask)

        return attention

    found = {backend.name.lower(): scaled_dot_product(backend) for backend in KERNELS}
    variable_length = ALL_ATTENTION_FUNCTIONS[VARIABLE_LENGTH]
    found[VARIABLE_LENGTH] = lambda *states: variable_length(None, *states, boundaries)[0].transpose(1, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shift", type=float, nargs="+", default=[0.0])
    parser.add_argument("--spread", type=float, nargs="+", default=[1.0])
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # about kernels that do not support an input; the table says so
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    shapes = SHAPES if device.type == "cuda" else SHAPES[2:3]
    print("| batch, heads, KV heads, length, width | logits | documents | kernel | error | forward and backward, ms |")
    print("|---|---|---|---|---|---|")
    for (batch, heads, kv_heads, length, width), shift, spread in product(shapes, args.shift, args.spread):
        sizes = ((batch, heads), (batch, kv_heads), (batch, kv_heads), (batch, heads))
        *inputs, cotangent = (torch.randn(*size, length, width, device=device).bfloat16() for size in sizes)
        inputs[0] *= spread
        if shift:
            inputs[0][..., 0], inputs[1][..., 0] = 1, shift * math.sqrt(width)
        for documents in (1, 5):
            starts = torch.arange(length) % -(-length // documents)
            boundaries = document_boundaries(starts.expand(batch, -1)).to(device)
            document = (starts == 0).cumsum(0).to(device)
            visible = (document[:, None] == document).tril().expand(batch, 1, length, length)
            wide = tuple(tensor.double() for tensor in inputs)
            expected = result(partial(reference, visible=visible), wide, cotangent.double())
            for name, attention in kernels(documents > 1, visible, boundaries).items():
                logits = f"{shift:g} ± {spread:g}"
                row = f"| {batch}, {heads}, {kv_heads}, {length}, {width} | {logits} | {documents} | {name} "
                try:
                    found = result(attention, inputs, cotangent)
                except RuntimeError as error:
                    if not (isinstance(error, NotImplementedError) or str(error).startswith(NO_KERNEL)):
                        raise
                    print(f"{row}| not supported | |", flush=True)
                    continue
                errors = [
                    ((ours.double() - theirs).norm() / theirs.norm()).item()
                    for ours, theirs in zip(found, expected, strict=True)
                ]
                synchronize()
                start = time.perf_counter()
                for _ in range(REPETITIONS):
                    result(attention, inputs, cotangent)
                synchronize()
                milliseconds = (time.perf_counter() - start) * 1000 / REPETITIONS
                print(f"{row}| {max(errors):.1e} | {milliseconds:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    process.run(main, "attention_accuracy.py")
