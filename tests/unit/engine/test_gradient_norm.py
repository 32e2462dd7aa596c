"""The norm for clipping gradients, under every plugin and layout, compared with plain PyTorch.

RMSNorm weights, which tensor-parallel ranks replicate, make up much of it here, so that counting one twice shows.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine import shards
from engine.shards import MASTER, local_shards
from engine.step import forward_backward, optimizer_step
from model_utils import build_model, load_config
from processes import boosted, random_states, run_ranks

pytestmark = pytest.mark.slow

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
BOUND = 0.01  # that gradients are clipped to


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
def gradients():
    """Plain PyTorch's float32 gradients by name, for untied and tied embeddings."""
    found = {}
    for tied in (False, True):
        config = model_config(tied)
        model, values = build_model(config, torch.device("cpu")), weights(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        F.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
        found[tied] = {name: parameter.grad for name, parameter in model.named_parameters()}
        norms = {"norm" in name: 0.0 for name in found[tied]}
        for name, gradient in found[tied].items():
            norms["norm" in name] += gradient.square().sum().item()
        assert norms[True] > 0.3 * sum(norms.values())
    return found


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
def test_each_element_counts_once(gradients, ranks, flags):
    right = gradients["-tied" in flags]
    expected = torch.nn.utils.get_total_norm(list(right.values())).item()
    results = run_ranks(ranks, norm_of_a_step, flags)
    norms, moments = [norm for norm, _ in results], whole([part for _, parts in results for part in parts])
    assert norms == pytest.approx([expected] * ranks, rel=2e-2)
    assert len(set(norms)) == 1  # or ranks would clip by different factors, and drift apart
    # The first moments are 0.1 of the clipped gradients, whose norm is the bound if the norm was right.
    assert moments.keys() == right.keys()
    clipped = torch.nn.utils.get_total_norm(list(moments.values())).item() / 0.1
    assert clipped == pytest.approx(BOUND * norms[0] / (norms[0] + 1e-6), rel=3e-6)  # ColossalAI adds 1e-6
    for name, gradient in right.items():
        unclipped = moments[name] / 0.1 * norms[0] / BOUND
        assert (unclipped - gradient).norm() < 0.05 * gradient.norm(), name


def norm_of_a_step(flags):
    """Return the norm before clipping, and this rank's parts of the first moments."""
    tied, flags = "-tied" in flags, flags.replace("-tied", "")
    engine = boosted(f"-b 4 --gradient_clipping {BOUND} {flags}", tie_word_embeddings=tied)
    values = weights(engine.config)
    shards.restore(engine, lambda name, key: values[name], adam_steps=0)
    group = getattr(engine.plugin, "zero_group" if "gemini" in flags else "dp_group", None)
    number = dist.get_rank(group) if engine.layout.dp > 1 else 0
    batches = tokens().chunk(engine.layout.dp)[number].chunk(engine.job.batch.accumulation_steps)
    forward_backward(engine, [{"input_ids": ids, "labels": ids} for ids in batches], LABELS)
    norm = optimizer_step(engine)[0]
    own = [shard for shard in local_shards(engine) if shard.start < shard.stop]
    return norm, [(s.spec.name, s.split_dim, s.tp_rank, s.tp_shape, s.start, s.tensor("exp_avg")) for s in own]


def whole(parts):
    """Join the parts of each tensor."""
    split, tensors = {}, {}
    for name, dim, tp_rank, shape, start, values in parts:
        split[name] = dim
        flat = tensors.setdefault(name, {}).setdefault(tp_rank if dim is not None else 0, torch.zeros(shape.numel()))
        flat[start : start + len(values)] = values
    shapes = {name: shape for name, _, _, shape, _, _ in parts}
    return {
        name: torch.cat([flats[rank].view(shapes[name]) for rank in sorted(flats)], dim=split[name] or 0)
        for name, flats in tensors.items()
    }
