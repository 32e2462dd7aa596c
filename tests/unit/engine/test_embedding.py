"""Micro-batches of few tokens are padded for the embedding, which changes nothing but the kernel that torch takes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import embedding, shards
from engine.boost import boost
from engine.embedding import pad_few_tokens
from engine.step import forward_backward, optimizer_step
from processes import job, random_states, run_ranks

MOST = 500  # tokens that are few, here
LAYOUTS = [
    (1, "-p zero2 -x fp32"),
    (1, "-p gemini -x bf16"),
    (2, "-p gemini -x bf16"),
    (2, "-p hybrid_parallel --tp 2 --pp 1 -x fp32"),
    (2, "-p hybrid_parallel --tp 1 --pp 2 -x fp32"),
    (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2 -x fp32"),
    (2, "-p zero2 -g --accumulation_steps 2 -x fp32"),
    (2, "-p fsdp -x bf16"),
]


class Model(nn.Module):
    """An embedding by the name that it has in LLaMA; `seen` holds the number of tokens in each of its passes."""

    def __init__(self, device="cpu", dtype=torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 8, device=device, dtype=dtype)
        self.seen = []
        self.embed_tokens.register_forward_hook(lambda module, inputs, output: self.seen.append(inputs[0].numel()))

    def forward(self, tokens):
        return self.embed_tokens(tokens)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(embedding.FEW_TOKENS, "cpu", MOST)


@pytest.mark.parametrize("shape", [(1, 1), (2, 100), (1, MOST), (3, MOST)])
def test_outputs_and_gradients_stay_the_same(few, shape):
    plain, padded = Model(), Model()
    padded.load_state_dict(plain.state_dict())
    pad_few_tokens(padded)
    tokens, slope = torch.randint(32, shape), torch.randn(*shape, 8)
    for model in (plain, padded):
        model(tokens).backward(slope)
    assert torch.equal(padded(tokens), plain(tokens))
    assert torch.equal(padded.embed_tokens.weight.grad, plain.embed_tokens.weight.grad)
    assert padded.seen[0] == max(tokens.numel(), MOST + 1)


def test_without_a_gradient_nothing_is_padded(few):
    model = Model()
    pad_few_tokens(model)
    tokens = torch.randint(32, (2, 3))
    with torch.no_grad():
        model(tokens)
    model.embed_tokens.weight.requires_grad = False
    model(tokens)
    model.embed_tokens.weight.requires_grad = True
    model(tokens[:, :0])
    assert model.seen == [6, 6, 0]


def steps_of(flags, most):
    """Return loss and gradient norm of two optimizer steps, and how many tokens the embedding took."""
    embedding.FEW_TOKENS["cpu"] = most
    asked = job(f"{flags.replace('fsdp', 'zero2')} -b 2 -l 64 --seed 0")
    if "fsdp" in flags:
        asked = replace(asked, parallelism=replace(asked.parallelism, plugin="fsdp"))
    engine = boost(asked)
    if "fsdp" not in flags:  # it sets its weights itself
        values = random_states(engine.config)
        shards.restore(engine, lambda name, key: values[name, key], 0)
    seen = []
    for name, module in engine.model.named_modules():
        if name.endswith("embed_tokens"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    found = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tokens = torch.randint(1024, (2, 64), generator=generator)
        micro_batches = [{"input_ids": tokens, "labels": tokens}] * engine.job.batch.accumulation_steps
        loss = forward_backward(engine, micro_batches, 2 * 63 * len(micro_batches))
        found += [loss.item(), optimizer_step(engine)[0]]
    return found, max(seen, default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
def test_in_every_layout(ranks, flags):
    as_they_are = run_ranks(ranks, steps_of, flags, 0)
    padded = run_ranks(ranks, steps_of, flags, MOST)
    assert max(tokens for _, tokens in as_they_are) <= 128
    assert max(tokens for _, tokens in padded) == MOST + 1
    for (one, _), (other, _) in zip(as_they_are, padded, strict=True):
        assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [512, 2048, 3072])
def test_gradients_are_exact_on_a_gpu(count):
    model = Model("cuda", torch.bfloat16)
    pad_few_tokens(model)
    for _ in range(300):
        tokens = torch.randint(32, (1, count), device="cuda")
        slope = torch.randn(1, count, 8, device="cuda", dtype=torch.bfloat16)
        (found,) = torch.autograd.grad(model(tokens), model.embed_tokens.weight, slope)
        exact = torch.zeros(32, 8, device="cuda", dtype=torch.float64).index_add_(0, tokens[0], slope[0].double())
        assert torch.equal(found, exact.bfloat16()) or (found - exact).norm() < 3e-3 * exact.norm()
