"""Linear layers that multiply in float8, by dynamic scaling; weights, gradients and everything else stay as they are.

Forward: activations and weights as e4m3. Backward: gradients of outputs as e5m2, or as e4m3 if each row has a scale
(Micikevicius et al., arXiv:2209.05433). Backward products are summed in float32.

M is the number of tokens, K and N are the sizes of a layer's input and output.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_MAXIMUM = 2.0**-100  # the reciprocal of its scale is a normal float32 number
# Weights of a layer from which it is faster. Measured on an H200: a model of hidden size 1024 is 3% slower, one of
# hidden size 2048 21% faster.
WORTHWHILE = 2**22
RECOMPILATIONS = 64  # of one function; `convert` says why. At most 28 are needed


def scale_of(tensor: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """Return the float32 scale by which `dtype` times the scale has the range of a tensor, or of each row.

    Args:
        dim: the dimension that shares a scale, 0 or 1; None: the whole tensor does.

    Returns:
        A scalar, or the tensor's shape with 1 for `dim`. It is not finite if the tensor has elements that are not.
    """
    magnitudes = tensor.abs()
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)
    return largest.float().clamp(min=SMALLEST_MAXIMUM) / torch.finfo(dtype).max


def divide(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor divided by its scale, rounded to float8."""
    limit = torch.finfo(dtype).max
    return (tensor.float() * scale.reciprocal()).clamp(-limit, limit).to(dtype)


def _multiply(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """Return the product of two float8 matrices times their scales.

    Args:
        fast: add up in the tensor cores, which have fewer bits than float32.
    """
    if left_scale.dim():  # kernels check the stride of the dimension of size 1
        left_scale, right_scale = left_scale.flatten()[:, None], right_scale.flatten()[None]
    columns = right.t().contiguous().t()  # kernels take a right matrix whose columns are contiguous
    # F.scaled_mm is the public name, but torch.compile cannot trace its arguments (torch 2.11 and 2.13).
    return torch._scaled_mm(left.contiguous(), columns, left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)


def products(
    hidden: Tensor, weight: Tensor, rowwise: bool, weight8: Tensor | None, weight_scale: Tensor | None, parts: int = 1
) -> tuple[list[Callable[[], Tensor]], list[Tensor]]:
    """Return functions that multiply parts of hidden states [M, K] by the transpose of a weight [N, K]; see `linear`.

    Returns:
        A function for each part of the rows, in order, and the tensors that `gradient_products` needs. These are the
        inputs, not their float8 values: a compiled layer keeps whatever is smaller.
    """
    across = 1 if rowwise else None
    hidden_scale = scale_of(hidden, E4M3, across)
    if weight_scale is None:
        weight_scale = scale_of(weight, E4M3, across)
    kept = [hidden, weight if weight8 is None else weight8, *([] if rowwise else [hidden_scale, weight_scale])]
    hidden8 = divide(hidden, hidden_scale, E4M3)
    if weight8 is None:
        weight8 = divide(weight, weight_scale, E4M3)
    scales = split_rows(hidden_scale, parts) if rowwise else [hidden_scale] * parts
    return [
        partial(_multiply, rows, weight8.t(), scale, weight_scale.t(), hidden.dtype, fast=True)
        for rows, scale in zip(split_rows(hidden8, parts), scales, strict=True)
    ], kept


def split_rows(tensor: Tensor, parts: int) -> list[Tensor]:
    """Return so many parts of a tensor's rows; the last may be longer."""
    rows = len(tensor) // parts
    return [tensor[rows * part : rows * (part + 1)] for part in range(parts - 1)] + [tensor[rows * (parts - 1) :]]


def gradient_products(
    gradient: Tensor, kept: Sequence[Tensor], stored: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return functions that compute the gradients of hidden states and weight from that of their product [M, N].

    Args:
        kept: what `products` returned.
        stored: it got `weight8`.
    """
    hidden, weight, *scales = kept
    if scales:
        gradient_scale = scale_of(gradient, E5M2)
        gradient8 = columns8 = divide(gradient, gradient_scale, E5M2)
        columns_scale, (hidden_scale, weight_scale) = gradient_scale, scales
    else:
        gradient_scale, columns_scale = scale_of(gradient, E4M3, 1), scale_of(gradient, E4M3, 0)
        gradient8, columns8 = divide(gradient, gradient_scale, E4M3), divide(gradient, columns_scale, E4M3)
        hidden_scale, weight_scale = scale_of(hidden, E4M3, 0), scale_of(weight, E4M3, 0)

    def hidden_gradient() -> Tensor:
        weight8 = weight if stored else divide(weight, weight_scale, E4M3)
        return _multiply(gradient8, weight8, gradient_scale, weight_scale, gradient.dtype, fast=False)

    def weight_gradient() -> Tensor:
        left, right = columns8, divide(hidden, hidden_scale, E4M3)
        if padding := -len(hidden) % FLOAT8_ALIGNMENT:
            left, right = F.pad(left, (0, 0, 0, padding)), F.pad(right, (0, 0, 0, padding))
        return _multiply(left.t(), right, columns_scale.t(), hidden_scale, gradient.dtype, fast=False)

    return hidden_gradient, weight_gradient


class _Linear(torch.autograd.Function):
    """The product of hidden states [M, K] and the transpose of a weight [N, K]; see `linear`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rowwise: bool, weight8: Tensor | None, weight_scale: Tensor | None
    ) -> Tensor:
        (product,), kept = products(hidden, weight, rowwise, weight8, weight_scale)
        ctx.save_for_backward(*kept)
        ctx.stored = weight8 is not None
        return product()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_gradient, weight_gradient = gradient_products(gradient, ctx.saved_tensors, ctx.stored)
        return hidden_gradient(), weight_gradient() if ctx.needs_input_grad[1] else None, None, None, None


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
        return handle_torch_function(linear, (weight,), hidden, weight, rowwise)
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


def stored_elements(job: Job, sizes: dict[str, int], on_gpu: bool) -> int:
    """Return how many of a rank's weights are stored in float8 alone, of `sizes` by name; see `store_weights`."""
    compute, layout = job.compute, job.layout
    if compute.recipe != TENSORWISE or job.adapters or layout.traits.on_host:
        return 0
    return sum(size for name, size in sizes.items() if "_proj.weight" in name and _is_large(size, on_gpu))


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
            own = layer.get_submodule(name)
            own.__class__, own.rowwise = type(module), module.rowwise


class StoredWeight(NamedTuple):
    """A weight that exists in float8 only, besides its master weight.

    Attributes:
        whole: its values, flat, perhaps padded.
        scale: a float32 scalar.
    """

    whole: Tensor
    scale: Tensor


def store_weights(model: nn.Module, padded_sizes: dict[nn.Parameter, int]) -> dict[nn.Parameter, StoredWeight]:
    """Replace converted layers' weights in working precision by float8 values, not yet set, where each has one scale.

    The parameters keep their shape and precision, for their gradients, but their values are NaN and take no memory.

    Args:
        padded_sizes: elements to allocate, for the parameters to replace if their layers are converted.
    """
    stored = {}
    for module in model.modules():
        if not isinstance(module, _Float8) or module.rowwise or module.weight not in padded_sizes:
            continue
        weight: Any = module.weight
        whole = weight.new_empty(padded_sizes[weight], dtype=E4M3)
        stored[weight] = StoredWeight(whole, weight.new_zeros((), dtype=torch.float32))
        module.weight8, module.weight_scale = whole[: weight.numel()].view(weight.shape), stored[weight].scale
        weight.data = weight.new_full((), math.nan).expand(weight.shape)
    return stored


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
