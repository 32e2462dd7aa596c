"""Training in plain PyTorch, which runs are compared with, and data that it learns from."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model_utils import ParameterSpec, initial_weight
from runs import SEED


def learnable_tokens(number: int) -> np.ndarray:
    """Return tokens below 1024, the same on every machine: half Zipf-distributed, half by a rule from the one before.

    Returns:
        int64, [number].
    """
    chance = np.random.default_rng(0)
    tokens = np.minimum(chance.zipf(1.3, number), 1023)
    for position in np.flatnonzero(chance.random(len(tokens) - 1) < 0.5):
        tokens[position + 1] = (5 * tokens[position] + 1) % 1024
    return tokens


def train_plainly(
    config: LlamaConfig,
    dtype: torch.dtype,
    batches: Sequence[torch.Tensor],
    micro_batch: int,
    learning_rates: Sequence[float],
    clipping: float,
    skipped: Collection[int] = (),
) -> tuple[list[float], list[float]]:
    """Train a model on float32 master weights, and return the loss and the gradient norm of each step.

    Args:
        dtype: working precision.
        batches: the sequences of each step, [B, S].
        micro_batch: sequences in a backward pass; the gradients of a step's passes are summed in float32.
        skipped: steps, from 0, whose update is left out.
    """
    model = LlamaForCausalLM(config)
    masters = []
    for name, parameter in model.named_parameters():
        master = initial_weight(ParameterSpec(name, parameter.shape), config, SEED, torch.device("cpu"))
        masters.append(torch.nn.Parameter(master))
        parameter.data = master.detach().to(dtype, copy=True)
    adamw = torch.optim.AdamW(masters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    losses, norms = [], []
    for step, batch in enumerate(batches):
        losses.append(0.0)
        for ids in batch.split(micro_batch):
            logits = model(ids).logits.float()
            summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            loss = summed / batch[:, 1:].numel()
            loss.backward()
            losses[-1] += loss.item()
            for parameter, master in zip(model.parameters(), masters, strict=True):
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad + gradient
        norms.append(torch.nn.utils.clip_grad_norm_(masters, clipping).item())
        adamw.param_groups[0]["lr"] = learning_rates[step]
        if step not in skipped:
            adamw.step()
        adamw.zero_grad()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.data.copy_(master)
    return losses, norms
