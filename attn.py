"""Attention: the choice of a kernel, and attention inside documents.

Shapes: B batch, S sequence, H heads, D head dimension, N documents in the sequence that has most.

A batch whose sequences hold several documents carries `position_ids` [B, S], which restart at 0 with each document.
`document_boundaries` turns them, on the host, into the batch's `attention_mask`. It has four dimensions, so
transformers and Shardformer pass it unchanged to every layer. For kernels that take a whole mask,
`attend_inside_documents` expands it once a forward pass; the kernel VARIABLE_LENGTH reads it as it is.
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
    config: LlamaConfig,
    flash_attention: bool,
    sequence_parallel: bool = False,
    inside_documents: bool = False,
    deterministic: bool = False,
) -> str:
    """Set the attention kernel in `config`, and return one line that says which and why.

    Args:
        flash_attention: use a fused kernel: the flash-attn package's where it is installed beside a GPU for which torch
            has no faster one, else torch's scaled_dot_product_attention. Without it attention is a plain matrix
            product, [B, H, S, S] in memory.
        inside_documents: every batch carries `position_ids`. The fused kernel on a GPU is then torch's for sequences of
            several lengths, which takes float16 and bfloat16 (`config.torch_dtype`) and has no dropout.
        deterministic: use no kernel that ignores torch's deterministic mode, such as flash-attn's.
    """
    if inside_documents:
        half = config.torch_dtype in (torch.float16, torch.bfloat16)
        if flash_attention and torch.cuda.is_available() and half and not config.attention_dropout:
            config._attn_implementation = VARIABLE_LENGTH
            return "attention: torch's variable-length flash kernel, inside documents"
        fused = flash_attention or sequence_parallel
        config._attn_implementation = TORCH_FUSED if fused else EAGER
        avoid_cudnn()
        kernel = "torch's fused kernel" if fused else "plain"
        return f"attention: {kernel}, masked to stay inside documents"
    package = importlib.util.find_spec("flash_attn") is not None
    if sequence_parallel:
        config._attn_implementation = TORCH_FUSED
        return "attention: torch's fused kernel (always so with --sp)"
    if not flash_attention:
        config._attn_implementation = EAGER
        return "attention: plain (-a selects a fused kernel)"
    if deterministic:
        reason = "--deterministic"
    elif not package:
        reason = "flash-attn is not installed"
    elif not torch.cuda.is_available():
        reason = "flash-attn needs a GPU"
    elif _cudnn_is_faster(config):
        reason = "cuDNN's, faster than flash-attn on this GPU"
    else:
        config._attn_implementation = FLASH_ATTENTION
        return "attention: flash-attn"
    config._attn_implementation = TORCH_FUSED
    return f"attention: torch's fused kernel ({reason})"


def avoid_cudnn() -> None:
    """Keep torch's scaled_dot_product_attention of this process from cuDNN's kernels, where a mask is given.

    With a mask, on H100 and H200, gradients may be NaN if the length is 64 modulo 128 (torch from 2.11 on; issue 196678
    of pytorch). On B200, a model with fewer than 8 key-value heads generates wrong tokens (issue 193893).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _cudnn_is_faster(config: LlamaConfig) -> bool:
    """Return True if torch attends by cuDNN's kernel and is faster than flash-attn 2.

    So on Hopper GPUs: 2.2 against 3.9 ms. The kernel takes heads of up to 128.
    """
    return torch.cuda.get_device_capability() == (9, 0) and config.head_dim <= 128 and config.head_dim % 8 == 0


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
    """Have the model read an `attention_mask` from `document_boundaries`; without a mask nothing changes."""
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
    """Return causal attention inside documents, by torch's flash kernel.

    `attention_mask` is int32 [B, 1, 1, N + 1], from `document_boundaries`.

    Query, key and value are [B, H, S, D], key and value perhaps with fewer heads; the output is [B, S, H, D]. Documents
    that pad a sequence's number to N are empty. Looking up the longest would wait for the GPU, so S is the bound; it
    costs blocks that end at once.
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
