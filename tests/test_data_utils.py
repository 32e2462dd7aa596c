"""Tokenizing, packing and ordering, on real files and against slow, obvious references."""

import argparse
import functools
import itertools
import json
import os
import pickle
import shutil
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import TEXTS, error_of, reference_stream, run_python, stream_of, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaTokenizerFast

import dataset_shards
from data_utils import (
    IGNORE_INDEX,
    LLAMA_WEIGHTS,
    GlobalOrder,
    MixedOrder,
    PackedDataset,
    Permutation,
    ShardedSampler,
    TextEncoder,
    load_tokenizer,
    mark_documents,
    parse_slice_weights,
)
from dataset_preparation import prepare_dataset
from train_utils import next_batches


class TestTokenizer:
    def test_loads_a_folder_with_only_tokenizer_model_and_says_nothing(self, tokenizer_folder):
        assert [path.name for path in tokenizer_folder.iterdir()] == ["tokenizer.model"]
        code = "import sys, data_utils; print(len(data_utils.load_tokenizer(sys.argv[1])))"
        assert run_python(code, tokenizer_folder).communicate(timeout=60) == ("600\n", "")

    def test_loads_a_saved_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert TextEncoder(load_tokenizer(str(tmp_path))).fingerprint == TextEncoder(tokenizer).fingerprint

    def test_missing_hub_name_fails_fast_with_one_line(self):
        code = "import sys, data_utils; data_utils.load_tokenizer('nobody/nothing')"
        started = time.monotonic()
        process = run_python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < 20
        assert "console.InputError: --tokenizer: nobody/nothing" in stderr.splitlines()[-1]
        assert "Retrying" not in stderr

    @pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
    def test_missing_path(self, name):
        assert error_of(load_tokenizer, name).startswith("--tokenizer: ")

    def test_folder_without_or_with_damaged_files(self, tmp_path):
        assert "holds neither" in error_of(load_tokenizer, str(tmp_path))
        (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))
        assert "is a file" in error_of(load_tokenizer, str(tmp_path / "tokenizer.model"))
        (tmp_path / "tokenizer.json").write_text("{}")
        assert f"--tokenizer: cannot load {tmp_path}" in error_of(load_tokenizer, str(tmp_path))

    def test_without_bos_token(self, tokenizer, tmp_path):
        fast = LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent)
        fast.save_pretrained(tmp_path)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings_of_file = json.loads((tmp_path / name).read_text())
            settings_of_file["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_of_file.pop("bos_token")
            (tmp_path / name).write_text(json.dumps(settings_of_file))
        assert "has no bos_token" in error_of(load_tokenizer, str(tmp_path))


class TestTextEncoder:
    def test_documents_are_framed_and_decode_to_themselves(self, tokenizer):
        encoder = TextEncoder(tokenizer)
        texts = [text for text in TEXTS if text]
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert encoder.sentencepiece.decode(ids[1:-1].tolist()) == text

    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
    def test_any_text_comes_back(self, tokenizer, text):
        if "▁" not in text:  # SentencePiece's own sign for a space
            encoder = TextEncoder(tokenizer)
            assert encoder.sentencepiece.decode(encoder.encode([text])[0][1:-1].tolist()) == text

    @pytest.mark.parametrize("fast", [False, True])
    def test_special_tokens_in_a_text_stay_text(self, tokenizer, tmp_path, fast):
        if fast:  # without its tokenizer.model
            LlamaTokenizerFast.from_pretrained(Path(tokenizer.vocab_file).parent).save_pretrained(tmp_path)
            (tmp_path / "tokenizer.model").unlink()
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        encoder = TextEncoder(tokenizer)
        assert bool(encoder.sentencepiece) is not fast
        for text in ("</s>", "one</s>two", "<s>[INST]</s>"):
            ids = encoder.encode([text])[0][1:-1]
            assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids.tolist())
            assert tokenizer.decode(ids).strip() == text
        assert encoder.encode([]) == []

    def test_fingerprint_depends_on_the_ids_alone(self, tokenizer, tokenizer_folder):
        fast = LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>")
        again = load_tokenizer(str(tokenizer_folder))
        again("some use", truncation=True, max_length=2)
        fingerprint = TextEncoder(tokenizer).fingerprint
        assert TextEncoder(again).fingerprint == fingerprint != TextEncoder(fast).fingerprint


