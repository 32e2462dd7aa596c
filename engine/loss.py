"""The summed cross-entropy of logits, whole or split over tensor-parallel ranks.

With a vocabulary of 128,256 tokens the logits of a batch are its largest tensor, so there is only one of them: the
backward pass writes their gradient over them, and no copy in float32 is stored. Compiled, each pass is one kernel;
eagerly, a few rows are computed at a time.

N is the number of tokens, V the size of the vocabulary, T the tensor-parallel size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model_utils import IGNORE_INDEX

EAGER_LOGITS = 2**24  # computed at a time without compilation; each then takes up to 8 bytes more


@torch.compile
def _row_sums(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return each row's logarithm of the sum of exponentials, and its target's logit, 0 if it has none; float32 [N].

    Args:
        targets: [N]; the columns of the logits are those of the tokens from `first` on.
    """
    own = targets - first
    here = (own >= 0) & (own < logits.shape[1])
    wide = logits.float()
    chosen = wide.gather(1, torch.where(here, own, 0)[:, None])[:, 0]
    largest = wide.amax(1)
    sums = (wide - largest[:, None]).exp_().sum(1)
    return largest + sums.log(), torch.where(here, chosen, 0.0)


@torch.compile
def _to_gradient_(logits: Tensor, targets: Tensor, first: int, log_z: Tensor, factor: Tensor) -> None:
    """Overwrite logits by the gradient of their loss times `factor`: exp(logit - log Z), minus 1 at the target."""
    at_target = (targets - first)[:, None] == torch.arange(logits.shape[1], device=logits.device)
    gradient = logits.float().sub_(log_z[:, None]).exp_().add_(at_target, alpha=-1).mul_(factor)
    logits.copy_(gradient.masked_fill_((targets == IGNORE_INDEX)[:, None], 0.0))


class _CrossEntropy(torch.autograd.Function):
    """The loss of logits [N, V/T] whose columns begin with token `first`; `group` has the other columns.

    With log Z, the logarithm of the sum of exponentials over all columns, it is log Z minus the target's logit.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, group: ProcessGroup | None, parts: int
    ) -> Tensor:
        pairs = zip(logits.chunk(parts), targets.chunk(parts), strict=True)
        sums = [_row_sums(rows, their_targets, first) for rows, their_targets in pairs]
        log_z, chosen = map(torch.cat, zip(*sums, strict=True))
        if group is not None:
            largest = log_z.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            totals = torch.stack(((log_z - largest).exp(), chosen))
            dist.all_reduce(totals, group=group)
            log_z, chosen = largest + totals[0].log(), totals[1]
        ctx.save_for_backward(logits, targets, log_z)
        ctx.first, ctx.parts = first, parts
        return torch.where(targets == IGNORE_INDEX, 0.0, log_z - chosen).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        tensors = [tensor.detach() for tensor in ctx.saved_tensors]
        for logits, targets, log_z in zip(*(tensor.chunk(ctx.parts) for tensor in tensors), strict=True):
            _to_gradient_(logits, targets, ctx.first, log_z, factor)
        return tensors[0], None, None, None, None


def summed_cross_entropy(
    logits: Tensor, targets: Tensor, group: ProcessGroup | None = None, compiled: bool = False
) -> Tensor:
    """Return the summed loss, float32, of logits [N, V] and targets [N]. Its backward pass overwrites the logits.

    Args:
        logits: with a group, [N, V/T]: all its ranks have as many columns, in the order of the ranks. Collective.
        compiled: compute all rows at once, since nothing is stored between the operations.
    """
    first = 0 if group is None else dist.get_rank(group) * logits.shape[1]
    parts = 1 if compiled else -(-logits.numel() // EAGER_LOGITS)
    return _CrossEntropy.apply(logits, targets, first, group, parts)
