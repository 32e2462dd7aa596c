"""Sequence parallelism of HybridParallelPlugin."""

from collections.abc import Callable
from typing import Any

import torch
from colossalai.shardformer.layer._operation import all_to_all_comm
from colossalai.shardformer.policies.llama import LlamaForCausalLMPolicy
from torch import nn
from torch.distributed import ProcessGroup
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb


def _ulysses_forward(group: ProcessGroup) -> Callable:
    """LlamaAttention.forward over sequences split P ways: heads are exchanged for positions around the attention.

    DeepSpeed-Ulysses (arXiv:2309.14509). ColossalAI's own version without its flash kernel applies no causal mask when
    it is given none, so this one calls the kernel that the configuration names, as the unsplit model does.
    """

    def forward(
        self: LlamaAttention,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        def exchanged(projection: nn.Module) -> torch.Tensor:  # [B, S/P, H D] -> [B, H/P, S, D]
            states = all_to_all_comm(projection(hidden_states), group)
            return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

        query, key, value = exchanged(self.q_proj), exchanged(self.k_proj), exchanged(self.v_proj)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling
        )  # [B, S, H/P, D]
        output = all_to_all_comm(output.flatten(2).contiguous(), group, scatter_dim=1, gather_dim=2)
        return self.o_proj(output), None

    return forward


class SequenceParallelPolicy(LlamaForCausalLMPolicy):
    """ColossalAI's sharding of LLaMA with the attention above."""

    def module_policy(self) -> dict:
        policy = super().module_policy()
        self.append_or_create_method_replacement(
            description={"forward": _ulysses_forward(self.shard_config.sequence_parallel_process_group)},
            policy=policy,
            target_key=LlamaAttention,
        )
        return policy
