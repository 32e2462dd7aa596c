"""Products of matrices split over tensor-parallel ranks, computed while their inputs or outputs are exchanged.

Each is one operation for torch.compile, with a result for each part of the tokens (Wang et al., ASPLOS 2023, "Overlap
Communication with Dependent Computation via Decomposition"). Between GPUs of one host that can read each other's
memory, parts are copied by the copy engines, which leaves all multiprocessors to the products; elsewhere by the
process group.

T is the number of ranks, M the number of all tokens; a shard is a rank's M / T tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.reduction import in_one_host
from runtime.collectives import gather

NAMESPACE = "llama_training"
PARTS = 4  # in which rows are computed and exchanged, at least; measured for 2 ranks on 2 x H200

Wait = Callable[[], None]


class _Messages:
    """Exchange by a process group."""

    def __init__(self, group: ProcessGroup):
        self.group = group

    def gather(self, shard: Tensor, whole: Tensor) -> list[tuple[slice, Wait]]:
        """Fill `whole`; return rows of other ranks, perhaps none, and functions that wait until these are there.

        All of `whole` is there after the last.
        """
        sent, received = shard.view(torch.uint8), whole.view(torch.uint8)  # Gloo does not know float8
        work = dist.all_gather_into_tensor(received, sent, self.group, async_op=True)
        first = self.group.rank() * len(shard)
        return [(rows, work.wait) for rows in (slice(0, first), slice(first + len(shard), len(whole)))]

    def exchange(self, compute: Callable[[int, slice, Tensor], None], parts: Tensor) -> None:
        """Fill parts [T, M/T, N], of which each rank computes one for every rank: compute(rank, rows, out)."""
        rank, members, works = self.group.rank(), dist.get_process_group_ranks(self.group), []
        rows, computed = slice(0, parts.shape[1]), torch.empty_like(parts[1:])  # kept until all is sent
        for step, part in enumerate(computed, start=1):
            target, source = (rank + step) % len(parts), (rank - step) % len(parts)
            compute(target, rows, part)
            sent, received = part.view(torch.uint8), parts[source].view(torch.uint8)
            send = dist.P2POp(dist.isend, sent, members[target], self.group)
            works += dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, members[source], self.group)])
        compute(rank, rows, parts[rank])
        for work in works:
            work.wait()


class _Peers:
    """Exchange by copies from memory of the group's other GPUs.

    There are three buffers, used in turn. Each use has a barrier and is over, on this rank, before the next but one
    begins; so when a buffer is written to again, all ranks have read what was there.

    Attributes:
        stream: waiting for other ranks and copies from them run on it, and not behind a product that fills the GPU.
    """

    def __init__(self, group: ProcessGroup):
        self.group, self.stream = group, torch.cuda.Stream(priority=-1)
        self.rank, self.ranks = group.rank(), group.size()
        self.size, self.turn = 0, 0
        self.handles: list[Any] = []
        self._next_buffer(1)

    def gather(self, shard: Tensor, whole: Tensor) -> list[tuple[slice, Wait]]:
        """As _Messages.gather."""
        handle, compute = self._next_buffer(shard.nbytes), torch.cuda.current_stream()
        arrivals: list[tuple[slice, Wait]] = []
        handle.get_buffer(self.rank, shard.shape, shard.dtype).copy_(shard)
        self.stream.wait_stream(compute)
        with torch.cuda.stream(self.stream):
            handle.barrier(channel=0)
            for step in range(1, self.ranks):
                other = (self.rank + step) % self.ranks
                source = handle.get_buffer(other, shard.shape, shard.dtype)
                for rows in self._pieces(len(shard)):
                    there = slice(other * len(shard) + rows.start, other * len(shard) + rows.stop)
                    whole[there].copy_(source[rows])
                    arrivals.append((there, partial(compute.wait_event, self.stream.record_event())))
            whole[self.rank * len(shard) : (self.rank + 1) * len(shard)].copy_(shard)
            arrivals.append((slice(0, 0), partial(compute.wait_event, self.stream.record_event())))
        return arrivals

    def exchange(self, compute: Callable[[int, slice, Tensor], None], parts: Tensor) -> None:
        """As _Messages.exchange."""
        part, stream, channel = parts[0], torch.cuda.current_stream(), 0
        handle = self._next_buffer(part.nbytes * (self.ranks - 1))
        self.stream.wait_stream(stream)
        for step in range(1, self.ranks):
            target, source = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
            place = (step - 1) * part.numel()
            own, other = (handle.get_buffer(rank, part.shape, part.dtype, place) for rank in (self.rank, source))
            for rows in self._pieces(len(part)):
                compute(target, rows, own[rows])
                self.stream.wait_stream(stream)
                with torch.cuda.stream(self.stream):
                    handle.barrier(channel=channel)
                    parts[source, rows].copy_(other[rows])
                channel += 1
        compute(self.rank, slice(0, len(part)), parts[self.rank])
        stream.wait_stream(self.stream)

    def _pieces(self, rows: int) -> list[slice]:
        number = max(1, PARTS // self.ranks)
        return [slice(rows * piece // number, rows * (piece + 1) // number) for piece in range(number)]

    def _next_buffer(self, size: int) -> Any:
        """Return the handle of a buffer of at least so many bytes. Collective if it is larger than any before."""
        if size > self.size:
            torch.cuda.synchronize()
            dist.barrier(self.group)  # no rank reads the old ones any more
            self.size, self.handles = size, []
            device = torch.device("cuda", torch.cuda.current_device())
            for _ in range(3):
                buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
                self.handles.append(symmetric_memory.rendezvous(buffer, self.group))
        self.turn = (self.turn + 1) % len(self.handles)
        return self.handles[self.turn]


_exchanges: dict[str, _Messages | _Peers] = {}


def connect(group: ProcessGroup) -> None:
    """Prepare a group: its ranks read each other's GPU memory, if all of them can. Collective over all ranks."""
    members, inside = dist.get_process_group_ranks(group), in_one_host(group)
    numbers = gather(torch.cuda.current_device() if torch.cuda.is_available() else None)
    own, gpus = numbers[dist.get_rank()], {numbers[member] for member in members}
    # Each rank must see all GPUs: where each sees only its own, all have the number 0.
    distinct = own is not None and len(gpus) == len(members)
    able = gather(inside and distinct and all(torch.cuda.can_device_access_peer(own, gpu) for gpu in gpus - {own}))
    _exchanges[group.group_name] = (_Peers if all(able[member] for member in members) else _Messages)(group)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """Return these rows of a tensor, or a scalar as it is."""
    return tensor[rows] if tensor.dim() else tensor


