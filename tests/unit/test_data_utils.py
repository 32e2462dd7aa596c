"""Packed sequences, their documents and batches of examples, against slow and obvious references."""

import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from corpora import error_of, reference_stream, run_python, stream_of, write_jsonl
from corpus import units
from corpus.encoder import TextEncoder
from corpus.examples import prepare_examples
from corpus.instructions import Encoded
from corpus.prepare import prepare_dataset
from data_utils import InstructionDataset, PackedDataset, mark_documents
from engine.layout import Layout
from instruction_rows import ROWS, prepare_rows, write_rows
from model_utils import IGNORE_INDEX
from training.batches import Batches, StepBatch


def first_batch(loader: DataLoader) -> StepBatch:
    """Return the first step's batch of a run with one rank."""
    return Batches([(loader, 1, 1)], layout=Layout("zero2", tp=1, pp=1, sp=1, dp=1, zero_stage=2))._read()


class TestPacking:
    @pytest.mark.slow
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
        monkeypatch.setattr(units, "MIN_UNIT_BYTES", unit_bytes)
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

    def test_fingerprint_depends_on_the_tokens_not_the_folder(self, tokenizer, tmp_path):
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
    def test_folder_that_goes_away_ends_the_run_in_one_line(self, words, tokenizer, tmp_path, num_workers):
        prepared = Path(shutil.copytree(prepare_dataset(str(words[0]), tokenizer, words[1]), tmp_path / "prepared"))
        loader = DataLoader(PackedDataset(prepared, 16), batch_size=2, num_workers=num_workers)
        prepared.rename(tmp_path / "moved")
        gone = first_batch(loader)
        prepared.mkdir()
        (prepared / "tokens-00000.bin").write_bytes(b"\0\0")
        cut = first_batch(loader)
        for batch in (gone, cut):
            assert batch.error.startswith(f"--dataset: {prepared / 'tokens-00000.bin'} has gone or changed")
            assert "\n" not in batch.error

    @pytest.mark.slow
    def test_loader_process_ends_with_its_rank_even_while_reading(self):
        code = """
            import os, time
            from torch.utils.data import DataLoader
            from runtime.process import follow_rank

            started, starting = os.pipe()

            class Slow:
                def __len__(self): return 9
                def __getitem__(self, index):
                    os.write(starting, b"!")
                    time.sleep(600)

            loader = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=follow_rank))
            os.read(started, 1)
            print("reading", flush=True)
            os._exit(9)
        """
        process = run_python(code)
        output, error = process.communicate(timeout=60)  # returns once every process that holds its output has ended
        assert (process.returncode, output) == (9, "reading\n"), error

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_token_beyond_the_vocabulary_ends_the_run_in_one_line(self, words, tokenizer, tmp_path, num_workers):
        """Shards are not read at the start, so the damage shows only in a batch."""
        prepared = Path(shutil.copytree(prepare_dataset(str(words[0]), tokenizer, words[1]), tmp_path / "prepared"))
        dataset = PackedDataset(prepared, 16)
        shard = prepared / dataset.shards[0]["file"]
        with open(shard, "r+b") as file:
            file.write(b"\xff\xff")
        batch = first_batch(DataLoader(dataset, batch_size=2, num_workers=num_workers))
        assert batch.micro_batches == []
        assert batch.error.startswith(f"--dataset: {shard} is damaged: it holds the token 65535 of a vocabulary of")
        assert "\n" not in batch.error


@pytest.fixture
def prepare(tmp_path, sample_tokenizer):
    return functools.partial(prepare_rows, tmp_path, tokenizer=sample_tokenizer)


class TestInstructionDataset:
    def test_examples_are_padded_to_the_longest_rounded_up(self, prepare):
        dataset = InstructionDataset(prepare(ROWS))
        items = [dataset[0], dataset[4]]
        batch = dataset.collate(items)
        lengths = [len(item["labels"]) for item in items]
        assert batch["input_ids"].shape == batch["labels"].shape == (2, -(-max(lengths) // 8) * 8)
        assert batch["token_count"].tolist() == [sum(lengths)]
        for item, ids, labels in zip(items, batch["input_ids"], batch["labels"], strict=True):
            assert torch.equal(ids[: len(item["labels"])], item["input_ids"])
            assert torch.equal(labels[: len(item["labels"])], item["labels"])
            assert (labels[len(item["labels"]) :] == IGNORE_INDEX).all()

    def test_padding_to_a_multiple_for_sequence_parallelism(self, prepare):
        dataset = InstructionDataset(prepare(ROWS), multiple=3)
        assert dataset.collate([dataset[0]])["labels"].shape == (1, 24)

    def test_packs_hold_every_example_once_and_separately(self, prepare):
        folder = prepare(ROWS * 7)
        unpacked, packed = InstructionDataset(folder), InstructionDataset(folder, packed=True)
        seen = []
        for item in packed:
            assert len(item["input_ids"]) <= 64
            starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), len(item["labels"])]
            for first, last in itertools.pairwise(starts):
                assert item["position_ids"][first:last].tolist() == list(range(last - first))
                seen.append((item["input_ids"][first:last].tolist(), item["labels"][first:last].tolist()))
        expected = [(item["input_ids"].tolist(), item["labels"].tolist()) for item in unpacked]
        assert sorted(seen) == sorted(expected)
        assert len(packed) * 64 < 1.2 * unpacked.manifest["tokens"]
        batch = packed.collate([packed[0], packed[1]])
        assert batch["position_ids"].shape == batch["labels"].shape
        assert (batch["position_ids"] == 0).sum() >= (packed[0]["position_ids"] == 0).sum() * 2 - 1


