"""Linear layers that multiply in float8, by dynamic scaling; weights, gradients and everything else stay as they are.

Forward: activations and weights as e4m3. Backward: gradients of outputs as e5m2, or as e4m3 if each row has a scale
(Micikevicius et al., arXiv:2209.05433). Backward products are summed in float32.

M is the number of tokens, K and N are the sizes of a layer's input and output.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.overrides import handle_torch_function, has_torch_function
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.job import FLOAT8_ALIGNMENT, ROWWISE, TENSORWISE, Compute, Job
from model_utils import parameter_specs

collective = torch.ops._c10d_functional  # torch.compile traces these
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_MAXIMUM = 2.0**-100  # the reciprocal of its scale is a normal float32 number
# Weights of a layer from which it is faster. Measured on an H200: a model of hidden size 1024 is 3% slower, one of
# hidden size 2048 21% faster.
WORTHWHILE = 2**22
RECOMPILATIONS = 64  # of one function; `convert` says why. At most 28 are needed


class Factor(NamedTuple):
    """A matrix to multiply.

    Attributes:
        values: in float8, or in working precision if there is no scale.
        scale: a float32 scalar, or one for each row [M, 1] or column [1, N].
    """

    values: Tensor
    scale: Tensor | None = None

    def t(self) -> "Factor":
        """Return the transposed matrix."""
        return Factor(self.values.t(), None if self.scale is None else self.scale.t())


def scale_of(tensor: Tensor, dtype: torch.dtype, dim: int | None = None, group: str | None = None) -> Tensor:
    """Return the float32 scale by which `dtype` times the scale has the range of a tensor, or of each row.

    Args:
        dim: the dimension that shares a scale, 0 or 1; None: the whole tensor does.
        group: name of a process group whose ranks each have a part of the rows. Collective if the whole shares a scale.

    Returns:
        A scalar, or the tensor's shape with 1 for `dim`. It is not finite if the tensor has elements that are not.
    """
    magnitudes = tensor.abs()
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)
    largest = largest.float()
    if group is not None and dim is None:
        largest = collective.wait_tensor(collective.all_reduce(largest, "max", group))
    return largest.clamp(min=SMALLEST_MAXIMUM) / torch.finfo(dtype).max


def divide(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor divided by its scale, rounded to float8."""
    limit = torch.finfo(dtype).max
    return (tensor.float() * scale.reciprocal()).clamp(-limit, limit).to(dtype)


def factor(tensor: Tensor, dtype: torch.dtype, dim: int | None = None, group: str | None = None) -> Factor:
    """Return a tensor in float8; see `scale_of`."""
    scale = scale_of(tensor, dtype, dim, group)
    return Factor(divide(tensor, scale, dtype), scale)


def input_factor(hidden: Tensor, rowwise: bool | None, group: str | None = None) -> Factor:
    """Return hidden states [M, K] as the left matrix of a forward product.

    Args:
        rowwise: each row has a scale; None: multiply in working precision.
        group: see `scale_of`.
    """
    return Factor(hidden) if rowwise is None else factor(hidden, E4M3, 1 if rowwise else None, group)


def weight_factor(weight: Tensor, rowwise: bool | None, weight8: Tensor | None, scale: Tensor | None) -> Factor:
    """Return a weight [N, K], whose transpose is the right matrix of a forward product.

    Args:
        weight8, scale: its float8 values and their scale, if they are stored.
    """
    return Factor(weight8, scale) if weight8 is not None else input_factor(weight, rowwise)


def factor_again(tensor: Tensor, rowwise: bool | None, scale: Tensor | None) -> Factor:
    """Return hidden states or a weight as the right matrix of a backward product, which sums over its rows.

    Args:
        tensor: what the forward pass kept: its input, or a weight stored in float8. Float8 values of inputs are not
            kept but computed again; a compiled layer keeps whatever is smaller.
        scale: that of the forward product, unless each row had one.
    """
    if rowwise is None or tensor.dtype == E4M3:
        return Factor(tensor, scale)
    return factor(tensor, E4M3, 0) if scale is None else Factor(divide(tensor, scale, E4M3), scale)


def gradient_factors(gradient: Tensor, rowwise: bool | None, group: str | None = None) -> tuple[Factor, Factor]:
    """Return the gradient of a product [M, N] as it multiplies the weight, and as its transpose multiplies inputs."""
    if rowwise:
        return factor(gradient, E4M3, 1), factor(gradient, E4M3, 0)
    both = Factor(gradient) if rowwise is None else factor(gradient, E5M2, group=group)
    return both, both


def kept_scale(used: Factor, rowwise: bool | None) -> Tensor | None:
    """Return the scale that the backward pass needs of a forward product's factor."""
    return None if rowwise else used.scale


def columns_contiguous(right: Factor) -> Factor:
    """Return a right matrix as float8 kernels take it."""
    return right if right.scale is None else Factor(right.values.t().contiguous().t(), right.scale)