def _multiply(
    left: Tensor, right: Tensor, scales: tuple[Tensor, Tensor] | None, out: Tensor, fast: bool, add: bool = False
) -> None:
    """Write the product of two matrices into `out`, or add it.

    Args:
        scales: of `left` and `right`, which then are in float8.
        fast: add up in the tensor cores, which have fewer bits than float32.
    """
    if scales is None:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
        return
    left_scale, right_scale = scales
    multiply = partial(torch._scaled_mm, left, right, left_scale, right_scale, out_dtype=out.dtype, use_fast_accum=fast)
    out.add_(multiply()) if add else multiply(out=out)


@torch.library.custom_op(f"{NAMESPACE}::gather_and_multiply", mutates_args=())
def gather_and_multiply(
    shard: Tensor,
    scale: Tensor | None,
    rights: list[Tensor],
    right_scales: list[Tensor],
    group: str,
    dtype: torch.dtype,
    fast: bool,
) -> list[Tensor]:
    """Gather the shards [M/T, K] of a matrix and multiply it by others [K, N], each part as soon as it is there.

    Args:
        scale: of the whole matrix: a scalar or [M, 1]; None in working precision.
        right_scales: as many as `rights`, or none.
        group: name of a group that is connected.
        dtype: of the products.

    Returns:
        The whole matrix, then the products [M, N].
    """
    exchange, shard = _exchanges[group], shard.contiguous()
    rank, ranks = exchange.group.rank(), exchange.group.size()
    whole = shard.new_empty(len(shard) * ranks, shard.shape[1])
    products = [shard.new_empty(len(whole), right.shape[1], dtype=dtype) for right in rights]

    def multiply(left: Tensor, rows: slice) -> None:
        for number, (right, product) in enumerate(zip(rights, products, strict=True)):
            scales = None if scale is None else (_rows(scale, rows), right_scales[number])
            _multiply(left, right, scales, product[rows], fast)

    arrivals = exchange.gather(shard, whole)
    multiply(shard, slice(rank * len(shard), (rank + 1) * len(shard)))
    for rows, wait in arrivals:
        wait()
        if rows.start < rows.stop:
            multiply(whole[rows], rows)
    return [whole, *products]


