"""Loss, gradient norm and loss scale of a step in real processes, compared with plain PyTorch."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from attn import EAGER, TORCH_FUSED
from engine.boost import Engine
from engine.compilation import Fusion
from engine.shards import MASTER, local_shards, restore
from engine.step import forward_backward, loss_scaler, optimizer_step, token_loss
from model_utils import IGNORE_INDEX, build_model, load_config
from processes import boosted, random_states, run_ranks

pytestmark = pytest.mark.slow

HYBRID = "-p hybrid_parallel"
UNDIVIDED: Any = SimpleNamespace(plugin=None, fusion=Fusion.NONE)  # an engine without tensor or sequence parallelism


class TestTokenLoss:
    LABELS = torch.tensor([[5, IGNORE_INDEX, 7, 1], [0, 9, IGNORE_INDEX, IGNORE_INDEX]])

    @staticmethod
    def logits():
        return 5 * torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))

    def expected(self):
        """Sum over the next tokens, one at a time."""
        total = 0.0
        for row, labels in zip(self.logits().log_softmax(-1), self.LABELS.tolist(), strict=True):
            total -= sum(row[position, labels[position + 1]] for position in range(3) if labels[position + 1] >= 0)
        return total

    def test_is_the_sum_over_the_labels_that_count(self):
        assert torch.allclose(token_loss(self.logits(), self.LABELS, UNDIVIDED), self.expected())
        none = torch.full_like(self.LABELS, IGNORE_INDEX)
        assert token_loss(self.logits(), none, UNDIVIDED) == 0

    def test_is_computed_in_float32(self):
        logits = self.logits().bfloat16()
        loss = token_loss(logits, self.LABELS, UNDIVIDED)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, token_loss(logits.float(), self.LABELS, UNDIVIDED))

    def test_over_a_split_vocabulary_and_a_split_sequence(self):
        logits = self.logits().requires_grad_()
        token_loss(logits, self.LABELS, UNDIVIDED).backward()
        for losses, gradient in run_ranks(2, split_loss, "--tp 2"):
            assert losses == pytest.approx([self.expected().item()] * 2, rel=1e-6)
            assert torch.allclose(gradient, logits.grad, atol=1e-6)
        for losses, gradient in run_ranks(2, split_loss, "--tp 1 --sp 2"):
            assert sum(losses) == pytest.approx(self.expected().item(), rel=1e-6)
            assert torch.allclose(gradient, logits.grad, atol=1e-6)


def split_loss(flags):
    """Return both ranks' losses, and the gradient of the whole logits, joined."""
    engine = boosted(f"{HYBRID} {flags} -b 2 -x fp32")
    dim = 2 if engine.layout.tp == 2 else 1
    part = TestTokenLoss.logits().chunk(2, dim)[dist.get_rank()].contiguous().requires_grad_()
    loss = token_loss(part, TestTokenLoss.LABELS, engine)
    loss.backward()
    results = [None, None]
    dist.all_gather_object(results, (loss.item(), part.grad))
    return [loss for loss, _ in results], torch.cat([gradient for _, gradient in results], dim)


PLUGINS = [
    (1, "-p zero2"),
    (2, "-p zero2"),
    (1, "-p zero2_cpu"),
    (1, "-p gemini"),
    (2, "-p gemini"),
    (1, "-p zero2 --accumulation_steps 2"),
    (1, "-p gemini --accumulation_steps 2"),
    (1, f"{HYBRID} --zero 1 --accumulation_steps 2"),
    (1, f"{HYBRID} --zero 0"),
    (2, f"{HYBRID} --tp 2"),
    (2, f"{HYBRID} --tp 1 --pp 2"),
    (2, f"{HYBRID} --tp 1 --pp 2 --pp_style interleaved"),
    (2, f"{HYBRID} --tp 1 --zero 1"),
]


def plain_model() -> LlamaForCausalLM:
    """Return transformers' model in float32, with the weights of `prepared`."""
    config = load_config("test")
    model, states = build_model(config, torch.device("cpu")), random_states(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(states[name, MASTER])
    return model


class TestStep:
    """One optimizer step on two sequences, with any number of ranks."""

    @pytest.fixture(scope="class")
    def expected(self):
        """(sum of token losses, gradient norm of their mean) of plain PyTorch in float32."""
        model = plain_model()
        logits = model(tokens()).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, tokens()[:, 1:].flatten(), reduction="sum")
        (loss / LABEL_TOKENS).backward()
        return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    @pytest.mark.parametrize(("ranks", "flags"), PLUGINS)
    def test_loss_and_norm_also_after_an_overflow(self, expected, ranks, flags, precision):
        results = run_ranks(ranks, steps, flags, precision)
        loss, norm = expected
        losses = [result[0] for result in results]
        assert sum(losses) / (ranks if "--tp 2" in flags else 1) == pytest.approx(loss, rel=3e-3)
        for _, norms, skipped, scales in results:
            assert norms[-1] == pytest.approx(norm, rel=2e-2)
            if precision == "fp16":
                assert norms[:2] == [math.inf, math.inf]
                assert skipped == [True, True, False]
                assert scales == [2.0**16, 2.0**16, 2.0**15]
            else:
                assert (skipped, scales) == ([False], [None])

    def test_clipping(self, expected):
        _, norm = expected
        for flags in ("-p zero2", "-p gemini", f"{HYBRID} --zero 0"):
            moments = run_ranks(1, first_moments, flags)[0]
            assert moments["--gradient_clipping 0"] == pytest.approx(0.1 * norm, rel=2e-2), flags
            assert moments["--gradient_clipping 1e9"] == pytest.approx(0.1 * norm, rel=2e-2), flags
            assert moments["--gradient_clipping 0.001"] == pytest.approx(0.1 * 0.001, rel=2e-2), flags


