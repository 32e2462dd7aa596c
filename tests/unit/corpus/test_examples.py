"""Folders of examples, packs of them, padding and order by length."""

import contextlib
import functools
import itertools
import pickle
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import error_of
from corpus import examples
from corpus.examples import pack, prepare_examples
from corpus.instructions import ExampleEncoder
from corpus.manifest import MANIFEST_NAME
from corpus.order import LengthGroupedOrder, ShardedSampler
from corpus.sources import resolve_source
from data_utils import InstructionDataset
from instruction_rows import PROMPTED, ROWS, encoded, write_rows
from model_utils import IGNORE_INDEX


@pytest.fixture
def prepare(tmp_path, sample_tokenizer):
    """Prepares rows and gives the folder."""

    def prepare(rows, max_length=64, train_on_prompt=False, tokenizer=sample_tokenizer):
        path = tmp_path / f"rows-{len(rows)}.jsonl"
        source = resolve_source(str(path)) if path.exists() else write_rows(path, rows)
        encoder = ExampleEncoder(tokenizer, PROMPTED, max_length, train_on_prompt)
        return prepare_examples(source, encoder, tmp_path / "cache")

    return prepare


class TestPreparedFolder:
    @pytest.mark.parametrize("parallel_bytes", [2**30, 0])
    def test_holds_every_example_and_counts_the_rest(self, prepare, sample_tokenizer, monkeypatch, parallel_bytes):
        monkeypatch.setattr(examples, "PARALLEL_BYTES", parallel_bytes)
        rows = [*ROWS, {"prompt": "a"}, {"prompt": "word " * 100, "completion": "b"}] * 200  # several batches
        dataset = InstructionDataset(prepare(rows))
        expected = [
            example for example in encoded(sample_tokenizer, *rows, max_length=64) if not isinstance(example, str)
        ]
        assert len(dataset) == len(expected) == 6 * 200
        for item, example in zip(dataset, expected, strict=False):
            assert item["input_ids"].tolist() == example.ids.tolist()
            labels = np.where(example.labels, example.ids, IGNORE_INDEX)
            assert item["labels"].tolist() == labels.tolist()
        assert dataset.manifest["skipped"] == {
            "completion missing or null": 200,
            "no token of the completion within --max_length 64": 200,
        }
        assert "200 with completion missing or null" in dataset.description
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[7]["labels"], dataset[7]["labels"])

    def test_is_used_again_and_made_anew_for_whatever_changes_it(self, prepare, tokenizer):
        first = prepare(ROWS)
        made = (first / "tokens.bin").stat().st_mtime_ns
        assert prepare(ROWS) == first
        assert (first / "tokens.bin").stat().st_mtime_ns == made
        folders = [prepare(ROWS, max_length=32), prepare(ROWS, train_on_prompt=True)]
        folders += [prepare(ROWS, tokenizer=tokenizer), prepare(ROWS[:4])]
        assert len({first, *folders}) == 5
        fingerprints = {InstructionDataset(folder, packed).fingerprint for folder in folders for packed in (0, 1)}
        assert len(fingerprints) == 8

    def test_what_is_left_out_is_said_each_time(self, tmp_path, sample_tokenizer, capsys):
        (tmp_path / "data").mkdir()
        write_rows(tmp_path / "data" / "x.jsonl", ROWS)
        (tmp_path / "data" / "more.csv").write_text("x")
        for _ in range(2):
            encoder = ExampleEncoder(sample_tokenizer, PROMPTED, 64, False)
            prepare_examples(resolve_source(str(tmp_path / "data")), encoder, tmp_path / "cache")
            assert capsys.readouterr().out.count(f"left out in {tmp_path / 'data'}: 1 .csv\n") == 1

    def test_no_usable_row(self, prepare, tmp_path):
        long = [{"prompt": "word " * 100, "completion": "b"}] * 3
        message = error_of(prepare, long)
        assert message.startswith("--dataset: rows-3.jsonl of ")
        assert "has no usable row (skipped: 3 with no token of the completion within --max_length 64)" in message
        assert list((tmp_path / "cache").glob("*/")) == []

    def test_damaged_folder(self, prepare):
        folder = prepare(ROWS)
        (folder / "labels.bin").write_bytes(b"")
        assert f"--dataset: {folder / 'labels.bin'} has 0 bytes instead of" in error_of(InstructionDataset, folder)

    @pytest.mark.parametrize("name", ["tokens.bin", "labels.bin", "ends.bin", "packs.bin", "pack_ends.bin"])
    def test_a_flipped_bit_is_found_and_mended(self, prepare, capsys, name):
        folder = prepare(ROWS)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        capsys.readouterr()
        assert prepare(ROWS) == folder
        assert f"{folder / name} is damaged or missing; tokenizing the data set again" in capsys.readouterr().out
        assert (folder / name).read_bytes() == content

    @pytest.mark.parametrize(
        "damage", [lambda text: text.replace('"examples": 6', '"examples": 5'), lambda _: "{", len]
    )
    def test_a_damaged_manifest(self, prepare, capsys, damage):
        manifest = prepare(ROWS) / MANIFEST_NAME
        content = manifest.read_text()
        manifest.write_text(str(damage(content)))
        prepare(ROWS)
        assert f"{manifest} is damaged" in capsys.readouterr().out
        assert manifest.read_text() == content

    @pytest.mark.parametrize("limit", [100, 2000])
    def test_a_full_disk(self, prepare, tmp_path, limit):
        rows = [*ROWS, *ROWS] * 10
        write_rows(tmp_path / f"rows-{len(rows)}.jsonl", rows)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # writes fail, as on a full disk, with another errno
        try:
            message = error_of(prepare, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert message == (
            f"--cache_dir: cannot write to {tmp_path / 'cache'} (File too large); "
            "make room there, or give a folder with enough"
        )

    def test_what_is_not_used_is_named_from_the_cache_too(self, prepare, monkeypatch):
        monkeypatch.setattr(examples, "PARALLEL_BYTES", 0)
        rows = [*({**row, "id": number} for number, row in enumerate(ROWS * 100)), {"prompt": "a", "source": "b"}]
        for _ in range(2):
            assert InstructionDataset(prepare(rows)).description.endswith("; not used: column id, column source")

    def test_two_nodes_build_at_once_where_there_are_no_locks(self, prepare, monkeypatch):
        """The second begins and ends while the first tokenizes, as another host of another name does."""
        write, folders = examples._write_packs, []

        def overtaken(*arguments):
            with monkeypatch.context() as other:
                other.setattr(examples, "_write_packs", write)
                other.setattr("socket.gethostname", lambda: "other")
                folders.append(prepare(ROWS))
            write(*arguments)

        monkeypatch.setattr(examples, "_write_packs", overtaken)
        monkeypatch.setattr(examples, "exclusive_lock", lambda *_: contextlib.nullcontext())
        assert [prepare(ROWS)] == folders
        assert len(InstructionDataset(folders[0])) == len(ROWS)
        assert not list(folders[0].parent.glob("*.partial"))

    def test_a_build_that_is_killed_leaves_nothing_that_looks_complete(self, prepare, monkeypatch):
        monkeypatch.setattr(examples, "pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(ROWS)
        monkeypatch.undo()
        assert (prepare(ROWS) / MANIFEST_NAME).is_file()


class TestBatches:
    def test_are_padded_to_the_longest_rounded_up(self, prepare):
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

    def test_to_a_multiple_that_sequence_parallelism_divides(self, prepare):
        dataset = InstructionDataset(prepare(ROWS), multiple=3)
        assert dataset.collate([dataset[0]])["labels"].shape == (1, 24)

    def test_packs_hold_every_example_once_and_apart(self, prepare):
        folder = prepare(ROWS * 7)
        alone, packed = InstructionDataset(folder), InstructionDataset(folder, packed=True)
        seen = []
        for item in packed:
            assert len(item["input_ids"]) <= 64
            starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), len(item["labels"])]
            for first, last in itertools.pairwise(starts):
                assert item["position_ids"][first:last].tolist() == list(range(last - first))
                seen.append((item["input_ids"][first:last].tolist(), item["labels"][first:last].tolist()))
        expected = [(item["input_ids"].tolist(), item["labels"].tolist()) for item in alone]
        assert sorted(seen) == sorted(expected)
        assert len(packed) * 64 < 1.2 * alone.manifest["tokens"]
        batch = packed.collate([packed[0], packed[1]])
        assert batch["position_ids"].shape == batch["labels"].shape
        assert (batch["position_ids"] == 0).sum() >= (packed[0]["position_ids"] == 0).sum() * 2 - 1

    @settings(deadline=None, max_examples=50)
    @given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80))
    def test_packing(self, lengths):
        packs = list(pack(lengths, 30))
        assert sorted(example for members in packs for example in members) == list(range(len(lengths)))
        sizes = [sum(lengths[example] for example in members) for members in packs]
        assert max(sizes) <= 30
        assert sum(size <= 15 for size in sizes) <= 1  # else two of them would have become one


