"""One optimizer step under ZeRO and mixed precision: gradient norm, clipping, AdamW, and the working weights.

Symptom: ColossalAI's `step` reads and writes each gradient and weight several times more than AdamW needs.
Cause: it casts every gradient to float32, takes its norm in float64 and scales it in place. It copies the weights one
    by one, and through pageable memory if the optimizer states are in host memory.
Fix: `update` does the same arithmetic. AdamW reads gradients in the working precision and divides them as it reads.
    States in host memory are updated parameter by parameter while later gradients and earlier weights are being copied.
Remove when: ColossalAI's `step` makes no more passes than this one.
"""

import functools
import math
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.interface import OptimizerWrapper
from colossalai.tensor.d_tensor import is_distributed_tensor
from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.adam import Adam, HostTransfer, Part, set_gradient
from engine.patching import replace

SMALL = 2**20  # elements; gradients and weights below this size share one collective operation
IN_FLIGHT = 7  # large gradients that are reduced at the same time: as many as a decoder layer has


@functools.cache
def divide_gradients_by_their_scale() -> None:
    """Divide fp16 gradients by the loss scale that multiplied them. Call before a step; later calls do nothing.

    Symptom: every 1000th step without an overflow updates the moments, and clips, as if gradients were half as large.
    Cause: `should_skip_step` lets the scale grow before `get_grad_div_scale` reads it.
    Fix: `should_skip_step` stores the scale first, and `get_grad_div_scale` returns the stored one, under every plugin.
    Remove when: ColossalAI updates its scale after the step, as torch.amp.GradScaler does.
    """
    decide, divisor = FP16MixedPrecisionMixin.should_skip_step, FP16MixedPrecisionMixin.get_grad_div_scale

    def should_skip_step(self: FP16MixedPrecisionMixin) -> bool:
        self.scale_of_gradients = self.loss_scale
        return decide(self)

    def get_grad_div_scale(self: FP16MixedPrecisionMixin) -> float:
        divisor(self)  # for its side effect
        return self.scale_of_gradients

    replace(FP16MixedPrecisionMixin, "should_skip_step", should_skip_step)
    replace(FP16MixedPrecisionMixin, "get_grad_div_scale", get_grad_div_scale)


def supports(optimizer: OptimizerWrapper) -> bool:
    """Return True if `update` can replace `optimizer.step()`."""
    if not isinstance(getattr(optimizer, "optim", None), Adam) or getattr(optimizer, "shared_params", None):
        return False
    if isinstance(optimizer, LowLevelZeroOptimizer):
        group, *others = optimizer.pg_to_grad_store
        one_group = isinstance(group, ProcessGroup) and not others
        return one_group and optimizer._master_weights and not optimizer._overlap_allgather
    return isinstance(optimizer, MixedPrecisionOptimizer)


def reduce_gradients_directly(optimizer: LowLevelZeroOptimizer) -> None:
    """Reduce each large gradient separately instead of in ZeRO's buckets.

    Symptom: the backward pass waits for the host, which launches many small kernels in between.
    Cause: ZeRO cuts each gradient into one tensor per rank, and concatenates a bucket's tensors to reduce them.
    Fix: `_add_to_bucket` reduces a large, flat gradient at once, and `_run_reduction` reduces the rest.
    Remove when: ZeRO's buckets are flat buffers that gradients are written into.
    """
    if not supports(optimizer):
        return
    reducer = _GradientReducer(optimizer)
    replace(optimizer, "_add_to_bucket", reducer.add)
    replace(optimizer, "_run_reduction", reducer.end_pass)
    # The flag now only makes backward() synchronize, which we do not need.
    replace(optimizer, "_overlap_communication", False)
    if optimizer.grad_handles:  # hooks have added every gradient before the pass ends
        replace(optimizer, "_reduce_grad", lambda partition_grad: reducer.end_pass())


