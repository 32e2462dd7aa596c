"""The plugins `zero2` and `zero2_cpu`: sharded gradients and optimizer states; `zero2_cpu` has these in host memory."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable

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
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from transformers import LlamaForCausalLM

from engine import float8
from engine.compilation import compile_layers as compile_layers
from engine.float8 import E4M3
from engine.job import Job
from engine.patching import replace
from engine.plugin import LocalPart, common_options
from engine.plugin import may_evaluate as may_evaluate
from engine.recomputation import checkpoint_layers as checkpoint_layers
from engine.reduction import Reduction
from engine.update import Part, update
from engine.waits import waiting
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


def prepare(job: Job, plugin: LowLevelZeroPlugin, model: ModelWrapper, optimizer: LowLevelZeroOptimizer) -> None:
    """Reduce gradients by a GradientReducer instead of in ZeRO's buckets, and store weights in float8.

    Symptom: sums over micro-batches lose as much precision as the working one has, and the backward pass waits for
        the host, which launches many small kernels in between.
    Cause: ZeRO adds up and reduces gradients in the working precision. It cuts each gradient into one tensor per rank,
        and concatenates a bucket's tensors to reduce them.
    Fix: remove its hooks on gradients. `_overlap_communication` would now only make backward() synchronize.
    Remove when: ZeRO sums in float32, in flat buffers that gradients are written into.
    """
    for handle in optimizer.grad_handles:
        handle.remove()
    replace(optimizer, "_overlap_communication", False)
    (group,) = optimizer.pg_to_grad_store
    parameters = itertools.chain.from_iterable(optimizer._working_param_groups.values())
    optimizer.reducer = GradientReducer(job, parameters, group)
    padded = optimizer._working_param_to_padded_working_param

    def allocate(weight: Parameter) -> Tensor | None:
        on_device = weight in padded and not job.layout.traits.on_host
        return padded[weight].new_empty(padded[weight].numel(), dtype=E4M3) if on_device else None

    optimizer.stored = float8.store_weights(model, allocate)
    padded.update({weight: stored.whole for weight, stored in optimizer.stored.items()})


def precision_mixin(optimizer: LowLevelZeroOptimizer) -> MixedPrecisionMixin | None:
    """Return ColossalAI's object for mixed precision; None in fp32."""
    return optimizer.mixed_precision_mixin


def step(optimizer: LowLevelZeroOptimizer, rejects: Callable[[float], bool] | None = None) -> float:
    """Clip and update (see `engine.update`); each rank updates its partition, and gathers the others' weights."""
    reducer, gatherer = optimizer.reducer, _WeightGatherer(optimizer)
    reducer.finish()
    tp_group, pp_group = getattr(optimizer, "tp_pg", None), getattr(optimizer, "pp_pg", None)
    parts = [_part(optimizer, parameter, gradient) for parameter, gradient in reducer.reduced.items()]
    norm = update(
        optimizer.optim,
        parts,
        optimizer.mixed_precision_mixin,
        optimizer._clip_grad_norm,
        filter(None, (reducer.group, tp_group, pp_group)),
        tp_group,
        gatherer.start,
        rejects,
    )
    _round_weights(optimizer, gatherer)
    gatherer.finish()
    reducer.reduced.clear()
    return norm


def _round_weights(optimizer: LowLevelZeroOptimizer, gatherer: "_WeightGatherer") -> None:
    """Set and gather the weights that are stored in float8."""
    own = {weight: _own_part(optimizer, weight) for weight in optimizer.stored}
    if own:
        triples = (
            (own[weight], _master(optimizer, weight), stored.scale) for weight, stored in optimizer.stored.items()
        )
        float8.round_weights(triples, gatherer.group)
    for weight, part in own.items():  # as bytes: Gloo does not know float8
        gatherer.gather(optimizer.stored[weight].whole.view(torch.uint8), part.view(torch.uint8))


def _own_part(optimizer: LowLevelZeroOptimizer, parameter: Parameter) -> Tensor:
    """Return the part of a working weight that this rank updates, flat; a view."""
    group = optimizer.param_to_pg[parameter]
    padded = optimizer._working_param_to_padded_working_param[parameter].view(-1)
    return padded.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def _master(optimizer: LowLevelZeroOptimizer, parameter: Parameter) -> Tensor:
    return optimizer.working_to_master_param[id(parameter)]