class LengthsOnly:
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, index):
        return self.lengths[index]


class TestLengthGroupedOrder:
    @settings(deadline=None, max_examples=30)
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
        seed=st.integers(0, 2**32),
        group=st.integers(1, 9),
    )
    def test_each_epoch_has_every_sequence_once_whatever_is_asked_first(self, lengths, seed, group):
        dataset, count = LengthsOnly(lengths), len(lengths)
        order = LengthGroupedOrder(dataset, seed, group)
        forward = [order[position] for position in range(3 * count)]
        backward = [LengthGroupedOrder(dataset, seed, group)[position] for position in reversed(range(3 * count))]
        assert forward == backward[::-1]
        for epoch in range(3):
            assert sorted(forward[epoch * count : (epoch + 1) * count]) == list(range(count))

    def test_groups_are_of_like_length_and_differ_from_epoch_to_epoch(self):
        generator = np.random.default_rng(0)
        lengths = generator.integers(10, 1000, 4096)
        order = LengthGroupedOrder(LengthsOnly(lengths), 42, 16)
        epochs = [[order[epoch * 4096 + position] for position in range(4096)] for epoch in range(2)]
        groups = [np.array(epoch).reshape(-1, 16) for epoch in epochs]
        padded = sum(lengths[group].max() * 16 for group in groups[0])
        assert padded < 1.02 * lengths.sum()  # 1.8 times in a plain order
        together = [{frozenset(group.tolist()) for group in epoch} for epoch in groups]
        assert len(together[0] & together[1]) == 0
        means = [lengths[group].mean() for group in groups[0]]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2  # not from short to long

    def test_ranks_share_it_and_a_resume_on_others_goes_on(self):
        dataset = LengthsOnly(list(range(100)))
        whole = [LengthGroupedOrder(dataset, 1, 8)[position] for position in range(150)]

        def read(ranks, start, stop):
            order = functools.partial(LengthGroupedOrder, dataset, group_size=8)
            shares = [
                list(ShardedSampler(dataset, ranks, rank, seed=1, start=start, stop=stop, order=order))
                for rank in range(ranks)
            ]
            return [index for step in zip(*shares, strict=True) for index in step]

        assert read(2, 0, 60) + read(3, 60, 150) == whole
