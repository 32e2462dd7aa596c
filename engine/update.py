"""One update of the weights under ZeRO and mixed precision: norm, clipping, AdamW, and the model's working copy.

ColossalAI's own `step` widens every gradient to float32, takes its norm in float64, scales it in place and copies each
weight by itself, in pageable memory where the optimizer lies on the host. This does the same arithmetic with what its
kernels offer: AdamW takes gradients in the working precision and divides by the scale as it reads them, and states on
the host are updated parameter by parameter while the next gradients and the last weights are under way.
"""

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

from engine.adam import Adam, HostTransfer, Part, lend_gradient

SMALL = 2**20  # elements below which parameters share a collective operation
UNDER_WAY = 7  # gradients that are reduced at a time: as many as a decoder layer has large weights


def divide_by_the_scale_of_the_gradients() -> None:
    """Patches ColossalAI's fp16: gradients are divided by the loss scale that they were multiplied by.

    Symptom: every 1000th step without an overflow moves the moments, and clips, as if gradients were half as large.
    Cause: `should_skip_step` lets the scale grow before `get_grad_div_scale` reads it.
    Fix: `should_skip_step` notes the scale first, and `get_grad_div_scale` returns that, under every plugin.
    Remove when: ColossalAI updates its scale after the step, as torch.amp.GradScaler does.
    """
    decide, divisor = FP16MixedPrecisionMixin.should_skip_step, FP16MixedPrecisionMixin.get_grad_div_scale

    def should_skip_step(self: FP16MixedPrecisionMixin) -> bool:
        self.scale_of_gradients = self.loss_scale
        return decide(self)

    def get_grad_div_scale(self: FP16MixedPrecisionMixin) -> float:
        divisor(self)  # it changes the state
        return self.scale_of_gradients

    FP16MixedPrecisionMixin.should_skip_step = should_skip_step
    FP16MixedPrecisionMixin.get_grad_div_scale = get_grad_div_scale


divide_by_the_scale_of_the_gradients()


def supports(optimizer: OptimizerWrapper) -> bool:
    """Return True if `update` can replace `optimizer.step()`."""
    if not isinstance(getattr(optimizer, "optim", None), Adam) or getattr(optimizer, "shared_params", None):
        return False
    if isinstance(optimizer, LowLevelZeroOptimizer):
        group, *others = optimizer.pg_to_grad_store
        one_group = isinstance(group, ProcessGroup) and not others
        return one_group and optimizer._master_weights and not optimizer._overlap_allgather
    return isinstance(optimizer, MixedPrecisionOptimizer)


def exchange_gradients_directly(optimizer: LowLevelZeroOptimizer) -> None:
    """Puts `_Exchange` in the place of ZeRO's buckets, in which the host cuts each gradient into as many as ranks."""
    if not supports(optimizer):
        return
    exchange = _Exchange(optimizer)
    optimizer._add_to_bucket, optimizer._run_reduction = exchange.add, exchange.end_pass
    optimizer._overlap_communication = False  # from here on this has each backward pass wait for the device, no more
    if optimizer.grad_handles:  # gradients come from hooks, and none is left to be handed over at the end of the pass
        optimizer._reduce_grad = lambda partition_grad: exchange.end_pass()


