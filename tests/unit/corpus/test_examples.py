"""Folders of examples are built, used again, repaired if damaged, and built by two nodes at once; packs."""

import contextlib
import functools
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
from corpus.sources import resolve_source
from data_utils import InstructionDataset
from instruction_rows import PROMPTED, ROWS, encoded, prepare_rows, write_rows
from model_utils import IGNORE_INDEX


@pytest.fixture
def prepare(tmp_path, sample_tokenizer):
    return functools.partial(prepare_rows, tmp_path, tokenizer=sample_tokenizer)


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
        """Another host begins and ends while the first one tokenizes."""
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


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_packing(lengths):
    packs = list(pack(lengths, 30))
    assert sorted(example for members in packs for example in members) == list(range(len(lengths)))
    sizes = [sum(lengths[example] for example in members) for members in packs]
    assert max(sizes) <= 30
    assert sum(size <= 15 for size in sizes) <= 1  # else two of them would have become one