class _GradientReducer:
    """Reduction of gradients to the partitions that ranks update.

    Large gradients are reduced on a side stream during the backward pass, small ones in one operation at its end. At
    most IN_FLIGHT large gradients are kept in memory until they are reduced. Under ZeRO-1 only this rank's partition is
    reduced. With one rank nothing is communicated.
    """

    def __init__(self, optimizer: LowLevelZeroOptimizer):
        self.optimizer = optimizer
        ((self.group, self.store),) = optimizer.pg_to_grad_store.items()
        self.side_stream = optimizer.pg_to_bucket_store[self.group].comm_stream
        # The allocator reuses freed memory at once on the stream that allocated it, so a gradient is kept until that
        # stream has waited for its reduction.
        self.in_flight: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.small: list[tuple[torch.nn.Parameter, int]] = []

    def add(self, parameter: torch.nn.Parameter, group_id: int) -> None:
        """Reduce a parameter's finished gradient; a small one waits for `end_pass`."""
        if self.store.world_size == 1:
            self._keep(self._padded(parameter), parameter, group_id)
            return
        if parameter.numel() < SMALL:
            self.small.append((parameter, group_id))
            return
        gradient = self._padded(parameter)
        accelerator = get_accelerator()
        current = accelerator.current_stream()
        self.side_stream.wait_stream(current)
        with accelerator.stream(self.side_stream):
            self._keep(self._reduce_scatter(gradient), parameter, group_id)
            reduced = accelerator.Event()
            reduced.record()
        self.in_flight.append((gradient, reduced))
        if len(self.in_flight) > IN_FLIGHT:
            current.wait_event(self.in_flight.popleft()[1])

    def end_pass(self) -> None:
        """Reduce the small gradients, and wait for the large ones."""
        if self.small:
            gradients = [self._padded(parameter).view(self.store.world_size, -1) for parameter, _ in self.small]
            reduced = self._reduce_scatter(torch.cat(gradients, dim=1).flatten())
            partitions = reduced.split([gradient.shape[1] for gradient in gradients])
            for partition, (parameter, group_id) in zip(partitions, self.small, strict=True):
                self._keep(partition, parameter, group_id)
            self.small.clear()
        get_accelerator().current_stream().wait_stream(self.side_stream)
        self.in_flight.clear()

    def _padded(self, parameter: torch.nn.Parameter) -> Tensor:
        """Take the gradient from its parameter, flat and padded to a length divisible by the number of ranks."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.flatten(), None
        padding = self.optimizer.get_param_padding_size(parameter)
        return F.pad(gradient, (0, padding)) if padding else gradient

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        """Return this rank's partition of the mean of a flat gradient over the group; overwrites the gradient."""
        ranks = self.store.world_size
        partition = gradient.new_empty(gradient.numel() // ranks)
        if gradient.is_cuda:
            dist.reduce_scatter_tensor(partition, gradient, op=dist.ReduceOp.AVG, group=self.group)
        else:  # Gloo has no mean
            dist.reduce_scatter_tensor(partition, gradient.div_(ranks), group=self.group)
        return partition

    def _keep(self, partition: Tensor, parameter: torch.nn.Parameter, group_id: int) -> None:
        """Add a partition to ZeRO's store, where micro-batches accumulate."""
        store = self.store
        if kept := store.get_partitioned_gradients_by_param_id(group_id, id(parameter)):
            kept[0].add_(partition)
            return
        places = 1 if self.optimizer._partition_grads else store.world_size  # ZeRO-1 has a place for each rank
        for _ in range(places):
            store.append_gradients_by_param_id(partition, group_id, id(parameter))


@torch.no_grad()
def update(optimizer: OptimizerWrapper) -> None:
    """Clip the gradients and update the weights, as `optimizer.step()` does.

    fp16 overflow:
        Symptom: a step reads every gradient two more times.
        Cause: `check_local_overflow` looks for elements that are infinite or NaN.
        Fix: it checks the norm, which is finite only if all elements are.
        Remove when: ColossalAI checks the norm.
    """
    zero = isinstance(optimizer, LowLevelZeroOptimizer)
    parts = list(_zero_parts(optimizer) if zero else _replicated_parts(optimizer))
    norm = _gradient_norm(optimizer, parts)
    replace(optimizer, "_current_grad_norm", norm)  # get_grad_norm() returns it
    precision = optimizer.mixed_precision_mixin if zero else optimizer.mixed_precision
    if isinstance(precision, FP16MixedPrecisionMixin):
        replace(precision, "check_local_overflow", lambda: not math.isfinite(norm))
    if precision is not None and precision.should_skip_step():
        return

    scale = 1.0 if precision is None else precision.get_grad_div_scale()
    max_norm = optimizer._clip_grad_norm if zero else optimizer.max_norm
    if max_norm > 0:
        scale *= max(1.0, (norm / scale + 1e-6) / max_norm)
    on_host = [part for part in parts if part.master.device != part.gradient.device]
    _copy_to_host(optimizer.optim, on_host)
    for part in parts:
        set_gradient(part.master, part.gradient)
    on_device = [part for part in parts if part.master.device == part.working.device]
    adam, gatherer = optimizer.optim, _WeightGatherer(optimizer)
    adam.parts, adam.updated = {part.master.data_ptr(): part for part in on_device}, gatherer.start
    adam.step(div_scale=scale)
    adam.parts = {}  # frees the gradients
    for part in parts:
        part.master.grad = None
    if on_host:
        torch.cuda.current_stream().wait_stream(adam.transfers[on_host[0].master].stream)
    if on_device and not adam.fused:
        torch._foreach_copy_([part.working for part in on_device], [part.master for part in on_device])
    if on_host or not adam.fused:
        for part in parts:
            gatherer.start(part)
    gatherer.finish()


def _zero_parts(optimizer: LowLevelZeroOptimizer) -> Iterator[Part]:
    (store,) = optimizer.pg_to_grad_store.values()
    index = 0 if optimizer._partition_grads else store.local_rank
    for group_id, parameters in optimizer._working_param_groups.items():
        for parameter in parameters:
            gradients = store.get_partitioned_gradients_by_param_id(group_id, id(parameter))
            if gradients:
                whole = optimizer._working_param_to_padded_working_param[parameter].view(-1)
                working = whole.chunk(store.world_size)[store.local_rank]
                master = optimizer.working_to_master_param[id(parameter)]
                yield Part(parameter, working, master, gradients[index].view(-1))


def _replicated_parts(optimizer: MixedPrecisionOptimizer) -> Iterator[Part]:
    for parameter, master in optimizer.working_to_master_map.items():
        if parameter.grad is not None:
            yield Part(parameter, parameter.data, master, parameter.grad)


def _gradient_norm(optimizer: OptimizerWrapper, parts: list[Part]) -> float:
    """Return the L2 norm over all ranks' parts; gradients that tensor-parallel ranks replicate count once."""
    squares = torch.stack(torch._foreach_norm([part.gradient for part in parts], 2, dtype=torch.float32)).square_()
    tp_group = getattr(optimizer, "tp_pg", None)
    tp_size = _size(tp_group)
    if tp_size > 1:
        fractions = [1.0 if is_distributed_tensor(part.parameter) else 1.0 / tp_size for part in parts]
        squares *= torch.tensor(fractions, device=squares.device)
    total = squares.sum()
    data_groups: tuple = ()
    if isinstance(optimizer, LowLevelZeroOptimizer):
        data_groups = tuple(optimizer.pg_to_grad_store)
    for group in (*data_groups, tp_group, getattr(optimizer, "pp_pg", None)):
        if _size(group) > 1:
            dist.all_reduce(total, group=group)
    return total.sqrt().item()


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _copy_to_host(adam: Adam, parts: list[Part]) -> None:
    """Start the device-to-host copies of the gradients; each part's `gradient` becomes the pinned buffer."""
    for part in parts:
        if part.master not in adam.transfers:
            stream = next(iter(adam.transfers.values())).stream if adam.transfers else torch.cuda.Stream()
            adam.transfers[part.master] = HostTransfer(part.gradient, stream)
        part.gradient = adam.transfers[part.master].copy_to_host(part.gradient, part.working)


class _WeightGatherer:
    """All-gather of working weights: large ones once this rank has updated its part, small ones in one operation."""

    def __init__(self, optimizer: OptimizerWrapper):
        self.group: ProcessGroup | None = None
        if isinstance(optimizer, LowLevelZeroOptimizer):
            (self.group,) = optimizer.pg_to_grad_store
            self.whole = optimizer._working_param_to_padded_working_param
        self.small: list[Part] = []
        self.in_flight: list[dist.Work] = []

    def start(self, part: Part) -> None:
        """Gather the weight of an updated part; a small one waits for `finish`."""
        if _size(self.group) == 1:
            return
        if part.parameter.numel() < SMALL:
            self.small.append(part)
            return
        whole = self.whole[part.parameter].view(-1)
        self.in_flight.append(dist.all_gather_into_tensor(whole, part.working, group=self.group, async_op=True))

    def finish(self) -> None:
        """Gather the small weights, and wait for the large ones."""
        if self.small:
            own = torch.cat([part.working for part in self.small])
            gathered = own.new_empty(_size(self.group), own.numel())
            dist.all_gather_into_tensor(gathered.view(-1), own, group=self.group)
            columns = gathered.split([part.working.numel() for part in self.small], dim=1)
            for part, partitions in zip(self.small, columns, strict=True):
                self.whole[part.parameter].view_as(partitions).copy_(partitions)
        for work in self.in_flight:
            work.wait()
        self.small.clear()
        self.in_flight.clear()