class _Exchange:
    """Reduces gradients to the parts that ranks update, the large ones beside the backward pass, the others at its end.

    The large ones of one decoder layer lie in memory until those of the next come. What other ranks of a ZeRO-1 update
    is not computed. Where one rank has all the data, nothing moves.
    """

    def __init__(self, optimizer: LowLevelZeroOptimizer):
        self.optimizer = optimizer
        ((self.group, self.store),) = optimizer.pg_to_grad_store.items()
        self.beside = optimizer.pg_to_bucket_store[self.group].comm_stream
        # Memory that is let go goes to the stream that asked for it, which may not write there until it has been read.
        self.under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.small: list[tuple[torch.nn.Parameter, int]] = []

    def add(self, parameter: torch.nn.Parameter, group_id: int) -> None:
        """Takes the gradient of a parameter that the backward pass has no more to add to."""
        if self.store.world_size == 1:
            self._keep(self._padded(parameter), parameter, group_id)
            return
        if parameter.numel() < SMALL:
            self.small.append((parameter, group_id))
            return
        gradient = self._padded(parameter)
        accelerator = get_accelerator()
        current = accelerator.current_stream()
        self.beside.wait_stream(current)
        with accelerator.stream(self.beside):
            self._keep(self._reduce_scatter(gradient), parameter, group_id)
            reduced = accelerator.Event()
            reduced.record()
        self.under_way.append((gradient, reduced))
        if len(self.under_way) > UNDER_WAY:
            current.wait_event(self.under_way.popleft()[1])

    def end_pass(self) -> None:
        if self.small:
            gradients = [self._padded(parameter).view(self.store.world_size, -1) for parameter, _ in self.small]
            reduced = self._reduce_scatter(torch.cat(gradients, dim=1).flatten())
            parts = reduced.split([gradient.shape[1] for gradient in gradients])
            for part, (parameter, group_id) in zip(parts, self.small, strict=True):
                self._keep(part, parameter, group_id)
            self.small.clear()
        get_accelerator().current_stream().wait_stream(self.beside)
        self.under_way.clear()

    def _padded(self, parameter: torch.nn.Parameter) -> Tensor:
        """The gradient taken from its parameter, flat and of a length that the ranks divide."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.flatten(), None
        padding = self.optimizer.get_param_padding_size(parameter)
        return F.pad(gradient, (0, padding)) if padding else gradient

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        """This rank's part of the mean over the group of flat gradients, which are used up."""
        ranks = self.store.world_size
        part = gradient.new_empty(gradient.numel() // ranks)
        if gradient.is_cuda:
            dist.reduce_scatter_tensor(part, gradient, op=dist.ReduceOp.AVG, group=self.group)
        else:  # Gloo takes no mean
            dist.reduce_scatter_tensor(part, gradient.div_(ranks), group=self.group)
        return part

    def _keep(self, part: Tensor, parameter: torch.nn.Parameter, group_id: int) -> None:
        store = self.store
        if kept := store.get_partitioned_gradients_by_param_id(group_id, id(parameter)):
            kept[0].add_(part)
            return
        places = 1 if self.optimizer._partition_grads else store.world_size  # ZeRO-1 has one for each rank
        for _ in range(places):
            store.append_gradients_by_param_id(part, group_id, id(parameter))


@torch.no_grad()
def update(optimizer: OptimizerWrapper) -> None:
    """Does what `optimizer.step()` does."""
    zero = isinstance(optimizer, LowLevelZeroOptimizer)
    parts = list(_zero_parts(optimizer) if zero else _replicated_parts(optimizer))
    norm = _gradient_norm(optimizer, parts)
    optimizer._current_grad_norm = norm
    precision = optimizer.mixed_precision_mixin if zero else optimizer.mixed_precision
    if isinstance(precision, FP16MixedPrecisionMixin):
        precision.check_local_overflow = lambda: not math.isfinite(norm)
    if precision is not None and precision.should_skip_step():
        return

    scale = 1.0 if precision is None else precision.get_grad_div_scale()
    max_norm = optimizer._clip_grad_norm if zero else optimizer.max_norm
    if max_norm > 0:
        scale *= max(1.0, (norm / scale + 1e-6) / max_norm)
    on_host = [part for part in parts if part.master.device != part.gradient.device]
    _fetch(optimizer.optim, on_host)
    for part in parts:
        lend_gradient(part.master, part.gradient)
    on_device = [part for part in parts if part.master.device == part.working.device]
    adam, gathering = optimizer.optim, _Gathering(optimizer)
    adam.parts, adam.updated = {part.master.data_ptr(): part for part in on_device}, gathering.start
    adam.step(div_scale=scale)
    adam.parts = {}  # or the gradients would live on
    for part in parts:
        part.master.grad = None
    if on_host:
        torch.cuda.current_stream().wait_stream(adam.transfers[on_host[0].master].stream)
    if on_device and not adam.fused:
        torch._foreach_copy_([part.working for part in on_device], [part.master for part in on_device])
    if on_host or not adam.fused:
        for part in parts:
            gathering.start(part)
    gathering.finish()


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
    """Over all ranks that hold a part, each element counted once."""
    squares = torch.stack(torch._foreach_norm([part.gradient for part in parts], 2, dtype=torch.float32)).square_()
    tp_group = getattr(optimizer, "tp_pg", None)
    tp_size = _size(tp_group)
    if tp_size > 1:
        shares = [1.0 if is_distributed_tensor(part.parameter) else 1.0 / tp_size for part in parts]
        squares *= torch.tensor(shares, device=squares.device)
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


def _fetch(adam: Adam, parts: list[Part]) -> None:
    """Starts the gradients on their way to the host, and puts the buffers they will arrive in in their place."""
    for part in parts:
        if part.master not in adam.transfers:
            stream = next(iter(adam.transfers.values())).stream if adam.transfers else torch.cuda.Stream()
            adam.transfers[part.master] = HostTransfer(part.gradient, stream)
        part.gradient = adam.transfers[part.master].receive(part.gradient, part.working)


class _Gathering:
    """Completes working weights with the other ranks' parts, of each as soon as this rank has updated its own."""

    def __init__(self, optimizer: OptimizerWrapper):
        self.group: ProcessGroup | None = None
        if isinstance(optimizer, LowLevelZeroOptimizer):
            (self.group,) = optimizer.pg_to_grad_store
            self.whole = optimizer._working_param_to_padded_working_param
        self.small: list[Part] = []
        self.started: list[dist.Work] = []

    def start(self, part: Part) -> None:
        if _size(self.group) == 1:
            return
        if part.parameter.numel() < SMALL:
            self.small.append(part)
            return
        whole = self.whole[part.parameter].view(-1)
        self.started.append(dist.all_gather_into_tensor(whole, part.working, group=self.group, async_op=True))

    def finish(self) -> None:
        if self.small:
            own = torch.cat([part.working for part in self.small])
            gathered = own.new_empty(_size(self.group), own.numel())
            dist.all_gather_into_tensor(gathered.view(-1), own, group=self.group)
            columns = gathered.split([part.working.numel() for part in self.small], dim=1)
            for part, parts in zip(self.small, columns, strict=True):
                self.whole[part.parameter].view_as(parts).copy_(parts)
        for work in self.started:
            work.wait()
        self.small.clear()
        self.started.clear()
