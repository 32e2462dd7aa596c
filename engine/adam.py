"""ColossalAI's AdamW, for states on the GPU and in host memory, with gradients in the working precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer
from torch import Tensor


@dataclass
class Part:
    """This rank's part of one parameter, all flat or all in its shape: `gradient` and `working` are views.

    Attributes:
        parameter: the model's own.
        working: the part, in the working precision, of the parameter that the model computes with.
        master: the float32 weight.
    """

    parameter: torch.nn.Parameter
    working: torch.Tensor
    master: torch.Tensor
    gradient: torch.Tensor


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
    """AdamW (arXiv:1711.05101) as ColossalAI's kernel computes it, and the weight in `working` precision, in one pass.

    All tensors have one shape; the numbers are tensors too, or torch.compile would take them for constants.
    """
    gradient = gradient.float() / scale
    moment.copy_(beta1 * moment + (1 - beta1) * gradient)
    square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
    update = moment / correction1 / ((square / correction2).sqrt() + epsilon) + decay * master
    master.sub_(lr * update)
    if working is not None:
        working.copy_(master)


class Adam(HybridAdam):
    """ColossalAI's AdamW for states on GPU and host, which takes gradients on the host in any precision.

    HybridAdam's own path for bf16 gradients on the host ignores the scale by which gradients are clipped; widened, they
    take its C++ path, which does not. With `fused`, its kernel for the GPU gives way to one that also writes the
    working weights of `parts`, which it finds by the address of a master weight, and calls `updated` with each.
    """

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transfers: dict[torch.Tensor, HostTransfer] = {}
        self.parts: dict[int, Part] = {}
        self.updated: Callable[[Part], None] = lambda part: None
        self._scratch = torch.empty(0)
        self.fused = fused and torch.cuda.is_available()
        if self.fused:
            self.gpu_adam_op = self._update_on_device

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
        """In the place of `multi_tensor_adam`, whose arguments these are."""
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

    def _pre_update(self, parameter: torch.Tensor, *state_keys: str) -> None:
        if parameter in self.transfers:
            self.transfers[parameter].arrived.synchronize()
        if parameter.grad is not None and parameter.grad.dtype is not torch.float32:
            if self._scratch.numel() < parameter.numel():
                self._scratch = torch.empty(parameter.numel())
            wide = self._scratch[: parameter.numel()].view(parameter.shape)
            parameter.grad = wide.copy_(parameter.grad)

    def _post_update(self, parameter: torch.Tensor, *state_keys: str) -> None:
        parameter.grad = None
        if parameter in self.transfers:
            self.transfers[parameter].send(parameter)


gemini_optimizer._AVAIL_OPTIM_LIST.add(Adam)  # Gemini takes the classes of this set, not their subclasses


class HostTransfer:
    """The way of one gradient from the GPU to the host, and of the updated weight back through the same buffer."""

    def __init__(self, gradient: torch.Tensor, stream: torch.cuda.Stream):
        self.buffer = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        self.arrived = torch.cuda.Event()
        self.stream = stream
        self.target: torch.Tensor  # of the way back

    def receive(self, gradient: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.buffer.copy_(gradient, non_blocking=True)
        self.arrived.record()
        self.target = target
        return self.buffer

    def send(self, master: torch.Tensor) -> None:
        self.buffer.copy_(master)
        with torch.cuda.stream(self.stream):
            self.target.copy_(self.buffer, non_blocking=True)


def lend_gradient(master: torch.Tensor, gradient: torch.Tensor) -> None:
    """Sets a gradient of another precision than its tensor's, which torch allows by this detour alone."""
    weight = master.data
    master.data = gradient
    master.grad = gradient
    master.data = weight
