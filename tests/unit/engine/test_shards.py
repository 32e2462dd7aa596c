"""Slices of full tensors compared with an obvious reference, and every plugin's shards gathered, bit for bit."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from engine.shards import MASTER, MOMENTS, LocalShard, initialize_weights, local_shards, restore
from engine.step import forward_backward
from model_utils import ParameterSpec, build_model, initial_weight, load_config, parameter_specs
from processes import boosted, random_states, run_ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ADAM_STEPS, SEED = 7, 5

LAYOUTS = [
    (1, "-p zero2"),
    (2, "-p zero2"),
    (4, "-p zero2"),
    (2, "-p zero2_cpu"),
    (1, "-p gemini"),
    (2, "-p gemini"),
    (4, "-p gemini"),
    (2, "-p hybrid_parallel --tp 1 --pp 1 --zero 0"),
    (2, "-p hybrid_parallel --tp 1 --pp 1 --zero 2"),
    (2, "-p hybrid_parallel --tp 2 --pp 1"),
    (2, "-p hybrid_parallel --tp 1 --pp 2"),
    (2, "-p hybrid_parallel --tp 1 --pp 2 --pp_style interleaved"),
    (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2"),
    (2, "-p hybrid_parallel --tp 2 --pp 1 -x fp32"),
    (4, "-p hybrid_parallel --tp 2 --pp 1 --zero 1"),
    (4, "-p hybrid_parallel --tp 2 --pp 2"),
]


def tokens():
    return torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))


class TestRead:
    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_is_the_flat_range_of_the_tensor_parallel_part(self, data):
        rank, size = data.draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3), (3, 4)]), label="tp rank and size")
        shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), label="part's shape")
        split_dim = data.draw(st.sampled_from([None, *range(len(shape))]), label="split_dim")
        start = data.draw(st.integers(0, math.prod(shape) - 1), label="start")
        stop = data.draw(st.integers(start + 1, math.prod(shape)), label="stop")
        if split_dim is not None:
            shape[split_dim] *= size
        full = torch.arange(math.prod(shape)).view(shape)

        part = full if split_dim is None else full.chunk(size, split_dim)[rank]
        expected = part.flatten()[start:stop]
        shard = shard_of(rank, size, full.shape, split_dim, start, stop)
        assert torch.equal(shard.read(full), expected)

    def test_takes_slices_of_a_file(self, tmp_path):
        full = torch.arange(48.0).view(6, 8)
        save_file({"x": full}, tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            for split_dim, part in ((None, full), (0, full[3:]), (1, full[:, 4:])):
                shard = shard_of(1, 2, full.shape, split_dim, 5, 19)
                assert torch.equal(shard.read(file.get_slice("x")), part.flatten()[5:19])


def shard_of(tp_rank, tp_size, shape, split_dim, start, stop):
    """Return a shard on a rank that needs no process group."""
    kind = type("Shard", (LocalShard,), {"tp_rank": tp_rank, "tp_size": tp_size})
    spec = ParameterSpec("x", shape)
    return kind(spec, split_dim, None, None, False, start, stop, storage=torch.empty(0), adam_state={})


class TestEveryLayout:
    @pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
    def test_gathers_and_trains_with_the_weights_that_were_set(self, ranks, flags):
        check_layout(ranks, flags)

    @pytest.mark.parametrize(
        ("ranks", "flags"), [(2, "-p zero2"), (2, "-p gemini"), (2, "-p hybrid_parallel --tp 2 --pp 1")]
    )
    def test_tied_embeddings(self, ranks, flags):
        check_layout(ranks, flags, tie_word_embeddings=True)

    def test_initial_weights_are_the_same_under_all(self):
        config = load_config("test")
        for ranks, flags in ((1, "-p gemini"), (2, "-p zero2"), (4, "-p hybrid_parallel --tp 2 --pp 2")):
            weights = {}
            for part in run_ranks(ranks, initial_weights, flags):
                weights.update(part)
            assert len(weights) == len(parameter_specs(config))
            for spec in parameter_specs(config):
                assert torch.equal(weights[spec.name], initial_weight(spec, config, SEED, CPU)), spec.name

    def test_gemini_is_sharded_and_a_shard_may_be_empty(self):
        first, second = run_ranks(2, held_ranges, "-p gemini")
        numels = {spec.name: spec.shape.numel() for spec in parameter_specs(load_config("test"))}
        for name, numel in numels.items():
            ranges = [part[name] for part in (first, second)]
            assert sum(stop - start for start, stop in ranges) == numel
        assert 0.4 < sum(stop - start for start, stop in first.values()) / sum(numels.values()) < 0.6
        assert any(start == stop for start, stop in first.values())


def check_layout(ranks, flags, **changes):
    results = run_ranks(ranks, set_gather_and_forward, flags, changes)
    config = load_config("test")
    config.update(changes)
    gathered = {name for names, _ in results for name in names}
    assert gathered == {spec.name for spec in parameter_specs(config)}

    reference, states = build_model(config, CPU), random_states(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(states[name, MASTER])
        logits = reference(tokens()).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, tokens()[:, 1:].flatten(), reduction="sum").item()
    assert total_loss(results, flags) == pytest.approx(expected, rel=2e-3)


def total_loss(results, flags):
    losses = [loss for _, loss in results]
    return sum(losses) if "--sp" in flags else max(losses)


def set_gather_and_forward(flags, changes):
    """Restore random state; return the names of the parameters found here, and the sum of token losses."""
    engine = boosted(flags + " -b 2", **changes)
    states = random_states(engine.config)
    restore(engine, lambda name, key: states[name, key], ADAM_STEPS)
    shards = local_shards(engine)
    for number, shard in enumerate(shards):
        if shard.start < shard.stop:
            assert shard.adam_state["step"] == ADAM_STEPS
        writer = number % dist.get_world_size(shard.data_group)
        is_writer = dist.get_rank(shard.data_group) == writer and shard.tp_rank == 0
        for key in (MASTER, *MOMENTS):
            full = shard.gather(key, writer)
            assert (full is not None) == is_writer
            if is_writer:
                assert full.dtype == torch.float32
                assert torch.equal(full, states[shard.spec.name, key]), f"{shard.spec.name}.{key}"
    micro_batches = [{"input_ids": tokens(), "labels": tokens()}]
    loss = forward_backward(engine, micro_batches, label_tokens=126)
    return [shard.spec.name for shard in shards], loss.item()


def initial_weights(flags):
    engine = boosted(f"{flags} -b 2 --seed {SEED}")
    initialize_weights(engine)
    shards = local_shards(engine)
    fulls = {shard.spec.name: shard.gather(MASTER, writer=0) for shard in shards}
    return {name: full for name, full in fulls.items() if full is not None}


def held_ranges(flags):
    engine = boosted(flags)
    shards = local_shards(engine)
    assert not any(shard.replicated for shard in shards)
    return {shard.spec.name: (shard.start, shard.stop) for shard in shards}
