"""The norm that gradients are clipped by, under every plugin and layout, against plain PyTorch.

RMSNorm weights, which tensor-parallel ranks hold whole, have most of it here, so that counting one twice shows.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine import shards
from engine.shards import MASTER
from engine.step import forward_backward, optimizer_step
from model_utils import build_model, load_config
from processes import boosted, random_states, run_ranks

HYBRID = "-p hybrid_parallel"
LAYOUTS = [
    (2, "-p gemini --tp 2"),  # all in one chunk a rank
    (4, "-p gemini --tp 2 --accumulation_steps 2"),  # chunks of which each rank has half
    (2, f"{HYBRID} --tp 2 --pp 1 --zero 0 -x fp32"),
    (2, f"{HYBRID} --tp 2 --pp 1 --zero 0"),
    (4, f"{HYBRID} --tp 2 --pp 2 --zero 1"),
    (4, f"{HYBRID} --tp 1 --pp 1 --sp 2 --zero 1"),
    (4, f"{HYBRID} --tp 2 --pp 1 --zero 1 -tied"),
    (2, "-p gemini --tp 2 -tied"),
]
SEQUENCES, LABELS = 4, 4 * 63


def tokens():
    return torch.randint(1024, (SEQUENCES, 64), generator=torch.Generator().manual_seed(0))


def weights(config):
    states = random_states(config)
    return {name: (0.05 if "norm" in name else 1) * value for (name, key), value in states.items() if key == MASTER}


def model_config(tied):
    config = load_config("test")
    config.tie_word_embeddings = tied
    return config


@pytest.fixture(scope="module")
def expected():
    """The norm of plain PyTorch's gradients, by whether embeddings are tied."""
    norms = {}
    for tied in (False, True):
        config = model_config(tied)
        model, values = build_model(config, torch.device("cpu")), weights(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        F.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
        squares = {name: parameter.grad.square().sum().item() for name, parameter in model.named_parameters()}
        norms[tied] = sum(squares.values()) ** 0.5
        assert sum(value for name, value in squares.items() if "norm" in name) > 0.3 * norms[tied] ** 2
    return norms


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
def test_each_element_counts_once(expected, ranks, flags):
    norms = run_ranks(ranks, norm_of_a_step, flags)
    assert norms == pytest.approx([expected["-tied" in flags]] * ranks, rel=2e-2)
    assert len(set(norms)) == 1  # or ranks would clip by other factors, and drift apart


def norm_of_a_step(flags):
    tied, flags = "-tied" in flags, flags.replace("-tied", "")
    engine = boosted(f"-b 4 {flags}", tie_word_embeddings=tied)
    values = weights(engine.config)
    shards.restore(engine, lambda name, key: values[name], adam_steps=0)
    group = getattr(engine.plugin, "zero_group" if "gemini" in flags else "dp_group", None)
    number = dist.get_rank(group) if engine.layout.dp > 1 else 0
    batches = tokens().chunk(engine.layout.dp)[number].chunk(engine.job.batch.accumulation_steps)
    forward_backward(engine, [{"input_ids": ids, "labels": ids} for ids in batches], LABELS)
    return optimizer_step(engine)[0]
