"""ColossalAI's AdamW on the GPU or in host memory, with gradients in the working precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer
from torch import Tensor

from engine.patching import replace


@dataclass
class Part:
    """This rank's part of one parameter; the three tensors are all flat or all of the parameter's shape.

    Attributes:
        parameter: the model's parameter.
        working: the part of it that this rank updates, in the working precision; a view.
        master: the float32 master weight of that part.
        gradient: the gradient of that part, in the working precision; a view.
    """

    parameter: torch.nn.Parameter
    working: Tensor
    master: Tensor
    gradient: Tensor


@torch.compile(dynamic=True)
def _adamw(
    master: Tensor,
    moment: Tensor,
    square: Tensor,
    gradient: Tensor,
    working: Tensor | None,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    epsilon: Tensor,
    decay: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    scale: Tensor,
) -> None:
    """Update by AdamW (arXiv:1711.05101) as ColossalAI's kernel does, and round the weight to `working`, in one pass.

    All tensors have the same shape. The scalars are tensors too: torch.compile would treat numbers as constants.
    """
    gradient = gradient.float() / scale
    moment.copy_(beta1 * moment + (1 - beta1) * gradient)
    square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
    update = moment / correction1 / ((square / correction2).sqrt() + epsilon) + decay * master
    master.sub_(lr * update)
    if working is not None:
        working.copy_(master)


class Adam(HybridAdam):
    """ColossalAI's AdamW for states on the GPU and in host memory, with host gradients in any precision.

    Host gradients: HybridAdam's bf16 path ignores the divisor that unscales and clips. Gradients cast to float32 take
    its C++ path, which divides.

    Fused update on the GPU:
        Symptom: with master weights, each update reads the weights once more to copy them to the working precision.
        Cause: HybridAdam's CUDA kernel, `gpu_adam_op`, writes float32 weights only.
        Fix: with `fused`, a compiled kernel also writes the working weights. `parts` maps the address of a master
            weight to its part; `updated` is called with each part once its update has been launched.
        Remove when: ColossalAI's kernel writes the working precision too.

    Attributes:
        transfers: pinned buffers of the master weights in host memory.
        parts: the parts whose working weights to write, by the address of their master weight.
        updated: callback for each of these parts.
    """

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transfers: dict[Tensor, HostTransfer] = {}
        self.parts: dict[int, Part] = {}
        self.updated: Callable[[Part], None] = lambda part: None
        self._scratch = torch.empty(0)
        self.fused = fused and torch.cuda.is_available()
        if self.fused:
            replace(self, "gpu_adam_op", self._update_on_device)

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
        corrections = (1 - beta1**step, 1 - beta2**step) if correct else (1.0, 1.0)
        values = (lr, beta1, beta2, epsilon, decay, *corrections, scale if scale > 0 else 1.0)
        numbers = torch.tensor(values, dtype=torch.float32).to(tensors[0][0].device, non_blocking=True).unbind()
        for gradient, master, moment, square in zip(*tensors, strict=True):
            part = self.parts.get(master.data_ptr())
            working = part.working.view(-1) if part else None
            states = (tensor.view(-1) for tensor in (master, moment, square, gradient))
            _adamw(*states, working, *numbers)  # type: ignore[call-arg]
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


def set_gradient(master: Tensor, gradient: Tensor) -> None:
    """Set `master.grad` to a gradient of another dtype, which torch allows only while `master.data` has that dtype."""
    weight = master.data
    master.data = gradient
    master.grad = gradient
    master.data = weight