@gather_and_multiply.register_fake
def _(
    shard: Tensor,
    scale: Tensor | None,
    rights: list[Tensor],
    right_scales: list[Tensor],
    group: str,
    dtype: torch.dtype,
    fast: bool,
) -> list[Tensor]:
    rows = len(shard) * _exchanges[group].group.size()
    products = [shard.new_empty(rows, right.shape[1], dtype=dtype) for right in rights]
    return [shard.new_empty(rows, shard.shape[1]), *products]


@torch.library.custom_op(f"{NAMESPACE}::multiply_and_exchange", mutates_args=())
def multiply_and_exchange(
    lefts: list[Tensor],
    left_scales: list[Tensor],
    rights: list[Tensor],
    right_scales: list[Tensor],
    group: str,
    dtype: torch.dtype,
    fast: bool,
    shard: Tensor | None = None,
) -> list[Tensor]:
    """Compute a sum of products of matrices [M, K] and [K, N], and send each rank its part while computing the next.

    Args:
        left_scales: none in working precision, else of each left matrix: a scalar or [M, 1].
        right_scales: as many.
        group: name of a group that is connected.
        dtype: of the sum.
        shard: of another matrix, to gather meanwhile.

    Returns:
        [T, M/T, N], this rank's part of every rank's sum; then the other matrix, if there is one.
    """
    exchange = _exchanges[group]
    lefts = [left.contiguous() for left in lefts]
    ranks = exchange.group.size()
    size = len(lefts[0]) // ranks
    parts = lefts[0].new_empty(ranks, size, rights[0].shape[1], dtype=dtype)

    def compute(target: int, rows: slice, out: Tensor) -> None:
        rows = slice(target * size + rows.start, target * size + rows.stop)
        for number, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            scales = (_rows(left_scales[number], rows), right_scales[number]) if left_scales else None
            _multiply(left[rows], right, scales, out, fast, add=number > 0)

    whole, arrivals = [], []
    if shard is not None:
        whole = [shard.new_empty(len(shard) * ranks, *shard.shape[1:])]
        arrivals = exchange.gather(shard.contiguous(), whole[0])
    exchange.exchange(compute, parts)
    for _, wait in arrivals:
        wait()
    return [parts, *whole]


@multiply_and_exchange.register_fake
def _(
    lefts: list[Tensor],
    left_scales: list[Tensor],
    rights: list[Tensor],
    right_scales: list[Tensor],
    group: str,
    dtype: torch.dtype,
    fast: bool,
    shard: Tensor | None = None,
) -> list[Tensor]:
    ranks = _exchanges[group].group.size()
    parts = lefts[0].new_empty(ranks, len(lefts[0]) // ranks, rights[0].shape[1], dtype=dtype)
    return [parts] if shard is None else [parts, shard.new_empty(len(shard) * ranks, *shard.shape[1:])]
