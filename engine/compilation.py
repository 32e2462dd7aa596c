"""Compilation of LLaMA: whole decoder layers, or each of its element-wise pieces as one kernel.

Symptom: element-wise operations take as long as some matrix products, since each reads and writes whole activations.
Cause: transformers' RMSNorm, rotary embedding and MLP run one kernel per operation.
Fix: `fuse` compiles whole layers where parameters are plain tensors. Elsewhere this would lose the hooks on parameters,
    so it replaces these three with compiled pieces that hold no parameters. The arithmetic stays the same.
Remove when: every plugin's model can be compiled as a whole.

Without a GPU, or with --no-compile, the model runs as transformers wrote it.
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
from engine.patching import replace


class Fusion(Enum):
    """Extent of compilation: nothing, element-wise pieces, or whole decoder layers."""

    NONE = auto()
    PIECES = auto()
    LAYERS = auto()


def plain(tensor: Any) -> Any:
    """Return a tensor as a plain torch.Tensor; results computed from Gemini's parameters have Gemini's tensor class.

    torch.compile drops the cast in `x.to(dtype)` if x has that class (torch 2.11 and 2.13).
    """
    if type(tensor) is torch.Tensor or not isinstance(tensor, torch.Tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


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
    """A decoder layer that is compiled together with its activation checkpointing.

    The compiler sees both passes, and does not recompute the layer's last product, which no gradient needs.
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


def compile_layers(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Compile each decoder layer as a whole, with these options of torch.compile."""
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            if function := take_checkpoint_function(module):
                module.__class__, module.checkpointed = _RecomputedLayer, function
            module.compile(options=options)


def forget_shapes(fusion: Fusion) -> None:
    """Begin anew for batches of another shape, as a process does that resumes with them.

    Symptom: after a change of the sequence length a run computes other bits than its resume.
    Cause: torch.compile makes a function general in a size that has changed, so it computes in another order than one
        made for the new size alone. Memory of the old sizes stays reserved, in pieces that do not fit.
    Fix: drop what is compiled, and unused memory.
    Remove when: sequences have one length in all stages.
    """
    if fusion is not Fusion.NONE:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def choose_fusion(job: Job, on_gpu: bool) -> Fusion:
    """Return LAYERS unless layers have hooks on parameters, or collective operations that cannot be traced."""
    by_default = on_gpu and not (job.compute.deterministic and job.length_varies)  # see determinism.py
    if not (by_default if job.compute.compile is None else job.compute.compile):
        return Fusion.NONE
    traits = job.layout.traits
    whole = traits.compiles_layers and (traits.splits or job.layout.tp == 1)
    return Fusion.LAYERS if whole else Fusion.PIECES


def fuse(model: nn.Module, fusion: Fusion, compile_layers: Callable[[Any], None] = compile_layers) -> None:
    """Compile a boosted model's layers, or replace their element-wise pieces; with Fusion.NONE, run eagerly."""
    torch.compiler.set_stance("force_eager" if fusion is Fusion.NONE else "default")
    if fusion is Fusion.LAYERS:
        compile_layers(model)
    if fusion is not Fusion.PIECES:
        return
    replace(modeling_llama, "apply_rotary_pos_emb", _rotary)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            replace(module, "forward", types.MethodType(_rms_norm, module))
        elif isinstance(module, LlamaMLP) and isinstance(module.act_fn, nn.SiLU):
            replace(module, "forward", types.MethodType(_mlp, module))
