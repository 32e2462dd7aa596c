"""One optimizer step under mixed precision: gradient norm, clipping, AdamW, and the working weights.

Symptom: ColossalAI's `step` reads and writes each gradient and weight several times more than AdamW needs.
Cause: it casts every gradient to float32, takes its norm in float64 and scales it in place. It copies the weights one
    by one, and through pageable memory if the optimizer states are in host memory.
Fix: `update` does the same arithmetic. AdamW reads gradients in any precision and divides them as it reads.
    States in host memory are updated parameter by parameter while later gradients and earlier weights are being copied.
Remove when: ColossalAI's `step` makes no more passes than this one.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin, MixedPrecisionMixin
from colossalai.amp.naive_amp.mixed_precision_optimizer import NaiveFP16MixedPrecisionMixin
from colossalai.nn.optimizer import HybridAdam
from colossalai.tensor.d_tensor import is_distributed_tensor
from colossalai.zero.gemini import gemini_optimizer
from colossalai.zero.low_level.low_level_optim import LowLevelZeroFP16MixedPrecisionMixin
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.patching import replace
from engine.waits import waiting


@dataclass
class Part:
    """This rank's part of one parameter; the tensors are all flat or all of the parameter's shape.

    Attributes:
        parameter: the model's parameter.
        working: the part of it that this rank updates, in the working precision, a view; None if `update` leaves it to
            `engine.float8.round_weights`.
        master: the float32 master weight of that part.
        gradient: the gradient of that part, in float32 or the working precision.
    """

    parameter: torch.nn.Parameter
    working: Tensor | None
    master: Tensor
    gradient: Tensor


@torch.no_grad()
def update(
    adam: "Adam",
    parts: list[Part],
    precision: MixedPrecisionMixin | None,
    max_norm: float,
    groups: Iterable[ProcessGroup],
    tp_group: ProcessGroup | None,
    updated: Callable[[Part], None] = lambda part: None,
    rejects: Callable[[float], bool] | None = None,
) -> float:
    """Clip the gradients and update the weights, as ColossalAI's `optimizer.step()` does.

    Args:
        precision: its loss scale multiplied the gradients; under fp16 an overflow skips the update.
        max_norm: largest norm; 0: no clipping.
        groups: the groups of ranks that hold other parts of the model, or of a parameter.
        tp_group: that of `groups` whose ranks may hold the same gradients, or None.
        updated: called once the update of a part's working weight has been launched, if there is one.
        rejects: called with the value to return unless fp16 overflowed; True skips the update.

    Returns:
        The norm before clipping, times the loss scale.
    """
    on_host = [part for part in parts if part.master.device != part.gradient.device]
    on_device = [part for part in parts if part.master.device == part.gradient.device]
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    squared_norm = _squared_norm(parts, groups, tp_group)
    if rejects and len(groups) > 1:  # its last bits may differ between groups, and all ranks must decide alike
        dist.all_reduce(squared_norm, dist.ReduceOp.MAX)
    for part in on_device:  # while the GPU computes the norm
        _set_gradient(part.master, part.gradient)
    norm = squared_norm.sqrt()
    may_skip = rejects is not None or isinstance(precision, FP16MixedPrecisionMixin)
    on_time = adam.fused and not on_host and not may_skip  # the host need not wait for the norm
    if isinstance(precision, FP16MixedPrecisionMixin):
        precision.gradient_norm = norm.item()
    if (precision is not None and precision.should_skip_step()) or (rejects and rejects(norm.item())):
        for part in on_device:
            part.master.grad = None
        return norm.item()

    scale = 1.0 if precision is None else precision.get_grad_div_scale()
    if max_norm > 0 and on_time:
        adam.divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    elif max_norm > 0:
        scale *= max(1.0, (norm.item() / scale + 1e-6) / max_norm)
    _copy_to_host(adam, on_host)
    for part in on_host:
        _set_gradient(part.master, part.gradient)
    rounded = [part for part in on_device if part.working is not None]
    adam.parts, adam.updated = {part.master.data_ptr(): part for part in rounded}, updated
    adam.step(div_scale=scale)
    adam.parts, adam.divisor = {}, None  # frees the gradients
    for part in parts:
        part.master.grad = None
    if on_host:
        torch.cuda.current_stream().wait_stream(adam.transfers[on_host[0].master].stream)
    if rounded and not adam.fused:
        torch._foreach_copy_(
            [part.working for part in rounded if part.working is not None], [part.master for part in rounded]
        )
    if on_host or not adam.fused:
        for part in on_host + rounded:
            updated(part)
    return norm.item()


def _squared_norm(parts: list[Part], groups: Iterable[ProcessGroup], tp_group: ProcessGroup | None) -> Tensor:
    """Return the squared L2 norm over the groups' parts; gradients that tensor-parallel ranks replicate count once."""
    squares = torch.stack(torch._foreach_norm([part.gradient for part in parts], 2, dtype=torch.float32)).square_()
    if tp_group is not None and (tp_size := dist.get_world_size(tp_group)) > 1:
        fractions = [1.0 if is_distributed_tensor(part.parameter) else 1.0 / tp_size for part in parts]
        squares *= torch.tensor(fractions, device=squares.device)
    total = squares.sum()
    with waiting():
        for group in groups:
            dist.all_reduce(total, group=group)
    return total


