"""Gradients of the embedding for micro-batches of few tokens.

Symptom: on a GPU, with 1,025 to 3,072 tokens in a micro-batch, rows of the embedding's gradient may be wrong in rare
    steps. With fewer than 3,073 it is inexact, by 0.3 to 0.6% in bf16.
Cause: torch's kernel for up to 3,072 tokens, `embedding_backward_feature_kernel`. It takes 1,024 tokens at a time, and
    reads the next ones into shared memory while the last ones are still in use (pytorch pull request 187687). It adds
    sums of 32 tokens in the precision of the weight.
Fix: append tokens, whose embeddings nobody reads, so that torch takes its other kernel, which adds up in float32.
Remove when: torch of all supported versions synchronizes in that kernel, and adds up in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_TOKENS = {"cuda": 3072}  # most that the kernel takes, by device


class Padding:
    """Hooks of an embedding that append tokens before its forward pass, and cut their embeddings off after it."""

    def __init__(self, embedding: nn.Module):
        self.shape: torch.Size | None = None  # of the tokens, if some were appended
        embedding.register_forward_pre_hook(self._append)
        embedding.register_forward_hook(self._cut)

    def _append(self, embedding: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        (tokens,) = inputs
        most = FEW_TOKENS.get(tokens.device.type, 0)
        few = 0 < tokens.numel() <= most and torch.is_grad_enabled() and embedding.weight.requires_grad
        self.shape = tokens.shape if few else None
        return (F.pad(tokens.flatten(), (0, most + 1 - tokens.numel())),) if few else None

    def _cut(self, embedding: Any, inputs: tuple[Tensor], hidden: Tensor) -> Tensor | None:
        return None if self.shape is None else hidden[: self.shape.numel()].unflatten(0, self.shape)


def pad_few_tokens(model: nn.Module) -> None:
    """Pad the inputs of a boosted model's embedding, on the pipeline stages that have it."""
    for name, module in model.named_modules():
        if name.endswith("embed_tokens"):
            Padding(module)