def _part(optimizer: LowLevelZeroOptimizer, parameter: Parameter, gradient: Tensor) -> Part:
    working = None if parameter in optimizer.stored else _own_part(optimizer, parameter)
    return Part(parameter, working, _master(optimizer, parameter), gradient)


def local_part(optimizer: LowLevelZeroOptimizer, parameter: Parameter) -> LocalPart:
    """Return this rank's part of a parameter and its optimizer state."""
    storage = _master(optimizer, parameter)
    start = min(dist.get_rank(optimizer.param_to_pg[parameter]) * storage.numel(), parameter.numel())
    stop = min(start + storage.numel(), parameter.numel())
    return LocalPart(start, stop, storage, optimizer.optim.state[storage], replicated=False)


def update_working_weights(optimizer: LowLevelZeroOptimizer) -> None:
    """Copy the master weights, gathered from all ranks, to the working weights."""
    device = get_accelerator().get_current_device()
    for working, padded in optimizer._working_param_to_padded_working_param.items():
        if working not in optimizer.stored:
            master = _master(optimizer, working).to(device, working.dtype)
            all_gather_into_flat_tensor_nd(padded, master, optimizer.param_to_pg[working])
    gatherer = _WeightGatherer(optimizer)
    _round_weights(optimizer, gatherer)
    gatherer.finish()


class GradientReducer:
    """Sums of gradients over micro-batches and means over ranks; takes each gradient as soon as it is complete.

    Each micro-batch is reduced during its backward pass: large gradients on a side stream, small ones in one operation
    at its end. Or ranks sum up their own micro-batches, and `finish` reduces these sums. At most IN_FLIGHT large
    gradients are kept in memory until they are reduced. With one rank nothing is communicated.

    Args:
        parameters: those that are trained.
        group: the ranks over which gradients are averaged.
        partitions: keep this rank's partition of each gradient, flat and padded, instead of all of it.

    Attributes:
        reduced: the result for each parameter; float32, unless it is the gradient of a single micro-batch that was
            reduced in the working precision.
    """

    def __init__(self, job: Job, parameters: Iterable[Parameter], group: ProcessGroup, partitions: bool = True):
        self.parameters, self.group, self.ranks = list(parameters), group, dist.get_world_size(group)
        self.rows = self.ranks if partitions else 1  # parts of a gradient that ranks keep
        self.accumulates = job.accumulates
        self.at_update = self.ranks > 1 and job.exchanges_at_update
        reduction = Reduction(group, job.reduce_dtype)
        # Not a partial: it would keep gradients alive after their conversion to the precision of the reduction.
        self._reduce_to = reduction.reduce_scatter if partitions else reduction.all_reduce
        self.side_stream = get_accelerator().Stream()
        # The allocator reuses freed memory at once on the stream that allocated it, so a gradient is kept until that
        # stream has waited for its reduction.
        self.in_flight: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.small: dict[Parameter, Tensor] = {}
        self.local: dict[Parameter, Tensor] = {}  # this rank's sums, not yet reduced
        self.reduced: dict[Parameter, Tensor] = {}
        self.in_pass = False
        self.shared: tuple[ProcessGroup, list[Parameter]] | None = None
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def sum_over(self, group: ProcessGroup, parameters: Iterable[Parameter]) -> None:
        """Also sum these parameters' gradients over a group, whose ranks each have a part, when they are complete."""
        trained = set(self.parameters)
        self.shared = group, [parameter for parameter in parameters if parameter in trained]

    def _take(self, parameter: Parameter) -> None:
        """Take a parameter's gradient of a micro-batch, during the backward pass."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.flatten(), None
        if self.ranks == 1 or self.at_update:
            self._add(self.local if self.at_update else self.reduced, parameter, gradient)
            return
        if not self.in_pass:
            self.in_pass = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
        self._reduce(parameter, gradient)

    def _add(self, sums: dict[Parameter, Tensor], parameter: Parameter, gradient: Tensor) -> None:
        if parameter in sums and gradient.is_cuda:
            from engine.kernels import add_  # here, since torch has Triton only where it has CUDA

            add_(sums[parameter], gradient)  # torch's kernel for two precisions takes half as long again
        elif parameter in sums:
            sums[parameter].add_(gradient)
        else:
            sums[parameter] = gradient.float() if self.accumulates else gradient

    def _reduce(self, parameter: Parameter, gradient: Tensor) -> None:
        """Reduce a gradient on the side stream; a small one waits for the end of the pass."""
        gradient = self._padded(gradient)
        if parameter.numel() < SMALL:
            self.small[parameter] = gradient
            return
        accelerator = get_accelerator()
        current = accelerator.current_stream()
        self.side_stream.wait_stream(current)
        with waiting():
            with accelerator.stream(self.side_stream):
                self._add(self.reduced, parameter, self._reduce_to(gradient, mean=True))
                reduced = accelerator.Event()
                reduced.record()
            self.in_flight.append((gradient, reduced))
            if len(self.in_flight) > IN_FLIGHT:
                current.wait_event(self.in_flight.popleft()[1])

    def _end_pass(self) -> None:
        """Reduce the small gradients, and wait for the large ones."""
        self.in_pass = False
        if self.small:
            gradients = [gradient.view(self.rows, -1) for gradient in self.small.values()]
            with waiting():
                means = self._reduce_to(torch.cat(gradients, dim=1).flatten(), mean=True)
            parts = means.split([gradient.shape[1] for gradient in gradients])
            for parameter, part in zip(self.small, parts, strict=True):
                self._add(self.reduced, parameter, part)
            self.small.clear()
        with waiting():
            get_accelerator().current_stream().wait_stream(self.side_stream)
        self.in_flight.clear()

    def finish(self) -> None:
        """Reduce this rank's sums, if they are reduced only now. Collective."""
        for parameter in reversed(self.parameters):
            if parameter in self.local:
                self._reduce(parameter, self.local.pop(parameter))
        self._end_pass()
        if self.shared:
            group, parameters = self.shared
            gradients = [self.reduced[parameter] for parameter in parameters if parameter in self.reduced]
            total = torch.cat(gradients).float()
            with waiting():
                dist.all_reduce(total, group=group)
            torch._foreach_copy_(gradients, list(total.split([gradient.numel() for gradient in gradients])))

    def _padded(self, gradient: Tensor) -> Tensor:
        """Return a flat gradient, padded to a length divisible by the number of parts."""
        padding = -gradient.numel() % self.rows
        return F.pad(gradient, (0, padding)) if padding else gradient


