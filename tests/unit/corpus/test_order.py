"""Orders: every sequence once an epoch, the same on any number of ranks, in little memory."""

import argparse
import functools
import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpora import error_of
from corpus.order import (
    LLAMA_WEIGHTS,
    GlobalOrder,
    InterleavedOrder,
    Interleaving,
    LengthGroupedOrder,
    MixedOrder,
    Permutation,
)
from training.batches import ShardedSampler
from training.flags import parse_slice_weights


class TestOrder:
    @settings(deadline=None)
    @given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
    def test_permutation_is_a_bijection(self, n, seed, epoch):
        assert sorted(Permutation(n, seed, epoch)) == list(range(n))

    def test_epochs_and_seeds_differ(self):
        orders = {tuple(Permutation(100, seed, epoch)) for seed in range(10) for epoch in range(10)}
        assert len(orders) == 100

    def test_every_permutation_of_four_comes_about_equally_often(self):
        counts = {}
        for seed in range(4800):
            order = tuple(Permutation(4, seed, 0))
            counts[order] = counts.get(order, 0) + 1
        assert len(counts) == 24
        assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7  # chi-squared, 23 degrees, p = 0.001

    def test_neighbours_are_scattered(self):
        n = 100_003
        permutation = Permutation(n, 1, 0)
        places = np.array([permutation[index] for index in range(5000)])
        assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
        assert np.histogram(places, 10, (0, n))[0].min() > 400

    @pytest.mark.slow
    def test_takes_no_memory_for_three_hundred_million(self):
        tracemalloc.start()
        order = GlobalOrder(300_000_000, seed=1)
        seen = {order[position] for position in range(299_999_000, 300_001_000)}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert max(seen) < 300_000_000
        assert len(seen) > 1990
        assert peak < 1_000_000

    @pytest.mark.slow
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        num_sequences=st.integers(1, 40),
        schedule=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=5),
        shuffle=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_any_schedule_of_world_sizes_follows_one_order(self, num_sequences, schedule, shuffle, seed):
        dataset, followed, start = range(num_sequences), [], 0
        for world_size, length in schedule:
            stop = start + length
            build = functools.partial(ShardedSampler, seed=seed, start=start, stop=stop)
            samplers = [build(dataset, num_replicas=world_size, rank=r, shuffle=shuffle) for r in range(world_size)]
            shares = [list(sampler) for sampler in samplers]
            assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
            interleaved = itertools.chain(*itertools.zip_longest(*shares))
            followed += [index for index in interleaved if index is not None]
            start = stop
        order = GlobalOrder(num_sequences, seed, shuffle)
        assert followed == [order[position] for position in range(start)]
        whole_epochs = followed[: start - start % num_sequences]
        for epoch in range(len(whole_epochs) // num_sequences):
            indices = whole_epochs[epoch * num_sequences : (epoch + 1) * num_sequences]
            assert sorted(indices) == list(range(num_sequences))
            assert shuffle or indices == sorted(indices)


class SmallBlocks(MixedOrder):
    BLOCK = 50


SLICES = st.dictionaries(
    st.sampled_from("abcdefg"), st.tuples(st.integers(1, 40), st.floats(1e-3, 1e3)), min_size=1, max_size=7
)


def ranges(sizes):
    ends = list(itertools.accumulate(sizes.values()))
    return {name: range(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


WEIGHTS = {"web": 0.7, "code": 0.2, "wiki": 0.1}
SEQUENCES = {"web": range(0, 9001), "code": range(9001, 9101), "wiki": range(9101, 9200)}


class TestInterleavedOrder:
    @pytest.mark.parametrize("seed", [1, 2])
    def test_every_stretch_has_the_proportions_of_the_weights(self, seed):
        order = InterleavedOrder(SEQUENCES, Interleaving(WEIGHTS), seed)
        drawn = Counter()
        for position in range(25_000):
            assert drawn == {name: n for name, n in order.interleaving.draws(position).items() if n}
            drawn[next(name for name, numbers in SEQUENCES.items() if order[position] in numbers)] += 1
            assert all(abs(drawn[name] - weight * (position + 1)) <= 1 for name, weight in WEIGHTS.items())

    def test_every_epoch_of_a_data_set_has_each_sequence_once(self):
        order = InterleavedOrder(SEQUENCES, Interleaving(WEIGHTS), seed=3)
        for name, numbers in SEQUENCES.items():
            read = [index for index in (order[position] for position in range(23_000)) if index in numbers]
            whole = len(read) // len(numbers) * len(numbers)
            epochs = [read[start : start + len(numbers)] for start in range(0, whole, len(numbers))]
            assert epochs, name
            assert all(sorted(epoch) == list(numbers) for epoch in epochs)
            assert epochs[0] != epochs[-1] or len(epochs) == 1

    def test_a_data_set_goes_on_when_the_mixture_changes(self):
        """The next mixture begins at 1,234; together both read each data set as one mixture alone would."""
        first = Interleaving(WEIGHTS)
        second = Interleaving({"web": 0.5, "new": 0.5}, 1234, first.draws(1234))
        sequences = SEQUENCES | {"new": range(9200, 9300)}
        orders = [InterleavedOrder(sequences, interleaving, seed=4) for interleaving in (first, second)]
        read = [orders[position >= 1234][position] for position in range(4000)]
        web = [index for index in read if index in SEQUENCES["web"]]
        alone = InterleavedOrder(sequences, Interleaving({"web": 1.0}), seed=4)
        assert web == [alone[position] for position in range(len(web))]
        assert len(web) == round(0.7 * 1234) + (4000 - 1234) // 2

    def test_a_data_set_that_was_alone_goes_on_in_its_order(self):
        """At 1,234 others join it; it reads on as GlobalOrder would, also into its next epochs."""
        sequences = {"wiki": range(0, 99), "code": range(99, 199)}
        joined = InterleavedOrder(
            sequences, Interleaving({"wiki": 0.5, "code": 0.5}, 1234, {"wiki": 1234}), seed=4, alone="wiki"
        )
        plain, read = GlobalOrder(99, seed=4), [joined[position] for position in range(1234, 2000)]
        wiki = [index for index in read if index in sequences["wiki"]]
        assert wiki == [plain[position] for position in range(1234, 1234 + 383)]
        code = InterleavedOrder(sequences, Interleaving({"code": 1.0}), seed=4)
        assert [index for index in read if index >= 99] == [code[position] for position in range(383)]


class TestMixedOrder:
    @settings(deadline=None)
    @given(SLICES, st.integers(0, 99), st.integers(1, 6))
    def test_every_epoch_of_a_slice_has_each_sequence_once(self, slices, seed, blocks):
        sequences = ranges({name: size for name, (size, _) in slices.items()})
        order = SmallBlocks(sequences, {name: weight for name, (_, weight) in slices.items()}, seed)
        counts = Counter(order[position] for position in range(blocks * order.BLOCK))
        for name, numbers in sequences.items():
            drawn = sum(counts[number] for number in numbers)
            assert drawn >= blocks
            assert drawn % blocks == 0  # as often in every block
            assert {counts[number] for number in numbers} <= {drawn // len(numbers), -(-drawn // len(numbers))}, name

    @pytest.mark.slow
    @settings(deadline=None)
    @given(
        SLICES,
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5),
        st.integers(0, 99),
    )
    def test_any_schedule_of_ranks_and_batches_follows_one_order(self, slices, schedule, seed):
        """Each run of the schedule reads some steps and ends; the next one resumes on another number of ranks."""
        sequences = ranges({name: size for name, (size, _) in slices.items()})
        dataset = range(max(numbers.stop for numbers in sequences.values()))
        order = SmallBlocks(sequences, {name: weight for name, (_, weight) in slices.items()}, seed)
        followed, start = [], 0
        for world_size, batch, steps in schedule:
            stop = start + world_size * batch * steps
            shares = [
                list(
                    ShardedSampler(
                        dataset, world_size, rank, seed=seed, start=start, stop=stop, order=lambda seed: order
                    )
                )
                for rank in range(world_size)
            ]
            followed += [index for indices in zip(*shares, strict=True) for index in indices]
            start = stop
        assert followed == [order[position] for position in range(start)]

    def test_llamas_mixture(self):
        sequences = ranges(dict.fromkeys(LLAMA_WEIGHTS, 1000))
        order = MixedOrder(sequences, LLAMA_WEIGHTS, seed=1)
        numbers = [order[position] for position in range(20_000)]
        for name, per_cent in LLAMA_WEIGHTS.items():
            assert sum(number in sequences[name] for number in numbers) == 200 * per_cent
            assert sum(number in sequences[name] for number in numbers[:2000]) == pytest.approx(20 * per_cent, abs=60)
        assert "github 4.5% (0.90)" in order.describe(20_000)
        assert numbers != [MixedOrder(sequences, LLAMA_WEIGHTS, seed=2)[position] for position in range(20_000)]

    @pytest.mark.slow
    def test_takes_no_memory_for_three_hundred_million(self):
        tokens = dict(common_crawl=878, c4=175, github=59, book=26, arxiv=28, wikipedia=24, stackexchange=20)
        sequences = ranges({name: billions * 250_000 for name, billions in tokens.items()})
        tracemalloc.start()
        order = MixedOrder(sequences, LLAMA_WEIGHTS, seed=1)
        seen = {order[position] for position in range(299_999_000, 300_001_000)}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(seen) > 1990
        assert peak < 1_000_000

    def test_weights_of_slices_that_are_not_there(self):
        message = error_of(MixedOrder, {"a": range(5), "b": range(5, 5)}, {"a": 1, "b": 1, "c": 1}, 0)
        assert message == (
            "--slice_weights: the data have no whole sequence of b, c; they have a (5 sequences), b (0 sequences)"
        )

    def test_parsing(self):
        assert parse_slice_weights("llama") == LLAMA_WEIGHTS
        assert parse_slice_weights("a=1,b-c=0.5") == {"a": 1, "b-c": 0.5}
        for text in ("", "a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,"):
            with pytest.raises(argparse.ArgumentTypeError, match="NAME=WEIGHT"):
                parse_slice_weights(text)


class TestLengthGroupedOrder:
    @settings(deadline=None, max_examples=30)
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
        seed=st.integers(0, 2**32),
        group=st.integers(1, 9),
    )
    def test_each_epoch_has_every_sequence_once_whatever_is_asked_first(self, lengths, seed, group):
        ends, count = np.cumsum(lengths), len(lengths)
        order = LengthGroupedOrder(ends, seed, group)
        forward = [order[position] for position in range(3 * count)]
        backward = [LengthGroupedOrder(ends, seed, group)[position] for position in reversed(range(3 * count))]
        assert forward == backward[::-1]
        for epoch in range(3):
            assert sorted(forward[epoch * count : (epoch + 1) * count]) == list(range(count))

    def test_groups_are_of_like_length_and_differ_from_epoch_to_epoch(self):
        generator = np.random.default_rng(0)
        lengths = generator.integers(10, 1000, 4096)
        order = LengthGroupedOrder(np.cumsum(lengths), 42, 16)
        epochs = [[order[epoch * 4096 + position] for position in range(4096)] for epoch in range(2)]
        groups = [np.array(epoch).reshape(-1, 16) for epoch in epochs]
        padded = sum(lengths[group].max() * 16 for group in groups[0])
        assert padded < 1.02 * lengths.sum()  # 1.8 times in a plain order
        together = [{frozenset(group.tolist()) for group in epoch} for epoch in groups]
        assert len(together[0] & together[1]) == 0
        means = [lengths[group].mean() for group in groups[0]]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2  # not from short to long

    @pytest.mark.slow
    def test_ranks_share_it_and_a_resume_on_others_goes_on(self):
        dataset = np.cumsum(range(1, 101))
        whole = [LengthGroupedOrder(dataset, 1, 8)[position] for position in range(150)]

        def read(ranks, start, stop):
            order = functools.partial(LengthGroupedOrder, dataset, group_size=8)
            shares = [
                list(ShardedSampler(dataset, ranks, rank, seed=1, start=start, stop=stop, order=order))
                for rank in range(ranks)
            ]
            return [index for step in zip(*shares, strict=True) for index in step]

        assert read(2, 0, 60) + read(3, 60, 150) == whole