class TestMarkDocuments:
    @settings(deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
    def test_positions_restart_and_first_tokens_are_not_predicted(self, lengths, cut, one_token_for_both):
        """Each document is BOS, `length` tokens and EOS; the sequence starts `cut` tokens into the first."""
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


class NumberedRows:
    """Stand-in for ExampleEncoder whose ids depend only on a row's number."""

    fingerprint, max_length, unused = "an encoder", 24, ()
    encoder = SimpleNamespace(dtype=np.dtype("<u2"))

    def encode(self, rows):
        for number in (row["number"] for row in rows):
            length = 2 + number * number % 23
            example = Encoded(np.arange(number, number + length), np.arange(length) % 3 > 0, number % 5 == 0)
            yield "a reason" if number % 11 == 10 else example


class TestRecorded:
    """Values recorded at commit 462033e that checkpoints hold or that decide the order of a resumed run."""

    @pytest.mark.parametrize(
        ("packed", "length", "fingerprint", "digest_of_order"),
        [
            (
                False,
                91,
                "8d9a4bd482f5dc9466d6f843193da5cbb2ee8ba4a0fe8ff78100daf2445bf340",
                "d108dcd5d8f170a695c3dba097ce46dfb8a3338e38d7685aded681df09a1fa3f",
            ),
            (
                True,
                38,
                "f552e3a879699b52765a5f45fca8c274654b4377a7ff74b404cd1bdeb9de8f15",
                "b7b6ac1a43328f6a1c5eedb68165fcb2c52c86b1e1483f9e1b9fde3c3a38d030",
            ),
        ],
    )
    def test_examples(self, tmp_path, packed, length, fingerprint, digest_of_order):
        source = write_rows(tmp_path / "rows.jsonl", [{"number": number} for number in range(100)])
        dataset = InstructionDataset(prepare_examples(source, NumberedRows(), tmp_path / "cache"), packed, multiple=3)
        assert (len(dataset), dataset.fingerprint, dataset.longest) == (length, fingerprint, 24)
        assert dataset.fix_order({}, 4) == {"length_group": 4}
        order = dataset.order(seed=7)
        indices = [order[position] for position in range(3 * length)]
        assert hashlib.sha256(json.dumps(indices).encode()).hexdigest() == digest_of_order
        if packed:
            item = {name: values.tolist() for name, values in dataset[3].items()}
            ids = [*range(38, 58), *range(41, 45)]
            places = [*range(20), *range(4)]
            assert item["input_ids"] == ids
            assert item["position_ids"] == places
            assert item["labels"] == [
                token if place % 3 else IGNORE_INDEX for token, place in zip(ids, places, strict=True)
            ]

    @pytest.mark.parametrize(
        ("weights", "order"),
        [
            (None, [12, 14, 1, 9, 2, 8, 4, 0, 5, 10, 11, 6]),
            ({"a": 1.0, "b": 3.0}, [1, 6, 6, 6, 11, 11, 0, 2, 7, 9, 0, 12]),
        ],
    )
    def test_prepared_folder(self, tmp_path, weights, order):
        """A folder of format version 2 keeps its fingerprint and order."""
        shards = []
        for number, (slice, split, tokens) in enumerate(
            (("b", "train", 70), ("b", "held_out", 40), ("a", "train", 55))
        ):
            (np.arange(tokens) * 7 % 90).astype("<u2").tofile(tmp_path / f"{number}.bin")
            counts = {"documents": 1, "tokens": tokens, "sha256": f"digest {number}"}
            shards.append({"file": f"{number}.bin", "slice": slice, "split": split, **counts})
        manifest = {"format_version": 2, "dtype": "uint16", "vocab_size": 90, "tokenizer_fingerprint": "a tokenizer"}
        manifest |= {"eval_fraction": 0.1, "total_tokens": 165, "shards": shards}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        dataset = PackedDataset(tmp_path, 8, slice_weights=weights)
        assert dataset.fingerprint == "97a8385e4f8b93d33e0814f2885fc22c28f427b5448514e29c112de17ade3072"
        assert dataset.fix_order({}, 4) == {"slice_weights": weights, "document_mask": False}
        assert [dataset.order(seed=5)[position] for position in range(12)] == order
        assert dataset[3]["input_ids"].tolist() == [token * 7 % 90 for token in range(24, 32)]