@functools.cache
def patch_loss_scaling() -> None:
    """Patch fp16 training under every plugin. Call before a step; later calls do nothing.

    Gradients divided by another scale:
        Symptom: every 1000th step without an overflow updates the moments, and clips, as if gradients were half as
            large.
        Cause: `should_skip_step` lets the scale grow before `get_grad_div_scale` reads it.
        Fix: `should_skip_step` stores the scale first, and `get_grad_div_scale` returns the stored one.
        Remove when: ColossalAI updates its scale after the step, as torch.amp.GradScaler does.

    Overflow:
        Symptom: a step reads every gradient two more times.
        Cause: `check_local_overflow` looks for elements that are infinite or NaN.
        Fix: it checks the norm that `update` has computed, which is finite only if all elements are.
        Remove when: ColossalAI checks the norm.
    """
    decide, divisor = FP16MixedPrecisionMixin.should_skip_step, FP16MixedPrecisionMixin.get_grad_div_scale

    def should_skip_step(self: FP16MixedPrecisionMixin) -> bool:
        self.scale_of_gradients = self.loss_scale
        return decide(self)

    def get_grad_div_scale(self: FP16MixedPrecisionMixin) -> float:
        divisor(self)  # for its side effect
        return self.scale_of_gradients

    def check_local_overflow(self: FP16MixedPrecisionMixin) -> bool:
        return not math.isfinite(self.gradient_norm)

    replace(FP16MixedPrecisionMixin, "should_skip_step", should_skip_step)
    replace(FP16MixedPrecisionMixin, "get_grad_div_scale", get_grad_div_scale)
    for mixin in (LowLevelZeroFP16MixedPrecisionMixin, NaiveFP16MixedPrecisionMixin):
        replace(mixin, "check_local_overflow", check_local_overflow)