class _WeightGatherer:
    """All-gather of working weights: large ones once this rank has updated its part, small ones in one operation."""

    def __init__(self, optimizer: LowLevelZeroOptimizer):
        (self.group,) = optimizer.pg_to_grad_store
        self.whole = optimizer._working_param_to_padded_working_param
        self.small: dict[Parameter, Tensor] = {}
        self.in_flight: list[dist.Work] = []

    def start(self, part: Part) -> None:
        """Gather the weight of an updated part; a small one waits for `finish`."""
        assert part.working is not None
        if dist.get_world_size(self.group) > 1 and part.parameter.numel() < SMALL:
            self.small[part.parameter] = part.working
        else:
            self.gather(self.whole[part.parameter].view(-1), part.working)

    def gather(self, whole: Tensor, own: Tensor) -> None:
        """Gather a flat weight from the parts that ranks own, unless there is one rank."""
        if dist.get_world_size(self.group) > 1:
            self.in_flight.append(dist.all_gather_into_tensor(whole, own, group=self.group, async_op=True))

    def finish(self) -> None:
        """Gather the small weights, and wait for the large ones."""
        if self.small:
            own = torch.cat(list(self.small.values()))
            gathered = own.new_empty(dist.get_world_size(self.group), own.numel())
            with waiting():
                dist.all_gather_into_tensor(gathered.view(-1), own, group=self.group)
            columns = gathered.split([part.numel() for part in self.small.values()], dim=1)
            for parameter, partitions in zip(self.small, columns, strict=True):
                self.whole[parameter].view_as(partitions).copy_(partitions)
        with waiting():
            for work in self.in_flight:
                work.wait()
        self.small.clear()
        self.in_flight.clear()
