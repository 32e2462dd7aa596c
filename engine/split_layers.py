"""Decoder layers of tensor-parallel (Megatron-LM, arXiv:1909.08053) and sequence-parallel (DeepSpeed-Ulysses,
arXiv:2309.14509) ranks, which torch compiles as a whole.

Symptom: with tensor parallelism, a third of a step passes in element-wise operations and in waiting for other ranks.
Cause: ColossalAI's linear layers call collective operations that torch.compile cannot trace. Each of a layer's five
    column-parallel products has its own all-reduce in the backward pass, and the forward pass waits for every one.
    Without its flash kernel, its attention for split sequences applies no causal mask unless it is given one.
Fix: `SplitPolicy` replaces the forward functions of attention and MLP by ones whose collective operations are traced.
    Products of the same input share one all-reduce, which runs beside the products for the weights' gradients. A
    row-parallel product is computed in parts, each reduced while the next is computed.
Remove when: ColossalAI's layers do this.

B is the batch size, S the sequence length, M = B S / P the tokens of a rank, H heads, D the head dimension, T and P the
tensor- and sequence-parallel size.
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
from engine import float8

collective = torch.ops._c10d_functional
PARTS = 4  # of a row-parallel product
WORTHWHILE = 4096  # tokens from which it is computed in parts
# Options of torch.compile: start collective operations as early, and wait for them as late, as their operands allow.
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}


def _products(
    kind: bool | None, hidden: Tensor, parts: int, weight: Tensor, weight8: Tensor | None, scale: Tensor | None
) -> tuple[list[Callable[[], Tensor]], list[Tensor]]:
    """Return functions that multiply parts of hidden states [M, K] by the transpose of a weight [N, K].

    Args:
        kind: None for a product in working precision, else `rowwise` of engine.float8.products.

    Returns:
        As engine.float8.products.
    """
    if kind is not None:
        return float8.products(hidden, weight, kind, weight8, scale, parts)
    return [partial(F.linear, rows, weight) for rows in float8.split_rows(hidden, parts)], [hidden, weight]


def _gradient_products(
    kind: bool | None, gradient: Tensor, kept: Sequence[Tensor], stored: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return functions that compute the gradients of hidden states and weight; see engine.float8.gradient_products."""
    if kind is not None:
        return float8.gradient_products(gradient, kept, stored)
    hidden, weight = kept
    return partial(torch.mm, gradient, weight), partial(torch.mm, gradient.t(), hidden)


class _Columns(torch.autograd.Function):
    """Products of hidden states [M, K] with several weights [N/T, K], each perhaps in float8.

    Its arguments after `kinds` are three for each weight: the weight, its float8 values and their scale, or None.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: str, kinds: tuple[bool | None, ...], *tensors: Any) -> Any:
        outputs, kept, numbers = [], [], []
        for place, kind in enumerate(kinds):
            (product,), own = _products(kind, hidden, 1, *tensors[3 * place : 3 * place + 3])
            outputs.append(product())
            kept += own
            numbers.append(len(own))
        ctx.save_for_backward(*kept)
        ctx.group, ctx.kinds, ctx.numbers = group, kinds, numbers
        ctx.stored = [tensor is not None for tensor in tensors[1::3]]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, first = ctx.saved_tensors, 0
        total, weight_products = None, []
        for kind, number, stored, gradient in zip(ctx.kinds, ctx.numbers, ctx.stored, gradients, strict=True):
            kept = saved[first : first + number]
            first += number
            hidden_product, weight_product = _gradient_products(kind, gradient, kept, stored)
            total = hidden_product() if total is None else total + hidden_product()
            weight_products.append(weight_product)
        pending = collective.all_reduce(total, "sum", ctx.group)
        weight_gradients: list[Tensor | None] = []
        for product in weight_products:
            weight_gradients += [product(), None, None]
        return collective.wait_tensor(pending), None, None, *weight_gradients


class _Row(torch.autograd.Function):
    """The sum over tensor-parallel ranks of products of hidden states [M, K/T] and a weight [N, K/T]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: str, kind: bool | None, *tensors: Any) -> Tensor:
        products, kept = _products(kind, hidden, PARTS if len(hidden) >= WORTHWHILE else 1, *tensors)
        ctx.save_for_backward(*kept)
        ctx.kind, ctx.stored = kind, tensors[1] is not None
        pending = [collective.all_reduce(product(), "sum", group) for product in products]
        sums = [collective.wait_tensor(part) for part in pending]
        return torch.cat(sums) if len(sums) > 1 else sums[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden_product, weight_product = _gradient_products(ctx.kind, gradient, ctx.saved_tensors, ctx.stored)
        return hidden_product(), None, None, weight_product(), None, None


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
    """Return the outputs [B, S/P, N/T] of linear layers that split their outputs, of hidden states [B, S/P, K]."""
    if group is None:
        return [layer(hidden) for layer in layers]
    factors = [tensor for layer in layers for tensor in _factors(layer)]
    outputs = _Columns.apply(hidden.flatten(0, 1), group.group_name, tuple(map(_kind, layers)), *factors)
    return [
        (output if layer.bias is None else output + layer.bias).unflatten(0, hidden.shape[:2])
        for layer, output in zip(layers, outputs, strict=True)
    ]


def _row(hidden: Tensor, layer: Any, group: ProcessGroup | None) -> Tensor:
    """Return the output [B, S/P, N] of a linear layer that splits its input, hidden states [B, S/P, K/T]."""
    if group is None:
        return layer(hidden)
    output = _Row.apply(hidden.flatten(0, 1), group.group_name, _kind(layer), *_factors(layer))
    return (output if layer.bias is None else output + layer.bias).unflatten(0, hidden.shape[:2])


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
        query, key, value = (
            states.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for states in _heads_for_positions(columns, sp)
        )  # [B, H/T/P, S, D]
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        implementation, eager = self.config._attn_implementation, modeling_llama.eager_attention_forward
        attend = eager if implementation == EAGER else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        output = _positions_for_heads(output.flatten(2).contiguous(), sp)
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