class Adam(HybridAdam):
    """ColossalAI's AdamW for states on the GPU and in host memory, with host gradients in any precision.

    Host gradients: HybridAdam's bf16 path ignores the divisor that unscales and clips. Gradients cast to float32 take
    its C++ path, which divides.

    Fused update on the GPU:
        Symptom: with master weights, each update reads the weights once more to copy them to the working precision.
        Cause: HybridAdam's CUDA kernel, `gpu_adam_op`, writes float32 weights only.
        Fix: with `fused`, a kernel of our own also writes the working weights. `parts` maps the address of a master
            weight to its part; `updated` is called with each part once its update has been launched.
        Remove when: ColossalAI's kernel writes the working precision too.

    Attributes:
        transfers: pinned buffers of the master weights in host memory.
        parts: the parts whose working weights to write, by the address of their master weight.
        updated: callback for each of these parts.
        rejects: returns True if `step` shall do nothing; None: it never does.
        divisor: a scalar on the GPU that also divides the gradients of a fused update, so that the host need not know
            it; None: nothing does.
    """

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transfers: dict[Tensor, HostTransfer] = {}
        self.parts: dict[int, Part] = {}
        self.updated: Callable[[Part], None] = lambda part: None
        self.rejects: Callable[[], bool] | None = None
        self.divisor: Tensor | None = None
        self._scratch = torch.empty(0)
        self.fused = fused and torch.cuda.is_available()
        if self.fused:
            replace(self, "gpu_adam_op", self._update_on_device)

    def step(self, closure: None = None, div_scale: float = -1) -> None:
        """Update the weights, unless `rejects` says otherwise."""
        if not (self.rejects and self.rejects()):
            super().step(div_scale=div_scale)

    def _update_on_device(
        self,
        chunk: int,
        overflowed: Tensor,
        tensors: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        mode: int,
        correct: bool,
        decay: float,
        scale: float,
    ) -> None:
        """Update tensors on the GPU; takes the arguments of ColossalAI's `multi_tensor_adam`."""
        from engine.kernels import adamw_  # here, since torch has Triton only where it has CUDA

        corrections = (1 - beta1**step, 1 - beta2**step) if correct else (1.0, 1.0)
        given = (lr, beta1, beta2, epsilon, decay, *corrections, scale if scale > 0 else 1.0)
        values = tuple(map(float, given))  # Triton would take a tensor for an address, and 1 for a constant
        for gradient, master, moment, square in zip(*tensors, strict=True):
            part = self.parts.get(master.data_ptr())
            adamw_(master, moment, square, gradient, part.working if part else None, self.divisor, values)
            if part:
                self.updated(part)

    def _pre_update(self, parameter: Tensor, *state_keys: str) -> None:
        if parameter in self.transfers:
            self.transfers[parameter].copied.synchronize()
        if parameter.grad is not None and parameter.grad.dtype is not torch.float32:
            if self._scratch.numel() < parameter.numel():
                self._scratch = torch.empty(parameter.numel())
            float32 = self._scratch[: parameter.numel()].view(parameter.shape)
            parameter.grad = float32.copy_(parameter.grad)

    def _post_update(self, parameter: Tensor, *state_keys: str) -> None:
        parameter.grad = None
        if parameter in self.transfers:
            self.transfers[parameter].copy_to_device(parameter)


def let_gemini_take_adam() -> None:
    """Add `Adam` to the optimizers that Gemini accepts. Call before Gemini's plugin boosts; a second call is harmless.

    Symptom: GeminiOptimizer refuses `Adam` with "You should use an optimizer in the available list".
    Cause: it looks up the exact type in a set, so a subclass of HybridAdam is not found.
    Fix: add the subclass to the set.
    Remove when: GeminiOptimizer uses isinstance.
    """
    replace(gemini_optimizer, "_AVAIL_OPTIM_LIST", gemini_optimizer._AVAIL_OPTIM_LIST | {Adam})


class HostTransfer:
    """A pinned buffer for a gradient's device-to-host copy, then for the updated weight's host-to-device copy.

    Args:
        gradient: a tensor of the buffer's shape and dtype.
        stream: side stream of the copies to the device.
    """

    def __init__(self, gradient: Tensor, stream: torch.cuda.Stream):
        self.buffer = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        self.copied = torch.cuda.Event()  # the gradient is in the buffer
        self.stream = stream
        self.working: Tensor

    def copy_to_host(self, gradient: Tensor, working: Tensor) -> Tensor:
        """Start the gradient's copy and return the buffer; the weight will be copied back to `working`."""
        self.buffer.copy_(gradient, non_blocking=True)
        self.copied.record()
        self.working = working
        return self.buffer

    def copy_to_device(self, master: Tensor) -> None:
        """Start the copy of the updated weight to the device."""
        self.buffer.copy_(master)
        with torch.cuda.stream(self.stream):
            self.working.copy_(self.buffer, non_blocking=True)


def _set_gradient(master: Tensor, gradient: Tensor) -> None:
    """Set `master.grad` to a gradient of another dtype, which torch allows only while `master.data` has that dtype."""
    weight = master.data
    master.data = gradient
    master.grad = gradient
    master.data = weight


def _copy_to_host(adam: Adam, parts: list[Part]) -> None:
    """Start the device-to-host copies of the gradients; each part's `gradient` becomes the pinned buffer."""
    for part in parts:
        assert part.working is not None  # weights are stored in float8 only if their masters are on the device
        if part.master not in adam.transfers:
            stream = next(iter(adam.transfers.values())).stream if adam.transfers else torch.cuda.Stream()
            adam.transfers[part.master] = HostTransfer(part.gradient, stream)
        part.gradient = adam.transfers[part.master].copy_to_host(part.gradient, part.working)
