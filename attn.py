"""Attention: which kernel the model calls, attention inside documents, and attention under sequence parallelism.

Shapes: B batch, S sequence, H heads, D head dimension, N documents in the sequence that has most, P sequence-parallel
size.

A batch whose sequences hold several documents carries `position_ids` [B, S], which restart at 0 where a document does.
`document_boundaries` turns them, on the host, into the `attention_mask` of the batch. It has four dimensions, so both
transformers and Shardformer hand it unaltered to every layer: kernels of whole matrices get it made into a mask, once a
forward pass, by `attend_inside_documents`; the kernel VARIABLE_LENGTH reads it as it is.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface

EAGER = "eager"
TORCH_FUSED = "sdpa"
FLASH_ATTENTION = "flash_attention_2"
VARIABLE_LENGTH = "variable_length"


def select_attention(
    config: LlamaConfig, flash_attention: bool, sequence_parallel: bool = False, inside_documents: bool = False
) -> str:
    """Sets the attention kernel in `config` and returns one line that says which and why.

    Without `flash_attention` the plain product of matrices is used, [B, H, S, S] in memory. With it, the flash-attn
    package where it is installed beside a GPU, else torch's scaled_dot_product_attention, whose flash kernel takes
    the same causal inputs. With `inside_documents` every batch has to carry `position_ids`; the flash kernel is then
    torch's for sequences of differing length, which takes `config.torch_dtype` float16 and bfloat16 and has no
    dropout.
    """
    if inside_documents:
        half = config.torch_dtype in (torch.float16, torch.bfloat16)
        if flash_attention and torch.cuda.is_available() and half and not config.attention_dropout:
            config._attn_implementation = VARIABLE_LENGTH
            return "attention: torch's variable-length flash kernel, inside documents"
        fused = flash_attention or sequence_parallel
        config._attn_implementation = TORCH_FUSED if fused else EAGER
        kernel = "torch's fused kernel" if fused else "plain"
        return f"attention: {kernel}, masked to stay inside documents"
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


def document_boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the start of each document in a sequence, int32 [B, 1, 1, N + 1], padded with S, which comes last.

    Args:
        position_ids: [B, S], 0 at the first token of each document. A sequence that starts inside a document has the
            rest of it as its first.
    """
    length = position_ids.shape[1]
    opens = position_ids == 0
    opens[:, 0] = True
    starts = torch.where(opens, torch.arange(length, device=opens.device), length).sort(dim=1).values
    starts = F.pad(starts[:, : opens.sum(1).max()], (0, 1), value=length)
    return starts.to(torch.int32)[:, None, None]


def attend_inside_documents(model: LlamaForCausalLM) -> None:
    """Makes the model read an `attention_mask` of `document_boundaries`; without one, nothing changes."""
    model.register_forward_pre_hook(_mask_documents, with_kwargs=True)


def _mask_documents(model: LlamaForCausalLM, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    boundaries = kwargs.get("attention_mask")
    if boundaries is None or model.config._attn_implementation == VARIABLE_LENGTH:
        return None
    positions = torch.arange(kwargs["position_ids"].shape[1], dtype=torch.int32, device=boundaries.device)
    documents = torch.searchsorted(boundaries[:, 0, 0], positions.expand(len(boundaries), -1).contiguous(), right=True)
    visible = (documents[:, None, :, None] == documents[:, None, None, :]) & (positions[:, None] >= positions)
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
    return args, {**kwargs, "attention_mask": mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)}


def _variable_length_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside the documents of `attention_mask`, int32 [B, 1, 1, N + 1], by torch's flash kernel.

    Query, key and value are [B, H, S, D], key and value perhaps of fewer heads; the output is [B, S, H, D]. Documents
    that only fill up a sequence's number to N have no token. The longest is not looked up, which would wait for the
    GPU: the bound S costs blocks that end at once.
    """
    batch, heads, length, _ = query.shape
    starts = (
        attention_mask[:, 0, 0, :-1] + length * torch.arange(batch, dtype=torch.int32, device=query.device)[:, None]
    )
    starts = F.pad(starts.flatten(), (0, 1), value=batch * length)
    groups = heads // key.shape[1]
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # [B S, H, D]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = varlen_attn(query, key, value, starts, starts, length, length, scale=scaling, window_size=(-1, 0))
    return output.unflatten(0, (batch, length)), None  # type: ignore[union-attr]


AttentionInterface.register(VARIABLE_LENGTH, _variable_length_attention)
