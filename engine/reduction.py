"""Reduction of gradients over a group of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from runtime.collectives import gather
from runtime.console import local_rank, rank


def in_one_host(group: ProcessGroup) -> bool:
    """Return True if all of a group's ranks run on the same host. Collective over all ranks."""
    hosts = gather(rank() - local_rank())  # the first rank of each rank's host
    return len({hosts[member] for member in dist.get_process_group_ranks(group)}) == 1


class Reduction:
    """Sums or means of flat gradients over a group, in a given precision. Creating it is collective over all ranks."""

    def __init__(self, group: ProcessGroup, dtype: torch.dtype):
        self.group, self.ranks, self.dtype = group, dist.get_world_size(group), dtype
        self.in_one_host = in_one_host(group)

    def all_reduce(self, gradients: Tensor, mean: bool = False) -> Tensor:
        """Return the sum or the mean; may overwrite the gradients."""
        gradients = gradients.to(self.dtype)
        dist.all_reduce(gradients, self._operation(gradients, mean), group=self.group)
        return gradients

    def reduce_scatter(self, gradients: Tensor, mean: bool = False) -> Tensor:
        """Return this rank's part of the sum or the mean; may overwrite the gradients.

        Within a host, gradients of a narrower precision travel as they are, by all-to-all, and each rank adds up the
        parts that it receives: the same sum for half the bytes. Between hosts, each two ranks would need a connection.

        Args:
            gradients: of a length divisible by the number of ranks.
        """
        if self.in_one_host and gradients.dtype.itemsize < self.dtype.itemsize:
            received = torch.empty_like(gradients)
            dist.all_to_all_single(received, gradients, group=self.group)
            part = received.view(self.ranks, -1).sum(0, dtype=self.dtype)
            return part.div_(self.ranks) if mean else part
        gradients = gradients.to(self.dtype)
        part = gradients.new_empty(gradients.numel() // self.ranks)
        dist.reduce_scatter_tensor(part, gradients, self._operation(gradients, mean), group=self.group)
        return part

    def _operation(self, gradients: Tensor, mean: bool) -> ReduceOp.RedOpType:
        """Return the operation; Gloo has no mean, so gradients on the host are divided here."""
        if mean and gradients.is_cuda:
            return ReduceOp.AVG
        if mean:
            gradients.div_(self.ranks)
        return ReduceOp.SUM