LABEL_TOKENS = 2 * 63


def tokens():
    return torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))


def prepared(flags, **changes):
    engine = boosted(flags + " -b 2", **changes)
    states = random_states(engine.config)
    restore(engine, lambda name, key: states[name, key], adam_steps=0)
    return engine


def batches(engine: Engine, data=None):
    """Return this rank's part of the two sequences, in micro-batches."""
    data = data or {"input_ids": tokens(), "labels": tokens()}
    sequences = range(2) if engine.layout.dp == 1 else [dist.get_rank()]
    size = len(sequences) // engine.job.batch.accumulation_steps
    parts = [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]
    return [{name: value[part] for name, value in data.items()} for part in parts]


def steps(flags, precision):
    """Take a step and return its results; in fp16, after two that overflow (the second halves the scale)."""
    engine = prepared(f"{flags} -x {precision}")
    scaler = loss_scaler(engine)
    norms, skipped, scales = [], [], []
    for label_tokens in (1e-6, 1e-6, LABEL_TOKENS) if scaler else (LABEL_TOKENS,):
        scales.append(scaler.loss_scale if scaler else None)
        loss = forward_backward(engine, batches(engine), label_tokens)
        for results, value in zip((norms, skipped), optimizer_step(engine), strict=True):
            results.append(value)
    return loss.item(), norms, skipped, scales


def first_moments(flags):
    """Return the norm of Adam's first moment, 0.1 of the clipped gradient, after one step with each of three bounds."""
    norms = {}
    for clipping in ("--gradient_clipping 0", "--gradient_clipping 1e9", "--gradient_clipping 0.001"):
        engine = prepared(f"{flags} -x bf16 {clipping}")
        forward_backward(engine, batches(engine), LABEL_TOKENS)
        optimizer_step(engine)
        shards = local_shards(engine)
        norms[clipping] = torch.cat([shard.tensor("exp_avg").float() for shard in shards]).norm().item()
    return norms


DOCUMENTS = ([1, 20, 2, 41], [63, 1])  # tokens of each document in the two sequences


class TestDocuments:
    """Sequences of several documents, whose first tokens are not predicted, in a step of every kind of plugin."""

    @pytest.fixture(scope="class")
    def expected(self):
        """(sum of token losses, gradient norm of their mean) of plain PyTorch, each document on its own."""
        model = plain_model()
        total = 0.0
        for row, lengths in zip(tokens(), DOCUMENTS, strict=True):
            for document in row.split(lengths):
                total += F.cross_entropy(model(document[None]).logits[0, :-1], document[1:], reduction="sum")
        (total / (128 - 6)).backward()
        return total.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    @pytest.mark.parametrize(
        ("ranks", "flags", "kernel"),
        [
            (2, "-p zero2", EAGER),
            (1, "-p gemini -g --accumulation_steps 2", TORCH_FUSED),
            (2, f"{HYBRID} --tp 2", EAGER),
            (2, f"{HYBRID} --tp 1 --pp 2 -g", TORCH_FUSED),
            (2, f"{HYBRID} --tp 1 --sp 2", TORCH_FUSED),
        ],
    )
    def test_loss_and_norm_equal_those_of_separate_documents(self, expected, ranks, flags, kernel):
        loss, norm = expected
        results = run_ranks(ranks, document_step, flags, kernel)
        assert sum(result[0] for result in results) / (ranks if "--tp 2" in flags else 1) == pytest.approx(
            loss, rel=3e-3
        )
        assert [result[1] for result in results] == pytest.approx([norm] * ranks, rel=2e-2)


def document_step(flags, kernel):
    engine = prepared(f"{flags} -x bf16", _attn_implementation=kernel)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS])
    labels = tokens().masked_fill(positions == 0, IGNORE_INDEX)
    data = {"input_ids": tokens(), "labels": labels, "position_ids": positions}
    loss = forward_backward(engine, batches(engine, data), 128 - 6)
    return loss.item(), optimizer_step(engine)[0]


class TestLossScaler:
    """Loss scaling in the layouts that TestStep leaves out."""

    @pytest.mark.parametrize(("ranks", "flags"), [(1, "-p gemini_auto"), (2, f"{HYBRID} --tp 1 --zero 2")])
    def test_is_found_only_under_fp16(self, ranks, flags):
        assert run_ranks(ranks, initial_scales, flags) == [{"fp16": 2.0**16, "bf16": None}] * ranks


def initial_scales(flags):
    scalers = {name: loss_scaler(boosted(f"{flags} -b 2 -x {name}")) for name in ("fp16", "bf16")}
    return {name: scaler and scaler.loss_scale for name, scaler in scalers.items()}
