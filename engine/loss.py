"""The summed cross-entropy of logits, whole or split over tensor-parallel ranks.

N is the number of tokens, V the size of the vocabulary, T the tensor-parallel size.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from model_utils import IGNORE_INDEX

collective = torch.ops._c10d_functional


@torch.compile
def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss of logits [N, V] and targets [N]; the compiled kernel never stores the float32 logits."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


class _SplitCrossEntropy(torch.autograd.Function):
    """The same of logits [N, V/T] whose columns begin with token `first`.

    Each rank's sum of exponentials is relative to the rank's own maximum. With log Z, the logarithm of the sum over all
    columns, the loss is log Z minus the target's logit, and the gradient exp(logit - log Z), minus 1 at the target.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: str) -> Tensor:
        wide = logits.float()
        here = _one_hot(targets, first, logits.shape[1])
        own_largest = wide.amax(1)
        largest = collective.wait_tensor(collective.all_reduce(own_largest, "max", group))
        exponentials = (wide - own_largest[:, None]).exp().sum(1) * (own_largest - largest).exp()
        sums = torch.stack((exponentials, torch.where(here, wide, 0.0).sum(1)))
        exponentials, chosen = collective.wait_tensor(collective.all_reduce(sums, "sum", group)).unbind()
        log_z = largest + exponentials.log()
        ctx.save_for_backward(logits, targets, log_z)
        ctx.first = first
        return torch.where(targets == IGNORE_INDEX, 0.0, log_z - chosen).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, targets, log_z = ctx.saved_tensors
        probabilities = (logits.float() - log_z[:, None]).exp()
        change = probabilities - _one_hot(targets, ctx.first, logits.shape[1]).float()
        counted = (targets != IGNORE_INDEX)[:, None]
        return torch.where(counted, change * gradient, 0.0).to(logits.dtype), None, None, None


def _one_hot(targets: Tensor, first: int, columns: int) -> Tensor:
    return (targets - first)[:, None] == torch.arange(columns, device=targets.device)


_split_cross_entropy = torch.compile(_SplitCrossEntropy.apply)


def split_cross_entropy(logits: Tensor, targets: Tensor, group: ProcessGroup) -> Tensor:
    """Return the summed loss of targets [N] and logits, of which each of the group's ranks has V/T columns. Collective.

    Args:
        logits: [N, V/T]. All ranks have as many columns, in the order of the ranks.
    """
    return _split_cross_entropy(logits, targets, dist.get_rank(group) * logits.shape[1], group.group_name)
