"""Decoder layers of tensor-parallel (Megatron-LM, arXiv:1909.08053) and sequence-parallel (DeepSpeed-Ulysses,
arXiv:2309.14509) ranks, which torch compiles as a whole.

Symptom: with tensor parallelism, a third of a step passes in element-wise operations and in waiting for other ranks.
Cause: ColossalAI's linear layers call collective operations that torch.compile cannot trace. Each of a layer's five
    column-parallel products has its own all-reduce in the backward pass, and the forward pass waits for every one.
    Without its flash kernel, its attention for split sequences applies no causal mask unless it is given one.
Fix: `SplitPolicy` replaces the forward functions of attention and MLP by ones that torch.compile traces. Between these,
    a tensor-parallel rank holds the hidden states of its part of the tokens (Korthikanti et al., arXiv:2205.05198).
    They are gathered while the first products are computed, and summed over ranks while the last one is
    (engine/overlap.py).
Remove when: ColossalAI's layers do this.

B is the batch size, S the sequence length, M = B S / P the tokens of a sequence-parallel rank, padded to a multiple of
T; H heads, D the head dimension, T and P the tensor- and sequence-parallel size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colossalai.shardformer.policies.llama import LlamaForCausalLMPolicy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from attn import EAGER
from engine import float8, overlap
from engine.float8 import Factor, collective
from engine.patching import replace

# Options of torch.compile: start collective operations as early, and wait for them as late, as their operands allow.
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}


def _gather(shard: Tensor, group: ProcessGroup) -> Tensor:
    """Return all ranks' rows; collective."""
    return collective.all_gather_into_tensor(shard.contiguous(), group.size(), group.group_name)


def _gather_and_multiply(
    shard: Factor, rights: Sequence[Factor], group: ProcessGroup, dtype: torch.dtype, fast: bool
) -> list[Tensor]:
    """Gather a left matrix and multiply it; see engine.overlap.gather_and_multiply."""
    scale = shard.scale
    if scale is not None and scale.dim():
        scale = collective.wait_tensor(_gather(scale, group))
    values, scales = _operands(rights)
    return overlap.gather_and_multiply(shard.values, scale, values, scales, group.group_name, dtype, fast)