class TestPacking:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        files=st.lists(
            st.lists(st.text(alphabet="aé \n</s>1😀", max_size=40), min_size=1, max_size=8), min_size=1, max_size=3
        ),
        max_length=st.integers(1, 40),
        unit_bytes=st.integers(1, 300),
        num_workers=st.sampled_from([1, 2]),
    )
    def test_equals_the_obvious_reference(
        self, tokenizer, tmp_path_factory, monkeypatch, files, max_length, unit_bytes, num_workers
    ):
        monkeypatch.setattr(dataset_shards, "MIN_UNIT_BYTES", unit_bytes)
        folder = tmp_path_factory.mktemp("packing")
        for number, texts in enumerate(files):
            write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in texts])
        expected = reference_stream(tokenizer, itertools.chain(*files))
        prepare = functools.partial(prepare_dataset, str(folder), tokenizer, folder / "cache", num_workers)
        if not expected:
            assert str(folder) in error_of(prepare)
            return
        prepared = prepare()
        assert stream_of(prepared).dtype == np.uint16
        assert stream_of(prepared).tolist() == expected
        if len(expected) < max_length:
            message = error_of(PackedDataset, prepared, max_length)
            assert "--max_length" in message
            assert f" {max_length} " in message
            assert f" {len(expected)} " in message
            return
        dataset = PackedDataset(prepared, max_length)
        items = [dataset[index] for index in range(len(dataset))]
        assert [item["input_ids"].tolist() for item in items] == [
            expected[start : start + max_length] for start in range(0, len(expected) - max_length + 1, max_length)
        ]
        assert all(torch.equal(item["input_ids"], item["labels"]) for item in items)
        assert items[0]["input_ids"].dtype == items[0]["labels"].dtype == torch.int64
        assert dataset.tail_tokens == len(expected) % max_length

    def test_works_in_loader_processes_and_when_pickled(self, tokenizer, words):
        dataset = PackedDataset(prepare_dataset(str(words[0]), tokenizer, words[1]), 16)
        direct = torch.stack([dataset[index]["input_ids"] for index in range(len(dataset))])
        loader = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=4, num_workers=2)
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), direct)
        with pytest.raises(IndexError):
            dataset[len(dataset)]

    def test_fingerprint_follows_the_tokens_not_the_place(self, tokenizer, tmp_path):
        for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
            (tmp_path / name).mkdir()
            write_jsonl(tmp_path / name / "x.jsonl", [{"text": text}])
        a, b, c = (
            PackedDataset(prepare_dataset(str(tmp_path / name), tokenizer, tmp_path / "cache"), 2).fingerprint
            for name in "abc"
        )
        assert a == b != c

    def test_damaged_folder(self, tokenizer, words, tmp_path):
        folder = prepare_dataset(str(words[0]), tokenizer, tmp_path)
        shard = folder / "tokens-00000.bin"
        os.truncate(shard, shard.stat().st_size - 2)
        assert f"--dataset: {shard} has {shard.stat().st_size} bytes" in error_of(PackedDataset, folder, 8)
        shard.unlink()
        assert str(shard) in error_of(PackedDataset, folder, 8)
        (folder / "manifest.json").write_text("{")
        assert str(folder / "manifest.json") in error_of(PackedDataset, folder, 8)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_token_beyond_the_vocabulary_ends_the_run_in_one_line(self, words, tokenizer, tmp_path, num_workers):
        """Of a shard too large to be checked when it is opened."""
        prepared = Path(shutil.copytree(prepare_dataset(str(words[0]), tokenizer, words[1]), tmp_path / "prepared"))
        dataset = PackedDataset(prepared, 16)
        shard = prepared / dataset.shards[0]["file"]
        with open(shard, "r+b") as file:
            file.write(b"\xff\xff")
        batches, reason = next_batches(iter(DataLoader(dataset, batch_size=2, num_workers=num_workers)), 1)
        assert batches == []
        assert reason.startswith(f"--dataset: {shard} is damaged: it holds the token 65535 of a vocabulary of")
        assert "\n" not in reason


class TestMarkDocuments:
    @settings(deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
    def test_positions_restart_and_first_tokens_are_not_predicted(self, lengths, cut, one_token_for_both):
        """Documents of BOS, `length` tokens and EOS; the sequence starts `cut` tokens into the first."""
        bos, eos = (1, 1) if one_token_for_both else (1, 2)
        cut = min(cut, lengths[0] + 1)
        stream = [[bos, *range(3, 3 + length), eos] for length in lengths]
        positions = [place for document in stream for place in range(len(document))][cut:]
        for place in range(len(stream[0]) - cut):
            positions[place] = place
        ids = torch.tensor(list(itertools.chain(*stream))[cut:])
        item = mark_documents({"input_ids": ids, "labels": ids.clone()}, bos, eos)
        assert item["position_ids"].tolist() == positions
        assert item["labels"].tolist() == [
            IGNORE_INDEX if place == 0 else token for place, token in zip(positions, ids.tolist(), strict=True)
        ]

    def test_a_bos_spelled_out_is_text(self, sample_tokenizer):
        text = "a <s> b</s><s> c"
        (ids,) = TextEncoder(sample_tokenizer).encode([text])
        assert (ids == sample_tokenizer.bos_token_id).sum() == 1
        assert sample_tokenizer.decode(ids[1:-1]) == text


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

    def test_takes_no_memory_for_three_hundred_million(self):
        tracemalloc.start()
        order = GlobalOrder(300_000_000, seed=1)
        seen = {order[position] for position in range(299_999_000, 300_001_000)}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert max(seen) < 300_000_000
        assert len(seen) > 1990
        assert peak < 1_000_000

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

    @settings(deadline=None)
    @given(
        SLICES,
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5),
        st.integers(0, 99),
    )
    def test_any_schedule_of_ranks_and_batches_follows_one_order(self, slices, schedule, seed):
        """Every run of the schedule makes steps of a batch a rank and ends; the next one resumes on other ranks."""
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