def multiply(left: Factor, right: Factor, dtype: torch.dtype, fast: bool) -> Tensor:
    """Return the product of two matrices.

    Args:
        fast: add up in the tensor cores, which have fewer bits than float32.
    """
    if left.scale is None or right.scale is None:
        return left.values @ right.values
    left_scale, right_scale = left.scale, right.scale
    if left_scale.dim():  # kernels check the stride of the dimension of size 1
        left_scale, right_scale = left_scale.flatten()[:, None], right_scale.flatten()[None]
    values = left.values.contiguous(), columns_contiguous(right).values
    # F.scaled_mm is the public name, but torch.compile cannot trace its arguments (torch 2.11 and 2.13).
    return torch._scaled_mm(*values, left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)


def weight_gradient(gradient: Factor, hidden: Factor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a weight [N, K] from those of its product [M, N] and the hidden states [M, K]."""
    if hidden.scale is not None and (padding := -len(hidden.values) % FLOAT8_ALIGNMENT):
        gradient, hidden = (Factor(F.pad(side.values, (0, 0, 0, padding)), side.scale) for side in (gradient, hidden))
    return multiply(gradient.t(), hidden, dtype, fast=False)


class _Linear(torch.autograd.Function):
    """The product of hidden states [M, K] and the transpose of a weight [N, K]; see `linear`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rowwise: bool, weight8: Tensor | None, weight_scale: Tensor | None
    ) -> Tensor:
        left, right = input_factor(hidden, rowwise), weight_factor(weight, rowwise, weight8, weight_scale)
        kept = weight if weight8 is None else weight8
        ctx.save_for_backward(hidden, kept_scale(left, rowwise), kept, kept_scale(right, rowwise))
        ctx.rowwise = rowwise
        return multiply(left, right.t(), hidden.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, hidden_scale, weight, weight_scale = ctx.saved_tensors
        rows, columns = gradient_factors(gradient, ctx.rowwise)
        own = multiply(rows, factor_again(weight, ctx.rowwise, weight_scale), gradient.dtype, fast=False)
        if not ctx.needs_input_grad[1]:
            return own, None, None, None, None
        right = factor_again(hidden, ctx.rowwise, hidden_scale)
        return own, weight_gradient(columns, right, gradient.dtype), None, None, None


_compiled_linear = torch.compile(_Linear.apply)


def linear(
    hidden: Tensor,
    weight: Tensor,
    rowwise: bool,
    weight8: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Return hidden states [..., K] times the transpose of a weight [N, K], multiplied in float8.

    Args:
        weight: receives the gradient. Its values are not read if `weight8` is given.
        weight8, weight_scale: its float8 values and their scale, if they are stored; not with `rowwise`.
        rowwise: scale each row by itself in forward products, and each column where backward products sum over it;
            instead of whole tensors.
    """
    if has_torch_function((weight,)):  # Gemini gathers its parameters in the calls that it sees
        return handle_torch_function(linear, (weight,), hidden, weight, rowwise, weight8, weight_scale)
    output = _compiled_linear(hidden.flatten(0, -2), weight, rowwise, weight8, weight_scale)
    return output.unflatten(0, hidden.shape[:-1])


class _Float8(nn.Module):
    weight: Tensor
    bias: Any  # a tensor or None
    rowwise: bool
    weight8: Tensor | None = None
    weight_scale: Tensor | None = None

    def product(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.rowwise, self.weight8, self.weight_scale)

    def with_bias(self, output: Tensor) -> Tensor:
        return output if self.bias is None else output + self.bias


class _Whole(_Float8, nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.with_bias(self.product(hidden))


class _Column(_Float8, Linear1D_Col):
    """A layer whose outputs are split over tensor-parallel ranks; engine.split_layers multiplies by its weight."""


class _Row(_Float8, Linear1D_Row):
    """A layer whose inputs are split over tensor-parallel ranks; engine.split_layers multiplies by its weight."""


_CLASSES: dict[type[nn.Module], type[_Float8]] = {nn.Linear: _Whole, Linear1D_Col: _Column, Linear1D_Row: _Row}


def _is_large(weights: int, on_gpu: bool) -> bool:
    return weights >= WORTHWHILE or not on_gpu


def converted(job: Job, on_gpu: bool) -> tuple[int, int]:
    """Return how many of a decoder layer's linear layers multiply in float8, and how many it has.

    Without a GPU, where none gains, all do.
    """
    shapes = [spec.shape for spec in parameter_specs(job.config) if spec.group == "model.layers.0"]
    sizes = [shape.numel() // job.layout.tp for shape in shapes if len(shape) == 2]
    return sum(_is_large(size, on_gpu) for size in sizes) if job.compute.fp8 else 0, len(sizes)


def stored(job: Job, sizes: dict[str, int], on_gpu: bool) -> set[str]:
    """Return which of a rank's weights are stored in float8 alone, of `sizes` by name; see `store_weights`."""
    if job.compute.recipe != TENSORWISE or job.adapters or job.offloads:
        return set()
    return {name for name, size in sizes.items() if "_proj.weight" in name and _is_large(size, on_gpu)}


def describe(job: Job, on_gpu: bool) -> str:
    """Return the working precision, and which layers multiply in float8."""
    compute = job.compute
    if not compute.fp8:
        return compute.mixed_precision
    number, total = converted(job, on_gpu)
    if not number:
        return (
            f"{compute.mixed_precision} (--fp8 has no effect: layers of fewer than {WORTHWHILE:,} weights gain nothing)"
        )
    count = "" if number == total else f"{number} of {total} "
    return f"{compute.mixed_precision}, {count}linear layers in float8 ({compute.recipe})"


def convert(model: nn.Module, compute: Compute) -> None:
    """Have the decoder's linear layers, not adapters, multiply in float8, if `compute` says so and they gain by it."""
    if not compute.fp8:
        return
    # torch compiles `_compiled_linear` for each shape of a weight, with and without gradients, and for one and several
    # numbers of tokens. After the eighth time it would run it eagerly for good.
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    for layer in model.modules():
        for name, module in layer.named_modules() if isinstance(layer, LlamaDecoderLayer) else ():
            kind = None if "lora_" in name else _CLASSES.get(type(module))
            if kind and _gains(module.weight):
                module.__class__, module.rowwise = kind, compute.recipe == ROWWISE


def _gains(weight: Tensor | None) -> bool:
    """Return False for weights of other pipeline stages, and those too small."""
    if weight is None or any(size % FLOAT8_ALIGNMENT for size in weight.shape):
        return False
    return _is_large(weight.numel(), torch.cuda.is_available())


def is_converted(layer: LlamaDecoderLayer) -> bool:
    """Return True if any linear layer of a decoder layer multiplies in float8."""
    return any(isinstance(module, _Float8) for module in layer.modules())


def convert_alike(layer: LlamaDecoderLayer, pattern: LlamaDecoderLayer) -> None:
    """Convert a decoder layer's linear layers as those of `pattern` are."""
    for name, module in pattern.named_modules():
        if isinstance(module, _Float8):
            own: Any = layer.get_submodule(name)
            own.__class__, own.rowwise = type(module), module.rowwise
            own.weight8, own.weight_scale = module.weight8, module.weight_scale


def stored_tensors(layer: LlamaDecoderLayer) -> dict[str, Tensor]:
    """Return the float8 values and scales of a decoder layer's weights that are stored so, by attribute name."""
    modules = [(name, module) for name, module in layer.named_modules() if isinstance(module, _Float8)]
    return {
        f"{name}.{attribute}": tensor
        for name, module in modules
        for attribute in ("weight8", "weight_scale")
        if (tensor := getattr(module, attribute)) is not None
    }


class StoredWeight(NamedTuple):
    """A weight that exists in float8 only, besides its master weight.

    Attributes:
        whole: its values, flat, perhaps padded.
        scale: a float32 scalar.
    """

    whole: Tensor
    scale: Tensor


def store_weights(
    model: nn.Module, allocate: Callable[[nn.Parameter], Tensor | None]
) -> dict[nn.Parameter, StoredWeight]:
    """Replace converted layers' weights in working precision by float8 values, not yet set, where each has one scale.

    Args:
        allocate: returns memory for a parameter's float8 values, flat, perhaps padded; None: its layer stays as it is.
    """
    stored = {}
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, _Float8) or module.rowwise or (whole := allocate(weight)) is None:
            continue
        stored[weight] = StoredWeight(whole, torch.zeros((), device=whole.device))
        values = whole if len(whole) == weight.numel() else whole[: weight.numel()]  # no slices of freed storages
        module.weight8, module.weight_scale = values.view(weight.shape), stored[weight].scale
        empty_values(weight, weight.dtype)
    return stored


def empty_values(parameter: Tensor, dtype: torch.dtype) -> None:
    """Set a parameter's values to NaN that take no memory; it keeps its shape, and a precision for its gradients."""
    parameter.data = torch.full((), math.nan, dtype=dtype, device=parameter.device).expand(parameter.shape)


@torch.no_grad()
def round_weights(weights: Iterable[tuple[Tensor, Tensor, Tensor]], group: ProcessGroup | None = None) -> None:
    """Set stored weights from their master weights. Collective.

    Args:
        weights: this rank's part of a weight's float8 values, the same part of its master weight, and its scale.
        group: the ranks that hold the other parts of the same weights; None: there are none.
    """
    values, masters, scales = zip(*weights, strict=True)
    largest = torch.stack(torch._foreach_norm(masters, math.inf))
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    torch._foreach_copy_(scales, (largest.clamp_(min=SMALLEST_MAXIMUM) / torch.finfo(E4M3).max).unbind())
    for value, master, scale in zip(values, masters, scales, strict=True):
        if master.is_cuda:
            from engine.kernels import divide_  # here, since torch has Triton only where it has CUDA

            divide_(value, master, scale)
        else:
            value.copy_(divide(master, scale, E4M3))
