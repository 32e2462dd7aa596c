"""The plugins `zero2` and `zero2_cpu`: sharded gradients and optimizer states; `zero2_cpu` has these in host memory."""

from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from colossalai.booster.plugin import LowLevelZeroPlugin
from colossalai.interface import ModelWrapper
from colossalai.zero import LowLevelZeroOptimizer
from colossalai.zero.low_level._utils import all_gather_into_flat_tensor_nd
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.compilation import compile_layers as compile_layers
from engine.job import Job
from engine.patching import replace
from engine.plugin import LocalPart, common_options
from engine.plugin import may_evaluate as may_evaluate
from engine.recomputation import checkpoint_layers as checkpoint_layers
from engine.update import Part, update
from model_utils import build_model
from runtime.console import world_size

SMALL = 2**20  # elements; gradients and weights below this size share one collective operation
IN_FLIGHT = 7  # large gradients that are reduced at the same time: as many as a decoder layer has


def build(job: Job) -> LowLevelZeroPlugin:
    """Return LowLevelZeroPlugin at stage 2."""
    return LowLevelZeroPlugin(
        stage=2,
        cpu_offload=bool(job.layout.traits.on_host),
        overlap_communication=torch.cuda.is_available() and world_size() > 1,
        **common_options(job),
    )


def empty_model(job: Job, device: torch.device) -> LlamaForCausalLM:
    """Return the model in working precision on the device, its weights not yet set."""
    return build_model(job.config, device, job.dtype)


def prepare(plugin: LowLevelZeroPlugin, model: ModelWrapper, optimizer: LowLevelZeroOptimizer) -> None:
    """Reduce each large gradient separately instead of in ZeRO's buckets.

    Symptom: the backward pass waits for the host, which launches many small kernels in between.
    Cause: ZeRO cuts each gradient into one tensor per rank, and concatenates a bucket's tensors to reduce them.
    Fix: `_add_to_bucket` reduces a large, flat gradient at once, and `_run_reduction` reduces the rest.
    Remove when: ZeRO's buckets are flat buffers that gradients are written into.
    """
    reducer = _GradientReducer(optimizer)
    replace(optimizer, "_add_to_bucket", reducer.add)
    replace(optimizer, "_run_reduction", reducer.end_pass)
    # The flag now only makes backward() synchronize, which we do not need.
    replace(optimizer, "_overlap_communication", False)
    if optimizer.grad_handles:  # hooks have added every gradient before the pass ends
        replace(optimizer, "_reduce_grad", lambda partition_grad: reducer.end_pass())


def precision_mixin(optimizer: LowLevelZeroOptimizer) -> MixedPrecisionMixin | None:
    """Return ColossalAI's object for mixed precision; None in fp32."""
    return optimizer.mixed_precision_mixin


def step(optimizer: LowLevelZeroOptimizer) -> float:
    """Clip and update (see `engine.update`); each rank updates its partition, and gathers the others' weights."""
    gatherer = _WeightGatherer(optimizer)
    tp_group, pp_group = getattr(optimizer, "tp_pg", None), getattr(optimizer, "pp_pg", None)
    norm = update(
        optimizer.optim,
        list(_parts(optimizer)),
        optimizer.mixed_precision_mixin,
        optimizer._clip_grad_norm,
        filter(None, (*optimizer.pg_to_grad_store, tp_group, pp_group)),
        tp_group,
        gatherer.start,
    )
    gatherer.finish()
    return norm


def _parts(optimizer: LowLevelZeroOptimizer) -> Iterator[Part]:
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


def local_part(optimizer: LowLevelZeroOptimizer, parameter: torch.nn.Parameter) -> LocalPart:
    """Return this rank's part of a parameter and its optimizer state."""
    storage = optimizer.working_to_master_param[id(parameter)]
    start = min(dist.get_rank(optimizer.param_to_pg[parameter]) * storage.numel(), parameter.numel())
    stop = min(start + storage.numel(), parameter.numel())
    return LocalPart(start, stop, storage, optimizer.optim.state[storage], replicated=False)


def update_working_weights(optimizer: LowLevelZeroOptimizer) -> None:
    """Copy the master weights, gathered from all ranks, to the working weights."""
    device = get_accelerator().get_current_device()
    for working, padded in optimizer._working_param_to_padded_working_param.items():
        master = optimizer.working_to_master_param[id(working)]
        all_gather_into_flat_tensor_nd(padded, master.to(device, working.dtype), optimizer.param_to_pg[working])


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


class _WeightGatherer:
    """All-gather of working weights: large ones once this rank has updated its part, small ones in one operation."""

    def __init__(self, optimizer: LowLevelZeroOptimizer):
        (self.group,) = optimizer.pg_to_grad_store
        self.whole = optimizer._working_param_to_padded_working_param
        self.small: list[Part] = []
        self.in_flight: list[dist.Work] = []

    def start(self, part: Part) -> None:
        """Gather the weight of an updated part; a small one waits for `finish`."""
        if dist.get_world_size(self.group) == 1:
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
            gathered = own.new_empty(dist.get_world_size(self.group), own.numel())
            dist.all_gather_into_tensor(gathered.view(-1), own, group=self.group)
            columns = gathered.split([part.working.numel() for part in self.small], dim=1)
            for part, partitions in zip(self.small, columns, strict=True):
                self.whole[part.parameter].view_as(partitions).copy_(partitions)
        for work in self.in_flight:
            work.wait()
        self.small.clear()
        self.in_flight.clear()
