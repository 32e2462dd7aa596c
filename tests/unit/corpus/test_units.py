"""Files are cut and joined into units, which any number of processes tokenizes."""

import gzip
import inspect
import json
import os
import pydoc
import signal
from pathlib import Path

import numpy as np
import pytest

from corpora import (
    PREPARE,
    error_of,
    files_of,
    reference_stream,
    run_python,
    wait_until,
    write_jsonl,
)
from corpus import units
from corpus.encoder import TextEncoder
from corpus.prepare import Part, prepare_dataset, prepare_folder
from corpus.rows import Span, read_rows
from corpus.sources import resolve_source


class TestUnits:
    @pytest.fixture(autouse=True)
    def small_units(self, monkeypatch):
        monkeypatch.setattr(units, "MIN_UNIT_BYTES", 2**16)

    def test_parts_of_a_file_are_joined_without_a_gap(self, tokenizer, tmp_path):
        """Some lines are longer than a unit, some are shorter, and one ends exactly where a unit ends."""
        texts = [f"{number} " * (number * 997 % 30_000 + 1) for number in range(12)]
        write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
        size = (tmp_path / "x.jsonl").stat().st_size
        for parts in range(1, 40):
            bounds = [size * part // parts for part in range(parts)]
            spans = [Span(*bound) for bound in zip(bounds, [*bounds[1:], None], strict=True)]
            rows = [row.columns for span in spans for row in read_rows(tmp_path / "x.jsonl", ["text"], span=span)]
            assert [row["text"] for row in rows] == texts
        line = len((tmp_path / "x.jsonl").read_bytes().splitlines(keepends=True)[0])
        assert len(list(read_rows(tmp_path / "x.jsonl", ["text"], span=Span(line)))) == 11

    def test_workers_and_parts_give_identical_files(self, tokenizer, tmp_path, capsys):
        rows = [{"text": inspect.getsource(pydoc)[i * 100 :]} for i in range(20)]
        write_jsonl(tmp_path / "long.jsonl", rows)
        for number in range(9):
            write_jsonl(tmp_path / f"b-{number:05d}.jsonl", rows[:1])
        one, two = (prepare_dataset(str(tmp_path), tokenizer, tmp_path / f".cache{n}", n) for n in (1, 2))
        shared = tmp_path / ".shared"
        source, encoder = resolve_source(str(tmp_path)), TextEncoder(tokenizer)
        finished = [prepare_folder(source, encoder, shared, 1, part=Part(k, 3)) for k in (2, 3, 1)]
        assert finished == [False, False, True]
        assert len(files_of(one)) > 20
        assert files_of(one) == files_of(two) == files_of(shared)
        manifest = json.loads((one / "manifest.json").read_text())
        assert {shard["slice"] for shard in manifest["shards"]} == {"b", "long"}
        assert sum(shard["documents"] for shard in manifest["shards"]) == manifest["documents"] == 29

    def test_a_lone_compressed_file_and_many_small_ones(self, tokenizer, tmp_path):
        """A compressed file is one unit, encoded by several threads; small files of a slice share a unit."""
        rows = [{"text": f"document {number} "} for number in range(500)]
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        folder = prepare_dataset(str(tmp_path / "x.jsonl.gz"), tokenizer, tmp_path / "cache", 2)
        (tmp_path / "many").mkdir()
        for number, row in enumerate(rows):
            write_jsonl(tmp_path / "many" / f"x-{number:05d}.jsonl", [row])
        many = prepare_dataset(str(tmp_path / "many"), tokenizer, tmp_path / "cache", 2)
        assert (folder / "tokens-00000.bin").read_bytes() == (many / "tokens-00000.bin").read_bytes()
        assert len(files_of(many)) == 2

    def test_shards_never_mix_slices(self, tokenizer, tmp_path):
        rows = [{"text": f"{slice} {i}", "red_pajama_subset": slice} for i in range(9) for slice in ("b", "a")]
        write_jsonl(tmp_path / "x.jsonl", rows)
        folder = prepare_dataset(str(tmp_path), tokenizer, tmp_path / ".cache")
        shards = json.loads((folder / "manifest.json").read_text())["shards"]
        assert [(shard["file"], shard["slice"]) for shard in shards] == [
            ("tokens-00000.bin", "b"),
            ("tokens-00000-1.bin", "a"),
        ]
        for shard in shards:
            ids = np.fromfile(folder / shard["file"], np.uint16).tolist()
            assert ids == reference_stream(tokenizer, [f"{shard['slice']} {i}" for i in range(9)])
        write_jsonl(tmp_path / "x.jsonl", [{"text": "x", "red_pajama_subset": str(i)} for i in range(65)])
        assert "more than 64 slices" in error_of(prepare_dataset, str(tmp_path), tokenizer, tmp_path / ".cache")

    def test_units_are_those_that_the_preparation_was_begun_with(self, prepared, monkeypatch):
        """The saved units are kept even if the program would now make others; an older plan has none saved."""
        folder, prepare = prepared
        whole, plan = files_of(folder), folder / ".preparation" / "plan.json"
        lost = [folder / "manifest.json", folder / "tokens-00001.bin", folder / "tokens-00003.bin"]
        older = {name: value for name, value in json.loads(plan.read_text()).items() if name != "units"}
        for path in lost:
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(units, "MIN_UNIT_BYTES", 1500)
            assert prepare()
        assert files_of(folder) == whole
        for path in lost:
            path.unlink()
        plan.write_text(json.dumps(older))
        assert prepare()
        assert files_of(folder) == whole
        for saved in (5, [[]], [[[0, [0]]], [[1, [0, None]]]], [[[0, 1]]]):
            plan.write_text(json.dumps({**older, "units": saved}))
            assert error_of(prepare).startswith(f"--output: {plan} is damaged; delete {folder}")

    @pytest.mark.slow
    def test_killed_worker(self, tokenizer_folder, slow_source, tmp_path):
        builder = run_python(PREPARE, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        wait_until(lambda: list((tmp_path / "cache").glob("*/.preparation/tokens-*")))
        worker = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        _, errors = builder.communicate(timeout=60)
        assert "one of 2 tokenizing processes was killed" in errors.splitlines()[-1]
        assert "scripts/prepare_dataset.py --num_workers" in errors.splitlines()[-1]


def test_bad_line_in_a_later_part_is_named_by_its_number_in_the_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    for bad in (0, 7, 23, 39):
        rows = ['{"text": "word word word"}\n'] * 40
        rows[bad] = "oops\n"
        (tmp_path / "x.jsonl").write_text("".join(rows))
        message = error_of(prepare_dataset, str(tmp_path / "x.jsonl"), tokenizer, tmp_path / "cache", 1)
        assert f"line {bad + 1}: not valid JSON" in message
