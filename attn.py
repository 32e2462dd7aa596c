"""Attention: which kernel the model calls, and attention under sequence parallelism.

Shapes: B batch, S sequence, H heads, D head dimension, P sequence-parallel size.
"""

import importlib.util

import torch
from colossalai.shardformer.layer._operation import all_to_all_comm
from colossalai.shardformer.policies.llama import LlamaForCausalLMPolicy
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

EAGER = "eager"
TORCH_FUSED = "sdpa"
FLASH_ATTENTION = "flash_attention_2"


def select_attention(config: LlamaConfig, flash_attention: bool, sequence_parallel: bool = False) -> str:
    """Sets the attention kernel in `config` and returns one line that says which and why.

    Without `flash_attention` the plain product of matrices is used, [B, H, S, S] in memory. With it, the flash-attn
    package where it is installed beside a GPU, else torch's scaled_dot_product_attention, whose flash kernel takes
    the same causal inputs.
    """
    package = importlib.util.find_spec("flash_attn") is not None
    if sequence_parallel:
        config._attn_implementation = TORCH_FUSED
        return "attention: torch's fused kernel (always so with --sp)"
    if not flash_attention:
        config._attn_implementation = EAGER
        return "attention: plain (-a selects a fused kernel)"
    if package and torch.cuda.is_available():
        config._attn_implementation = FLASH_ATTENTION
        return "attention: flash-attn"
    config._attn_implementation = TORCH_FUSED
    missing = "flash-attn is not installed" if not package else "flash-attn needs a GPU"
    return f"attention: torch's fused kernel ({missing})"


def _ulysses_forward(group):
    """LlamaAttention.forward over sequences split P ways: heads are exchanged for positions around the attention.

    DeepSpeed-Ulysses (arXiv:2309.14509). ColossalAI's own version without its flash kernel applies no causal mask when
    it is given none, so this one calls the kernel that the configuration names, as the unsplit model does.
    """

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        def exchanged(projection):  # [B, S/P, H D] -> [B, H/P, S, D]
            states = all_to_all_comm(projection(hidden_states), group)
            return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

        query, key, value = exchanged(self.q_proj), exchanged(self.k_proj), exchanged(self.v_proj)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling)  # [B, S, H/P, D]
        output = all_to_all_comm(output.flatten(2).contiguous(), group, scatter_dim=1, gather_dim=2)
        return self.o_proj(output), None

    return forward


class SequenceParallelPolicy(LlamaForCausalLMPolicy):
    """ColossalAI's sharding of LLaMA with the attention above."""

    def module_policy(self):
        policy = super().module_policy()
        self.append_or_create_method_replacement(
            description={"forward": _ulysses_forward(self.shard_config.sequence_parallel_process_group)},
            policy=policy,
            target_key=LlamaAttention,
        )
        return policy