def _multiply_and_reduce(
    lefts: Sequence[Factor],
    rights: Sequence[Factor],
    group: ProcessGroup,
    dtype: torch.dtype,
    fast: bool,
    shard: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return this rank's rows of a sum of products over all ranks; see engine.overlap.multiply_and_exchange.

    Args:
        shard: of another matrix.

    Returns:
        The rows, and the other matrix in a list, which is empty if there is none.
    """
    values, scales = [left.values for left in lefts], [left.scale for left in lefts if left.scale is not None]
    parts, *whole = overlap.multiply_and_exchange(
        values, scales, *_operands(rights), group.group_name, dtype, fast, shard
    )
    return parts.sum(0), whole


def _operands(rights: Sequence[Factor]) -> tuple[list[Tensor], list[Tensor]]:
    contiguous = [float8.columns_contiguous(right) for right in rights]
    return [right.values for right in contiguous], [right.scale for right in contiguous if right.scale is not None]


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


class _Columns(torch.autograd.Function):
    """Products of a shard [M/T, K] of hidden states, gathered, with several weights [N/T, K], each perhaps in float8.

    Its arguments after `kinds` are three for each weight: the weight, its float8 values and their scale, or None.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup, kinds: tuple[bool | None, ...], *tensors: Any) -> Any:
        layers = list(zip(kinds, *(tensors[first::3] for first in range(3)), strict=True))
        weights = [float8.weight_factor(weight, kind, weight8, scale) for kind, weight, weight8, scale in layers]
        outputs: dict[int, Tensor] = {}
        inputs: dict[bool | None, Factor] = {}
        for kind in dict.fromkeys(kinds):
            own = [number for number, other in enumerate(kinds) if other is kind]
            left = float8.input_factor(hidden, kind, group.group_name)
            rights = [weights[number].t() for number in own]
            _, *products = _gather_and_multiply(left, rights, group, hidden.dtype, fast=True)
            outputs.update(zip(own, products, strict=True))
            # With one scale, float8 values serve both passes; the backward pass sums over the other dimension.
            inputs[kind] = left if kind is False else Factor(hidden)
        kept = [weight if weight8 is None else weight8 for _, weight, weight8, _ in layers]
        weight_scales = [float8.kept_scale(weight, kind) for weight, kind in zip(weights, kinds, strict=True)]
        shards = [side for left in inputs.values() for side in left]
        ctx.save_for_backward(*kept, *weight_scales, *shards)
        ctx.group, ctx.kinds = group, kinds
        return tuple(outputs[number] for number in range(len(kinds)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kinds, dtype, number = ctx.kinds, gradients[0].dtype, len(ctx.kinds)
        saved = ctx.saved_tensors
        weights, weight_scales = saved[:number], saved[number : 2 * number]
        shards = dict(zip(dict.fromkeys(kinds), _pairs(saved[2 * number :]), strict=True))
        factors = [float8.gradient_factors(gradient, kind) for gradient, kind in zip(gradients, kinds, strict=True)]
        total, inputs = None, {}
        for kind, (shard, scale) in shards.items():
            own = [place for place, other in enumerate(kinds) if other is kind]
            lefts = [factors[place][0] for place in own]
            rights = [float8.factor_again(weights[place], kind, weight_scales[place]) for place in own]
            part, (whole,) = _multiply_and_reduce(lefts, rights, ctx.group, dtype, fast=False, shard=shard)
            total = part if total is None else total + part
            inputs[kind] = float8.factor_again(whole, kind, scale)
        weight_gradients: list[Tensor | None] = []
        for (_, columns), kind in zip(factors, kinds, strict=True):
            weight_gradients += [float8.weight_gradient(columns, inputs[kind], dtype), None, None]
        return total, None, None, *weight_gradients


class _Row(torch.autograd.Function):
    """This rank's shard [M/T, N] of the sum over ranks of products of hidden states [M, K/T] and a weight [N, K/T]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, group: ProcessGroup, kind: bool | None, weight: Tensor, weight8: Any, scale: Any
    ) -> Tensor:
        left, right = float8.input_factor(hidden, kind), float8.weight_factor(weight, kind, weight8, scale)
        kept = weight if weight8 is None else weight8
        ctx.save_for_backward(hidden, float8.kept_scale(left, kind), kept, float8.kept_scale(right, kind))
        ctx.group, ctx.kind = group, kind
        return _multiply_and_reduce([left], [right.t()], group, hidden.dtype, fast=True)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden, hidden_scale, weight, weight_scale), kind, dtype = ctx.saved_tensors, ctx.kind, gradient.dtype
        right = float8.factor_again(weight, kind, weight_scale)
        if kind:  # the scales of columns need all rows
            pending = _gather(gradient, ctx.group)
            rows = float8.factor(gradient, float8.E4M3, 1)
            _, own = _gather_and_multiply(rows, [right], ctx.group, dtype, fast=False)
            columns = float8.factor(collective.wait_tensor(pending), float8.E4M3, 0)
        else:
            shard, _ = float8.gradient_factors(gradient, kind, ctx.group.group_name)
            whole, own = _gather_and_multiply(shard, [right], ctx.group, dtype, fast=False)
            columns = Factor(whole, shard.scale)
        change = float8.weight_gradient(columns, float8.factor_again(hidden, kind, hidden_scale), dtype)
        return own, None, None, change, None, None


class _Scatter(torch.autograd.Function):
    """A rank's shard [M/T, K] of hidden states [M, K] that all ranks have."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.chunk(group.size())[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return collective.wait_tensor(_gather(gradient, ctx.group)), None


class _Gather(torch.autograd.Function):
    """Hidden states [M, K] of a rank's shard [M/T, K]. All ranks must compute the same of them."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return collective.wait_tensor(_gather(shard, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


class _Exchange(torch.autograd.Function):
    """All-to-all of a tensor [P, ...]: the part for each sequence-parallel rank becomes the part from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        each = [1] * len(tensor)
        return collective.wait_tensor(collective.all_to_all_single(tensor.contiguous(), each, each, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Exchange.apply(gradient, ctx.group), None


def _factors(layer: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return layer.weight, getattr(layer, "weight8", None), getattr(layer, "weight_scale", None)


def _kind(layer: nn.Module) -> bool | None:
    return getattr(layer, "rowwise", None)


def _columns(hidden: Tensor, layers: Sequence[Any], group: ProcessGroup | None) -> list[Tensor]:
    """Return the outputs [B, S/P, N/T] of linear layers that split their outputs, of hidden states [B, S/P, K].

    With tensor parallelism, return [1, M, N/T] of a shard [1, M/T, K].
    """
    if group is None:
        return [layer(hidden) for layer in layers]
    factors = [tensor for layer in layers for tensor in _factors(layer)]
    outputs = _Columns.apply(hidden[0], group, tuple(map(_kind, layers)), *factors)
    return [
        (output if layer.bias is None else output + layer.bias)[None]
        for layer, output in zip(layers, outputs, strict=True)
    ]


def _row(hidden: Tensor, layer: Any, group: ProcessGroup | None) -> Tensor:
    """Return the output [B, S/P, N] of a linear layer that splits its input, hidden states [B, S/P, K/T].

    With tensor parallelism, return the shard [1, M/T, N] of the output of [1, M, K/T].
    """
    if group is None:
        return layer(hidden)
    output = _Row.apply(hidden[0], group, _kind(layer), *_factors(layer))
    return (output if layer.bias is None else output + layer.bias)[None]


def _heads_for_positions(states: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Exchange [B, S/P, H D] for [B, S, H/P D], all states at once."""
    if group is None:
        return states
    ranks = dist.get_world_size(group)
    parts = [state.unflatten(2, (ranks, -1)) for state in states]  # [B, S/P, P, H/P D]
    received = _Exchange.apply(torch.cat(parts, dim=-1).permute(2, 0, 1, 3), group.group_name)
    whole = received.transpose(0, 1).flatten(1, 2)
    return list(whole.split([part.shape[-1] for part in parts], dim=-1))


def _positions_for_heads(states: Tensor, group: ProcessGroup | None) -> Tensor:
    """Exchange [B, S, H/P D] for [B, S/P, H D]."""
    if group is None:
        return states
    parts = states.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)  # [P, B, S/P, H/P D]
    return _Exchange.apply(parts, group.group_name).permute(1, 2, 0, 3).flatten(2)


def _attention_forward(tp: ProcessGroup | None, sp: ProcessGroup | None) -> Callable:
    """Return LlamaAttention.forward for these groups; it calls the kernel that the configuration names."""

    def forward(
        self: LlamaAttention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        columns = _columns(hidden_states, (self.q_proj, self.k_proj, self.v_proj), tp)
        length = position_embeddings[0].shape[1] // (1 if sp is None else sp.size())
        columns = [_in_sequences(states.flatten(0, 1), length) for states in columns]
        query, key, value = (
            states.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for states in _heads_for_positions(columns, sp)
        )  # [B, H/T/P, S, D]
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        implementation, eager = self.config._attn_implementation, modeling_llama.eager_attention_forward
        attend = eager if implementation == EAGER else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        output = _positions_for_heads(output.flatten(2).contiguous(), sp)
        if tp is not None:
            output = _padded(output, tp)[None]
        return _row(output, self.o_proj, tp), weights

    return forward


def _mlp_forward(tp: ProcessGroup) -> Callable:
    """Return LlamaMLP.forward for tensor-parallel ranks."""

    def forward(self: LlamaMLP, hidden: Tensor) -> Tensor:
        gate, up = _columns(hidden, (self.gate_proj, self.up_proj), tp)
        return _row(self.act_fn(gate) * up, self.down_proj, tp)

    return forward


class SplitPolicy(LlamaForCausalLMPolicy):
    """ColossalAI's sharding of LLaMA, with the forward functions of this module."""

    def module_policy(self) -> dict:
        config, policy = self.shard_config, super().module_policy()
        tp = config.tensor_parallel_process_group if config.enable_tensor_parallelism else None
        sp = config.sequence_parallel_process_group if config.enable_sequence_parallelism else None
        forwards = {LlamaAttention: _attention_forward(tp, sp)} | ({LlamaMLP: _mlp_forward(tp)} if tp else {})
        for module, forward in forwards.items():
            self.append_or_create_method_replacement(description={"forward": forward}, policy=policy, target_key=module)
        return policy


def split_tokens(model: nn.Module, group: ProcessGroup, runs: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    """Give each tensor-parallel rank the hidden states of its part of the tokens, from the first layer to the logits.

    The logits are [1, M, V/T] then. Collective over all ranks.

    Args:
        runs: first layer, and last layer plus one, of each model chunk that this pipeline stage holds.

    Returns:
        The parameters whose gradients are sums over the group: norms, and biases that are added to a rank's part.
    """
    overlap.connect(group)
    decoder: Any = model.get_submodule("model")
    shared = []
    for first, end in runs:
        decoder.layers[first].register_forward_pre_hook(partial(_enter, group), with_kwargs=True)
        if end == len(decoder.layers):
            head = model.get_submodule("lm_head")
            replace(head, "forward", partial(_logits, group, head))
            shared.append(decoder.norm.weight)
        else:
            decoder.layers[end - 1].register_forward_hook(partial(_leave, group), with_kwargs=True)
        for layer in decoder.layers[first:end]:
            shared += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
            shared += [layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias]
    return [parameter for parameter in shared if parameter is not None]


def _logits(group: ProcessGroup, head: nn.Module, hidden: Tensor) -> Tensor:
    """Return this rank's columns [1, M, V/T] of the logits of all tokens, of a shard [1, M/T, K]."""
    return _columns(hidden, [head], group)[0]


def _enter(group: ProcessGroup, layer: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
    hidden, *others = inputs
    return (_Scatter.apply(_padded(hidden, group), group)[None], *others), options


def _leave(group: ProcessGroup, layer: nn.Module, inputs: tuple, options: dict, outputs: tuple) -> tuple:
    shard, *others = outputs
    # transformers recomputes a layer with all its arguments by position, of which these are the last
    cosines, _ = options.get("position_embeddings", inputs[-1])
    whole = _Gather.apply(shard[0], group)
    return (_in_sequences(whole, cosines.shape[1]), *others)


def _padded(sequences: Tensor, group: ProcessGroup) -> Tensor:
    """Return sequences [B, S, N] as tokens [M, N], perhaps with rows of zeros at the end."""
    tokens = sequences.flatten(0, 1)
    return F.pad(tokens, (0, 0, 0, -len(tokens) % group.size()))


def _in_sequences(tokens: Tensor, length: int) -> Tensor:
    """Return tokens [M, N] as sequences [B, S, N], without the padding, which is shorter than a sequence."""
    return tokens[: len(tokens) // length * length].unflatten(0, (-1, length))
