"""LLaMA's element-wise work in few passes over memory: pieces of the model that torch.compile makes one kernel each.

`fuse` puts them in the place of transformers' own. The pieces hold no parameters, so they serve under every plugin, and
where parameters have hooks that a compiled layer would pass by; where they are plain, whole layers are compiled. Both
are the same arithmetic. Without a GPU, or where the user turns compilation off, all runs as it is written.
"""

import types
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from engine.job import Job
from model_utils import IGNORE_INDEX


class Fusion(Enum):
    """What of the model is compiled."""

    NONE = auto()
    PIECES = auto()
    LAYERS = auto()


def plain(tensor: Any) -> Any:
    """A tensor without Gemini's class, which its parameters pass on to all that is computed from them.

    torch.compile loses the change of precision in `x.to(dtype)` where x is of such a class (torch 2.11 and 2.13).
    """
    if type(tensor) is torch.Tensor or not isinstance(tensor, torch.Tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


@torch.compile
def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Over the targets that count, in float32, which compiled never lies in memory. [N, V] and [N] give a scalar."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


@torch.compile
def _normalized(hidden: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(hidden.dtype)


@torch.compile
def _silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


_rotated = torch.compile(modeling_llama.apply_rotary_pos_emb)


def _rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _rotated(plain(query), plain(key), plain(cos), plain(sin))


def _rms_norm(self: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * _normalized(plain(hidden), self.variance_epsilon)


def _mlp(self: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_silu_product(plain(self.gate_proj(hidden)), plain(self.up_proj(hidden))))


class _RecomputedLayer(LlamaDecoderLayer):
    """A decoder layer that is computed once more in the backward pass.

    Compiled with both passes in sight torch leaves out of the second what no gradient needs: the layer's last product.
    """

    checkpointed: Callable  # calls the layer and recomputes it (recomputation.py)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.checkpointed(super().forward, *args, **kwargs)


def take_checkpoint_function(layer: LlamaDecoderLayer) -> Callable | None:
    """Return and clear the layer's checkpoint function; the compiled layer calls it instead."""
    if "forward" in vars(layer):
        return None
    function, layer.checkpoint_function = getattr(layer, "checkpoint_function", None), None
    return function


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer as a whole."""
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            if function := take_checkpoint_function(module):
                module.__class__, module.checkpointed = _RecomputedLayer, function
            module.compile()


def choose_fusion(job: Job, on_gpu: bool) -> Fusion:
    """Compile layers where no collective operation stands inside them and nothing hooks into their parameters."""
    if not (on_gpu if job.compute.compile is None else job.compute.compile):
        return Fusion.NONE
    layout = job.layout
    whole = not layout.plugin.startswith("fsdp") and layout.tp == layout.sp == 1
    return Fusion.LAYERS if whole else Fusion.PIECES


def fuse(model: nn.Module, fusion: Fusion, compile_layers: Callable[[Any], None] = compile_layers) -> None:
    """Compile a boosted model's layers, or put the fused pieces in their place; without fusion all stays as written."""
    torch.compiler.set_stance("force_eager" if fusion is Fusion.NONE else "default")
    if fusion is Fusion.LAYERS:
        compile_layers(model)
    if fusion is not Fusion.PIECES:
        return
    modeling_llama.apply_rotary_pos_emb = _rotary
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = types.MethodType(_rms_norm, module)
        elif isinstance(module, LlamaMLP) and isinstance(module.act_fn, nn.SiLU):
            module.forward = types.MethodType(_mlp, module)
