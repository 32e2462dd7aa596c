"""Attention: the choice of kernel, and the model with each kernel against LLaMA written out in float64.

Shapes: B batch, S sequence, H heads, D head dimension.
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from attn import (
    EAGER,
    FLASH_ATTENTION,
    TORCH_FUSED,
    VARIABLE_LENGTH,
    attend_inside_documents,
    document_boundaries,
    select_attention,
)
from engine import shards
from engine.boost import boost
from model_utils import build_model, initial_weight, load_config, parameter_specs, restore_rotary_precision
from processes import job, run_ranks

CPU = torch.device("cpu")
VOCAB = 1024


def weights_of(config, dtype=torch.float32):
    """Return seeded weights, large enough that attention is far from uniform."""
    scale = {"q_proj": 8.0, "k_proj": 8.0}
    return {
        spec.name: (initial_weight(spec, config, 0, CPU) * scale.get(spec.name.split(".")[-2], 1.0)).to(dtype)
        for spec in parameter_specs(config)
    }


def rotate(states, theta):
    """Apply RoPE to states [B, H, S, D], real halves first, by rotating complex numbers (RoFormer, eq. 13)."""
    real, imaginary = states.chunk(2, dim=-1)
    frequencies = theta ** (-torch.arange(real.shape[-1], dtype=torch.float64) / real.shape[-1])
    angles = torch.outer(torch.arange(states.shape[2], dtype=torch.float64), frequencies)
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def reference_logits(config, weights, tokens):
    """Return the logits [B, S, V] of LLaMA's paper in float64, without code of transformers."""

    def normalized(states, name):
        return weights[name] * states / (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def heads(states, name):  # [B, S, H D] -> [B, H, S, D]
        return (states @ weights[name].T).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    hidden = weights["model.embed_tokens.weight"][tokens]
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        states = normalized(hidden, f"{layer}.input_layernorm.weight")
        query = rotate(heads(states, f"{layer}.self_attn.q_proj.weight"), config.rope_theta)
        key = rotate(heads(states, f"{layer}.self_attn.k_proj.weight"), config.rope_theta)
        value = heads(states, f"{layer}.self_attn.v_proj.weight")
        shared = config.num_attention_heads // config.num_key_value_heads
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scores = (query @ key.transpose(-1, -2) / config.head_dim**0.5).masked_fill(future, -torch.inf)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ weights[f"{layer}.self_attn.o_proj.weight"].T
        states = normalized(hidden, f"{layer}.post_attention_layernorm.weight")
        gate = F.silu(states @ weights[f"{layer}.mlp.gate_proj.weight"].T)
        up = states @ weights[f"{layer}.mlp.up_proj.weight"].T
        hidden = hidden + (gate * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return normalized(hidden, "model.norm.weight") @ weights["lm_head.weight"].T


def random_tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


AMPERE, HOPPER = (8, 0), (9, 0)
FUSED = "torch's fused kernel"


class TestSelectAttention:
    @pytest.mark.parametrize(
        ("package", "gpu", "head", "flash_attention", "sequence_parallel", "kernel", "line"),
        [
            (False, None, 64, False, False, EAGER, "plain (-a selects a fused kernel)"),
            (True, AMPERE, 64, False, False, EAGER, "plain (-a selects a fused kernel)"),
            (True, AMPERE, 64, True, False, FLASH_ATTENTION, "flash-attn"),
            (True, HOPPER, 128, True, False, TORCH_FUSED, f"{FUSED} (cuDNN's, faster than flash-attn on this GPU)"),
            (True, HOPPER, 256, True, False, FLASH_ATTENTION, "flash-attn"),
            (True, None, 64, True, False, TORCH_FUSED, f"{FUSED} (flash-attn needs a GPU)"),
            (False, HOPPER, 64, True, False, TORCH_FUSED, f"{FUSED} (flash-attn is not installed)"),
            (False, None, 64, True, False, TORCH_FUSED, f"{FUSED} (flash-attn is not installed)"),
            (True, AMPERE, 64, True, True, TORCH_FUSED, f"{FUSED} (always so with --sp)"),
            (False, None, 64, False, True, TORCH_FUSED, f"{FUSED} (always so with --sp)"),
        ],
    )
    def test_table(self, monkeypatch, package, gpu, head, flash_attention, sequence_parallel, kernel, line):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (object() if package else None) if name == "flash_attn" else found(name, *rest),
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
        config = load_config("test")
        config.head_dim = head
        assert select_attention(config, flash_attention, sequence_parallel) == f"attention: {line}"
        assert config._attn_implementation == kernel

    def test_deterministic(self, monkeypatch):
        """The kernel of flash-attn's package does not know torch's deterministic mode."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        config = load_config("test")
        line = select_attention(config, flash_attention=True, deterministic=True)
        assert (line, config._attn_implementation) == (
            "attention: torch's fused kernel (--deterministic)",
            TORCH_FUSED,
        )

    @pytest.mark.parametrize(
        ("gpu", "dtype", "flash_attention", "sequence_parallel", "kernel", "line"),
        [
            (True, torch.bfloat16, True, False, VARIABLE_LENGTH, "torch's variable-length flash kernel, inside"),
            (True, torch.float32, True, False, TORCH_FUSED, "torch's fused kernel, masked to stay inside"),
            (False, torch.bfloat16, True, False, TORCH_FUSED, "torch's fused kernel, masked to stay inside"),
            (True, torch.bfloat16, False, False, EAGER, "plain, masked to stay inside"),
            (True, torch.bfloat16, False, True, TORCH_FUSED, "torch's fused kernel, masked to stay inside"),
        ],
    )
    def test_inside_documents(self, monkeypatch, gpu, dtype, flash_attention, sequence_parallel, kernel, line):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        config = load_config("test")
        config.torch_dtype = dtype
        torch.backends.cuda.enable_cudnn_sdp(True)
        chosen = select_attention(config, flash_attention, sequence_parallel, inside_documents=True)
        assert chosen == f"attention: {line} documents"
        assert config._attn_implementation == kernel
        masked = kernel == TORCH_FUSED
        assert not (masked and torch.backends.cuda.cudnn_sdp_enabled())  # its gradients with a mask may be NaN

    def test_a_kernel_without_dropout_is_not_chosen_when_dropout_is_set(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        config = load_config("test")
        config.torch_dtype, config.attention_dropout = torch.bfloat16, 0.1
        select_attention(config, flash_attention=True, inside_documents=True)
        assert config._attn_implementation == TORCH_FUSED


@pytest.mark.parametrize("kernel", [EAGER, TORCH_FUSED])
class TestKernels:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("length", [1, 2, 31, 128])
    def test_logits_and_gradients_are_those_of_the_reference(self, kernel, kv_heads, length):
        config = load_config("test")
        config.num_key_value_heads, config._attn_implementation = kv_heads, kernel
        model = build_model(config, CPU)
        model.load_state_dict(weights_of(config))
        weights = {name: weight.requires_grad_() for name, weight in weights_of(config, torch.float64).items()}
        tokens = random_tokens(2, length)
        cotangent = torch.randn(2, length, VOCAB, generator=torch.Generator().manual_seed(2))

        expected = reference_logits(config, weights, tokens)
        expected.backward(cotangent.double())
        logits = model(tokens).logits
        logits.backward(cotangent)

        assert relative_error(logits, expected) < 2e-6
        for name, parameter in model.named_parameters():
            if length == 1 and ("q_proj" in name or "k_proj" in name):
                continue  # a single position attends only to itself, whatever query and key are
            assert relative_error(parameter.grad, weights[name].grad) < 2e-5, name

    def test_a_later_token_does_not_reach_an_earlier_position(self, kernel):
        config = load_config("test")
        config._attn_implementation = kernel
        model = build_model(config, CPU)
        model.load_state_dict(weights_of(config))
        assert_causal(lambda tokens: model(tokens).logits)


DOCUMENTS = ([1, 40, 2, 88], [131])  # lengths in two sequences; 131 is odd and exceeds a kernel's block


class TestDocuments:
    """Attention inside documents, against the reference run on each document separately."""

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("kernel", [EAGER, TORCH_FUSED])
    def test_equals_separate_documents(self, kernel, kv_heads, checkpointing):
        errors = document_errors(kernel, kv_heads, CPU, torch.float32, checkpointing)
        assert errors.pop("logits") < 2e-6
        assert max(errors.values()) < 2e-5, errors

    @pytest.mark.gpu
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_variable_length_kernel_equals_separate_documents(self, kv_heads, dtype):
        errors = document_errors(VARIABLE_LENGTH, kv_heads, torch.device("cuda"), dtype)
        masked = document_errors(EAGER, kv_heads, torch.device("cuda"), dtype)
        for name, error in errors.items():
            assert error < max(2 * masked[name], 1e-3), name

    def test_boundaries(self):
        positions = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 0, 0, 1], [0, 1, 2, 3, 4]])
        boundaries = document_boundaries(positions)
        assert boundaries.dtype == torch.int32
        assert boundaries[:, 0, 0].tolist() == [[0, 2, 5, 5], [0, 2, 3, 5], [0, 5, 5, 5]]


def document_errors(kernel, kv_heads, device, dtype, checkpointing=False):
    """Return the relative error of the logits and of every gradient."""
    config = load_config("test")
    config.max_position_embeddings, config.num_key_value_heads = 131, kv_heads
    config._attn_implementation = kernel
    model = build_model(config, device, dtype)
    model.load_state_dict(weights_of(config, dtype))
    restore_rotary_precision(model, device)
    attend_inside_documents(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {name: weight.double().requires_grad_() for name, weight in weights_of(config, dtype).items()}
    tokens, positions = random_tokens(2, 131), torch.stack([positions_of(lengths) for lengths in DOCUMENTS])
    cotangent = torch.randn(2, 131, VOCAB, generator=torch.Generator().manual_seed(2)).to(dtype)

    expected = torch.stack([separate_documents(config, weights, *row) for row in zip(tokens, DOCUMENTS, strict=True)])
    expected.backward(cotangent.double())
    boundaries = document_boundaries(positions)
    logits = model(tokens.to(device), position_ids=positions.to(device), attention_mask=boundaries.to(device)).logits
    logits.backward(cotangent.to(device))
    errors = {name: relative_error(p.grad.cpu(), weights[name].grad) for name, p in model.named_parameters()}
    return {"logits": relative_error(logits.cpu(), expected), **errors}


def positions_of(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def separate_documents(config, weights, tokens, lengths):
    """Return the reference's logits [S, V] of a sequence, one document at a time."""
    return torch.cat([reference_logits(config, weights, part[None])[0] for part in tokens.split(lengths)])


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_causal(logits_of):
    tokens = random_tokens(1, 64)
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % VOCAB
    with torch.no_grad():
        differs = (logits_of(tokens) != logits_of(changed)).any(-1)[0]
    assert not differs[:40].any()
    assert differs[40:].all()


class TestSequenceParallel:
    """Two real ranks; each has half of the positions outside attention and half of the heads inside."""

    @pytest.mark.slow
    @pytest.mark.parametrize("kv_heads", [2, 4])
    def test_equals_the_unsplit_reference_and_is_causal(self, kv_heads):
        config = load_config("test")
        config.num_key_value_heads = kv_heads
        weights = {name: weight.requires_grad_() for name, weight in weights_of(config, torch.float64).items()}
        expected = reference_logits(config, weights, random_tokens(2, 64))
        expected.square().sum().backward()
        for logits, gradients in run_ranks(2, sequence_parallel_pass, kv_heads):
            assert relative_error(logits, expected) < 2e-6
            for name, gradient in gradients.items():
                assert relative_error(gradient, weights[name].grad) < 2e-5, name


def sequence_parallel_pass(kv_heads):
    """Return logits [B, S, V] of all positions, and the gradients of the sum of their squares."""
    asked = job("-p hybrid_parallel --tp 1 --pp 1 --sp 2 -x fp32", num_key_value_heads=kv_heads)
    select_attention(asked.config, flash_attention=False, sequence_parallel=True)
    engine = boost(asked)
    model, weights = engine.model, weights_of(engine.config)
    shards.restore(engine, lambda name, key: weights[name], adam_steps=0)

    def all_positions(logits):
        parts = [torch.empty_like(logits) for _ in range(2)]
        dist.all_gather(parts, logits.detach().contiguous())
        return torch.cat(parts, dim=1)

    assert_causal(lambda tokens: all_positions(model(input_ids=tokens).logits))
    logits = model(input_ids=random_tokens(2, 64)).logits
    assert logits.shape == (2, 32, VOCAB)
    engine.optimizer.backward(logits.square().sum() * 2)  # the plugin averages over the two ranks
    means = engine.optimizer.reducer.reduced
    gradients = {name: means[parameter].view_as(parameter) for name, parameter in model.unwrap().named_parameters()}
    return all_positions(logits), gradients
