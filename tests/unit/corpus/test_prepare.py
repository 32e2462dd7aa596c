"""From files of every kind to shards of tokens: killed, shared, damaged, against a slow, obvious reference."""

import errno
import fcntl
import functools
import gzip
import inspect
import json
import os
import pydoc
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import LlamaTokenizerFast

from corpora import ROWS, error_of, reference_stream, run_python, stream_of, write_jsonl
from corpus import rows as dataset_files
from corpus import units as dataset_shards
from corpus.encoder import TextEncoder
from corpus.manifest import is_held_out
from corpus.prepare import PREPARATION, Part, prepare_dataset, prepare_folder, verify
from corpus.rows import Span, read_rows
from corpus.sources import resolve_source
from data_utils import PackedDataset
from launching import ROOT, free_port
from pretrain import open_data, parse_args


class TestUnits:
    @pytest.fixture(autouse=True)
    def small_units(self, monkeypatch):
        monkeypatch.setattr(dataset_shards, "MIN_UNIT_BYTES", 2**16)

    def test_parts_of_a_file_are_joined_without_a_gap(self, tokenizer, tmp_path):
        """The file's lines are longer and shorter than a unit, and one ends just where a unit does."""
        texts = [f"{number} " * (number * 997 % 30_000 + 1) for number in range(12)]
        write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
        size = (tmp_path / "x.jsonl").stat().st_size
        for units in range(1, 40):
            bounds = [size * unit // units for unit in range(units)]
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
        """A compressed file is one unit, encoded in several threads; small files of a slice share a unit."""
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


def test_documents_are_held_out_by_their_text(tokenizer, tmp_path):
    texts = [f"document {number}" for number in range(300)]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    prepare = functools.partial(prepare_dataset, str(tmp_path / "x.jsonl"), tokenizer, tmp_path / "cache")
    folder = prepare(eval_fraction=0.1)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    for split, held_out in (("train", False), ("held_out", True)):
        (shard,) = (shard for shard in shards if shard["split"] == split)
        expected = reference_stream(tokenizer, [text for text in texts if is_held_out(text, 0.1) is held_out])
        assert np.fromfile(folder / shard["file"], np.uint16).tolist() == expected
    assert folder not in (prepare(), prepare(eval_fraction=0.2))
    assert prepare_dataset(str(folder), tokenizer, tmp_path / "cache") == folder
    message = error_of(prepare_dataset, str(folder), tokenizer, tmp_path / "cache", eval_fraction=0.5)
    assert message.startswith("--eval_fraction: ")


def files_of(folder):
    """The content of every file of a prepared folder that is not a means to the preparation, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


GOOD = b'{"text": "fine"}\n'


def parquet(*tables):
    """A file of as many row groups."""
    sink = pa.BufferOutputStream()
    with pa.parquet.ParquetWriter(sink, pa.schema({"text": pa.string()})) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("x.jsonl", b"", "is empty"),
            ("x.jsonl.gz", gzip.compress(b""), "is empty: it has no row"),
            ("x.jsonl.zst", pa.compress(b"", "zstd", asbytes=True), "is empty: it has no row"),
            ("x.jsonl", b"\n \n", "is empty: it has no row"),
            ("x.jsonl.gz", gzip.compress(b"\n \n"), "is empty: it has no row"),
            ("x.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), "is empty: it has no row"),
            ("x.parquet", parquet(), "is empty: it has no row"),
            ("x.jsonl.gz", gzip.compress(GOOD * 9)[:-3], "row 9 (Truncated compressed stream, at byte"),
            ("x.jsonl.zst", pa.compress(GOOD * 9, "zstd", asbytes=True)[:-3], "row 0 (Truncated compressed stream"),
            ("x.jsonl.gz", GOOD, "cannot be read beyond row 0"),
            (
                "x.jsonl",
                GOOD + b'{"text": "cut o',
                "line 2: not valid JSON (Unterminated string starting at); the file seems",
            ),
            ("x.jsonl", GOOD + b"{'text': 1}\n", "line 2: not valid JSON"),
            ("x.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2: not valid JSON"),
            ("x.jsonl", GOOD * 2 + b'["text"]\n', "line 3: a JSON list"),
            ("x.json", b'[\n{"text": "a"}\n]\n', "line 1: a JSON list; write one object a line"),
            ("x.jsonl", GOOD + b'{"text": "\xff\xfe"}\n', "line 2: not UTF-8 (invalid start byte at byte 10)"),
            ("x.jsonl", b'\n{"prompt": 1, "body": 2}\n', "has no column 'text', only: prompt, body"),
            ("x.parquet", b"PAR1 not really", "cannot be read beyond row 0"),
        ],
    )
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_damaged_file(self, tokenizer, tmp_path, name, content, expected, num_workers):
        (tmp_path / "good.jsonl").write_bytes(GOOD)
        (tmp_path / name).write_bytes(content)
        message = error_of(prepare_dataset, str(tmp_path), tokenizer, tmp_path / ".cache", num_workers)
        assert message.startswith(f"--dataset: {tmp_path / name}")
        assert expected in message
        assert not list((tmp_path / ".cache").glob("*/manifest.json"))

    @pytest.mark.parametrize("suffix", ["gz", "zst"])
    def test_compressed_file_is_read_up_to_where_it_breaks_off(self, tmp_path, suffix):
        texts = [f"{place}, {place**99}" for place in range(20_000)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        whole = gzip.compress(content) if suffix == "gz" else pa.compress(content, "zstd", asbytes=True)
        path = tmp_path / f"x.jsonl.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        rows = []
        message = error_of(lambda: rows.extend(row.columns["text"] for row in read_rows(path, ["text"])))
        assert rows == texts[: len(rows)]
        assert abs(len(rows) - 10_000) < 1000
        size = f"{len(whole) // 2:,}"
        reason = f"Truncated compressed stream, at byte {size} of {size}"
        assert message == f"--dataset: {path} cannot be read beyond row {len(rows)} ({reason}); copy it again"

    def test_error_beyond_the_first_batches_names_its_line(self, tokenizer, tmp_path):
        line = json.dumps({"text": "word " * 20_000}) + "\n"
        (tmp_path / "x.jsonl").write_text(line * 30 + "oops\n" + line)
        message = error_of(prepare_dataset, str(tmp_path), tokenizer, tmp_path / "cache", 2)
        assert f"{tmp_path / 'x.jsonl'}, line 31: not valid JSON" in message

    def test_damaged_or_unsuitable_tables(self, tokenizer, tmp_path):
        prepare = functools.partial(prepare_dataset, str(tmp_path / "x"), tokenizer, tmp_path / "cache")
        (tmp_path / "x").mkdir()
        path = tmp_path / "x" / "rows.parquet"
        pa.parquet.write_table(pa.table({"prompt": ["p"], "body": ["b"]}), path)
        assert f"{path} has no column 'text', only: prompt, body" in error_of(prepare)
        pa.parquet.write_table(pa.table({"text": [1, 2]}), path)
        assert "no usable row (skipped: 2 with text not a string)" in error_of(prepare)
        pa.parquet.write_table(pa.table({"text": [str(i) * 99 for i in range(999)]}), path)
        content = bytearray(path.read_bytes())
        content[4:200] = bytes(196)
        path.write_bytes(content)
        assert f"--dataset: {path} cannot be read" in error_of(prepare)
        path.unlink()
        datasets.Dataset.from_dict({"text": ["long " * 100] * 1000}).save_to_disk(tmp_path / "x")
        (arrow,) = (tmp_path / "x").glob("*.arrow")
        os.truncate(arrow, arrow.stat().st_size // 2)
        assert f"--dataset: {arrow} cannot be read" in error_of(prepare)

    def test_source_without_usable_files(self, tokenizer, tmp_path):
        prepare = functools.partial(prepare_dataset, tokenizer=tokenizer, cache_dir=tmp_path / "cache")
        assert "./name is neither a file nor a folder" in error_of(prepare, "./name")
        (tmp_path / "notes.txt").write_text("hello")
        assert "holds no file of a known kind: .jsonl" in error_of(prepare, str(tmp_path))
        assert "is not of a known kind: .jsonl" in error_of(prepare, str(tmp_path / "notes.txt"))
        (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone.jsonl")
        assert f"{tmp_path / 'broken.jsonl'} cannot be read" in error_of(prepare, str(tmp_path))
        splits = {name: datasets.Dataset.from_dict({"text": ["x"]}) for name in ("dev", "test")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert "no split 'train'; give the folder of one of: dev, test" in error_of(prepare, str(tmp_path / "saved"))

    def test_cache_dir_that_cannot_be_written(self, tokenizer, words, tmp_path):
        (tmp_path / "file").write_text("")
        message = error_of(prepare_dataset, str(words[0]), tokenizer, tmp_path / "file" / "cache")
        assert message.startswith(f"--cache_dir: cannot write to {tmp_path / 'file' / 'cache'}")

    def test_finished_folder_that_cannot_be_written_is_complete(self, tokenizer, locked_folder, capsys):
        source = write_jsonl(locked_folder.with_name("open") / "x.jsonl", [{"text": "some words"}])
        folder = source.with_name("prepared")
        prepare = functools.partial(prepare_folder, resolve_source(str(source)), TextEncoder(tokenizer), folder, 1)
        assert prepare()
        folders = (folder / PREPARATION, folder)
        for path in folders:
            path.chmod(0o555)
        _, effective, _ = os.getresuid()
        os.seteuid(os.getuid())
        try:
            assert prepare()
        finally:
            os.seteuid(effective)
            for path in folders:
                path.chmod(0o755)
        assert capsys.readouterr().out.splitlines()[-1] == f"{folder} is complete already"


class TestFolders:
    def test_a_folder_of_others_files_is_not_filled(self, tokenizer, tmp_path):
        """Least of all the data's own, which would be taken for a prepared one from then on."""
        write_jsonl(tmp_path / "x.jsonl", ROWS)
        source = resolve_source(str(tmp_path))
        message = error_of(prepare_folder, source, TextEncoder(tokenizer), tmp_path, 1)
        assert message == f"--output: {tmp_path} has other files; give a new or an empty folder"
        assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

    """Other files in a folder beside the documents, and links to these."""

    def test_links_in_a_circle_and_descriptions_beside_the_data(self, tokenizer, tmp_path):
        source = tmp_path / "source"
        (source / "b").mkdir(parents=True)
        write_jsonl(source / "a.JSONL", [{"text": "upper"}])
        write_jsonl(source / "b" / "x.jsonl", [{"text": "lower"}])
        (source / "b" / "circle").symlink_to(source)
        (source / "again").symlink_to(source / "b")
        for name in ("dataset_infos.json", "state.json", "dataset_dict.json"):
            (source / name).write_text('{"not": "documents"}')
        folder = prepare_dataset(str(source), tokenizer, tmp_path / "cache")
        assert stream_of(folder).tolist() == reference_stream(tokenizer, ["upper", "lower"])

    def test_a_file_counts_once_and_what_is_no_file_is_refused(self, tokenizer, tmp_path):
        write_jsonl(tmp_path / "z.jsonl", [{"text": "once"}])
        (tmp_path / "a.jsonl").symlink_to("z.jsonl")
        outside = write_jsonl(tmp_path.with_name(f"{tmp_path.name}.jsonl"), [{"text": "elsewhere"}])
        for name in ("b.jsonl", "c.jsonl"):
            (tmp_path / name).symlink_to(outside)
        assert [file.path for file in resolve_source(str(tmp_path)).files] == ["b.jsonl", "z.jsonl"]
        os.mkfifo(tmp_path / "pipe.jsonl")
        assert f"{tmp_path / 'pipe.jsonl'} is no regular file" in error_of(resolve_source, str(tmp_path))

    def test_what_is_left_out_is_said(self, tokenizer, tmp_path, capsys):
        source = tmp_path / "source"
        source.mkdir()
        for name in ("c4-train.00000-of-00002.jsonl", "c4-validation.00000-of-00001.jsonl", "notes.txt", "more.csv"):
            write_jsonl(source / name, [{"text": name}])
        prepare_dataset(str(source), tokenizer, tmp_path / "cache")
        left_out = "1 of other splits (c4-validation.00000-of-00001.jsonl), 1 .csv, 1 .txt"
        assert capsys.readouterr().out.count(f"left out in {source}: {left_out}") == 1
        prepare_dataset(str(source), tokenizer, tmp_path / "cache")
        assert capsys.readouterr().out == f"left out in {source}: {left_out}\n"
        args = parse_args(["-d", str(source), "--streaming", "--max_steps", "1", "-l", "16"])
        open_data(args, tokenizer)
        assert capsys.readouterr().out == f"left out in {source}: {left_out}\n"

    def test_training_on_another_split_is_said(self, tmp_path, capsys):
        for name in ("test.jsonl", "dev.jsonl"):
            write_jsonl(tmp_path / name, [{"text": name}])
        assert len(resolve_source(str(tmp_path)).files) == 2
        said = f"--dataset: {tmp_path} has only files of split test, validation; training on them\n"
        assert capsys.readouterr().out == said
        write_jsonl(tmp_path / "more.jsonl", [{"text": "more"}])
        assert [file.path for file in resolve_source(str(tmp_path)).files] == ["more.jsonl"]
        assert resolve_source(str(tmp_path / "test.jsonl")).files  # the user's choice
        assert capsys.readouterr().out == ""

    def test_folder_that_may_not_be_read(self, tokenizer, tmp_path, monkeypatch):
        (tmp_path / "closed").mkdir()
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        message = error_of(resolve_source, str(tmp_path))
        assert message.startswith(f"--dataset: {tmp_path / 'closed'} cannot be read (Permission denied)")


class TestHardInput:
    def test_very_long_and_very_many_documents(self, tokenizer_folder, tmp_path):
        """50 MB of words, 50 MB of one letter, and a million documents, in little memory; one long line is refused."""
        numbers = " ".join(map(str, range(7_000_000)))
        tiny = '{"text": "a"}\n' * 1_000_000
        documents = [json.dumps({"text": text}) + "\n" for text in (numbers, "a" * 50_000_000, "", "\x00\x00")]
        (tmp_path / "x.jsonl").write_text("".join(documents) + tiny)
        code = """
            import resource, sys
            from corpus.prepare import prepare_dataset
            from corpus.tokenizer import load_tokenizer
            tokenizer = load_tokenizer(sys.argv[2])
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(prepare_dataset(sys.argv[1], tokenizer, sys.argv[3], 2))
            workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(2 * workers - before)
        """
        process = run_python(code, tmp_path / "x.jsonl", tokenizer_folder, tmp_path / "cache")
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        *_, folder, kilobytes = output.split()
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        assert manifest["documents"] == 1_000_003
        assert manifest["skipped"] == {"text empty": 1}
        assert int(kilobytes) < 2_000_000

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"text": "x', "has one document of more than 1,000 bytes; split it"),
            ('["x', "has one line of more than 1,000 bytes; write one JSON object a line"),
        ],
    )
    def test_line_without_end(self, tokenizer, tmp_path, monkeypatch, line, problem):
        monkeypatch.setattr(dataset_files, "MAX_LINE_BYTES", 1000)
        (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "x" * 1000)
        assert problem in error_of(prepare_dataset, str(tmp_path), tokenizer, tmp_path / ".cache")

    def test_bad_line_in_a_later_part_is_named_by_its_number_in_the_file(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(dataset_shards, "MIN_UNIT_BYTES", 100)
        for bad in (0, 7, 23, 39):
            rows = ['{"text": "word word word"}\n'] * 40
            rows[bad] = "oops\n"
            (tmp_path / "x.jsonl").write_text("".join(rows))
            message = error_of(prepare_dataset, str(tmp_path / "x.jsonl"), tokenizer, tmp_path / "cache", 1)
            assert f"line {bad + 1}: not valid JSON" in message


class TestDamage:
    @pytest.fixture
    def prepared(self, tokenizer, tmp_path, monkeypatch):
        """(folder, function that prepares what is missing in it)"""
        monkeypatch.setattr(dataset_shards, "MIN_UNIT_BYTES", 1000)
        write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i} " * 9} for i in range(60)])
        encoder = TextEncoder(tokenizer)

        def prepare(**options):
            return prepare_folder(resolve_source(str(tmp_path / "x.jsonl")), encoder, tmp_path / "out", 1, **options)

        assert prepare()
        return tmp_path / "out", prepare

    def test_damaged_shard_is_named_and_made_again(self, prepared, tokenizer, tmp_path):
        folder, prepare = prepared
        whole, shard = files_of(folder), folder / "tokens-00002.bin"
        shard.write_bytes(whole[shard.name][:-1] + b"x")
        message = error_of(prepare_dataset, str(folder), tokenizer, tmp_path)
        assert message.startswith(f"--dataset: {shard} is damaged or missing; delete it and prepare")
        assert message == error_of(verify, folder, 2)
        shard.unlink()
        untouched = (folder / "tokens-00001.bin").stat()
        assert prepare()
        assert files_of(folder) == whole
        assert (folder / "tokens-00001.bin").stat() == untouched

    @pytest.mark.parametrize(
        "change",
        [
            {"vocab_size": None},
            {"vocab_size": "600"},
            {"dtype": "uint17"},
            {"total_tokens": 5},
            {"eval_fraction": []},
            {"shards": []},
            {"shards": [{"file": 1, "tokens": 9, "sha256": "", "slice": "x"}]},
            {"shards": [{"file": "../x.bin", "tokens": 9, "sha256": "", "slice": "x"}], "total_tokens": 9},
        ],
    )
    def test_manifest_with_a_wrong_value_is_named(self, prepared, change):
        manifest = json.loads((prepared[0] / "manifest.json").read_text()) | change
        for name in [name for name, value in change.items() if value is None]:
            del manifest[name]
        (prepared[0] / "manifest.json").write_text(json.dumps(manifest))
        message = error_of(PackedDataset, prepared[0], 4)
        assert message.startswith(f"--dataset: {prepared[0] / 'manifest.json'} cannot be read")

    def test_damaged_plan_or_record(self, prepared):
        folder, prepare = prepared
        whole = files_of(folder)
        for content in ("[]", "null", '{"shards": [1]}'):
            (folder / ".preparation" / "unit-00002.json").write_text(content)
            (folder / "manifest.json").unlink()
            assert prepare()
            assert files_of(folder) == whole
        plan = folder / ".preparation" / "plan.json"
        source = json.loads(plan.read_text())["source"]
        for content in ("", "[]", json.dumps({"source": source})):
            plan.write_text(content)
            assert error_of(prepare).startswith(f"--output: {plan} is damaged; delete {folder}")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 2}', '{"format_version": 1}'])
    def test_damaged_manifest_is_named(self, prepared, tokenizer, tmp_path, content):
        folder, prepare = prepared
        whole = files_of(folder)
        (folder / "manifest.json").write_text(content)
        assert error_of(prepare_dataset, str(folder), tokenizer, tmp_path).startswith(f"--dataset: {folder}")
        (folder / "manifest.json").unlink()
        assert "is not completely prepared" in error_of(prepare_dataset, str(folder), tokenizer, tmp_path)
        assert prepare()
        assert files_of(folder) == whole

    def test_units_are_those_that_the_preparation_was_begun_with(self, prepared, monkeypatch):
        """Whatever a later version of the program would make; a plan that names none has those of this one."""
        folder, prepare = prepared
        whole, plan = files_of(folder), folder / ".preparation" / "plan.json"
        lost = [folder / "manifest.json", folder / "tokens-00001.bin", folder / "tokens-00003.bin"]
        older = {name: value for name, value in json.loads(plan.read_text()).items() if name != "units"}
        for path in lost:
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(dataset_shards, "MIN_UNIT_BYTES", 1500)
            assert prepare()
        assert files_of(folder) == whole
        for path in lost:
            path.unlink()
        plan.write_text(json.dumps(older))
        assert prepare()
        assert files_of(folder) == whole
        for units in (5, [[]], [[[0, [0]]], [[1, [0, None]]]], [[[0, 1]]]):
            plan.write_text(json.dumps({**older, "units": units}))
            assert error_of(prepare).startswith(f"--output: {plan} is damaged; delete {folder}")

    def test_other_data_tokenizer_or_fraction(self, prepared, tokenizer_folder, tmp_path):
        folder, prepare = prepared
        assert "another data set, choice of it or --eval_fraction" in error_of(prepare, eval_fraction=0.1)
        other = TextEncoder(LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>"))
        source = resolve_source(str(tmp_path / "x.jsonl"))
        assert "another tokenizer" in error_of(prepare_folder, source, other, folder, 1)
        os.utime(tmp_path / "x.jsonl", ns=(0, 0))
        assert "have changed since" in error_of(prepare)

    def test_a_second_preparer_of_the_same_part_is_refused(self, prepared):
        folder, prepare = prepared
        holder = run_python(
            """
            import sys, time
            from runtime import files
            with files.exclusive_lock(files.Path(sys.argv[1])):
                print("held", flush=True)
                time.sleep(60)
            """,
            folder / ".preparation" / "part-1-of-1.lock",
        )
        assert holder.stdout.readline() == "held\n"
        message = error_of(prepare)
        assert message.startswith(f"--output: process {holder.pid} on ")
        assert "is preparing part 1 of 1" in message
        holder.kill()
        holder.communicate()
        assert prepare()

    def test_file_system_without_locks(self, prepared, monkeypatch, capsys):
        def unsupported(*arguments):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "lockf", unsupported)
        assert prepared[1]()
        assert "has no locks" in capsys.readouterr().out

    def test_full_disk_keeps_what_is_finished(self, tokenizer_folder, slow_source, tmp_path):
        """A limit on the size of files stands for the disk: only small shards can be written."""
        code = PREPARE.replace("import sys,", "import resource, sys,").replace(
            "print(dataset_preparation",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000,) * 2); print(dataset_preparation",
        )
        process = run_python(code, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        _, errors = process.communicate(timeout=120)
        assert "InputError: --cache_dir: cannot write to" in errors.splitlines()[-1]
        assert "File too large" in errors.splitlines()[-1]
        folder = run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        assert files_of(folder) == files_of(run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "b", 2))

    def test_disk_without_room(self, tokenizer_folder, slow_source, tmp_path):
        """A file system in memory, too small for what two processes write, is enlarged for the second call."""
        namespace = ["unshare", "--map-root-user", "--mount"]
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = f"mount -t tmpfs -o size=3m none {disk}"
        if subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this user may mount no file system")
        (tmp_path / "prepare.py").write_text(textwrap.dedent(PREPARE))
        prepare = f"{sys.executable} {tmp_path / 'prepare.py'} {slow_source} {tokenizer_folder} {disk} 2"
        finished = f"sha256sum {disk}/*/.preparation/unit-*.json {disk}/*/tokens-00000.bin"
        again = f"{finished} > {tmp_path}/before; mount -o remount,size=99m {disk}; {prepare}; {finished}"
        script = f"{mount}; {prepare}; df {disk}; {again}; cp -r $(dirname {disk}/*/manifest.json) {tmp_path}/copy"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run([*namespace, "sh", "-c", script], env=environment, text=True, capture_output=True)
        error = process.stderr.splitlines()[-1]
        assert f"--cache_dir: cannot write to {disk}" in error
        assert "No space left on device" in error
        assert "make room and run the same command again; finished shards are kept" in error
        kept = (tmp_path / "before").read_text().splitlines()
        assert set(kept) < set(process.stdout.splitlines()), process.stdout + process.stderr
        assert f"going on: {len(kept) - 1} of" in process.stdout
        whole = run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "b", 2)
        assert files_of(tmp_path / "copy") == files_of(whole)

    def test_killed_worker(self, tokenizer_folder, slow_source, tmp_path):
        builder = run_python(PREPARE, slow_source, tokenizer_folder, tmp_path / "cache", 2)
        wait_until(lambda: list((tmp_path / "cache").glob("*/.preparation/tokens-*")))
        worker = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        _, errors = builder.communicate(timeout=60)
        assert "one of 2 tokenizing processes was killed" in errors.splitlines()[-1]
        assert "scripts/prepare_dataset.py --num_workers" in errors.splitlines()[-1]

    def test_what_was_begun_for_an_older_state_is_removed(self, tokenizer, tmp_path):
        source = tmp_path / "x.jsonl"
        source.write_bytes(GOOD + b"oops")
        error_of(prepare_dataset, str(source), tokenizer, tmp_path / "cache")
        (begun,) = (tmp_path / "cache").iterdir()
        source.write_bytes(GOOD * 2)
        folder = prepare_dataset(str(source), tokenizer, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == [folder]
        assert folder != begun

    def test_prepared_folder_that_cannot_be_written(self, prepared, tokenizer, tmp_path, monkeypatch):
        """A read-only cache serves as long as nothing has to be made."""
        folder, _ = prepared
        monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail("written"))
        assert prepare_dataset(str(folder), tokenizer, "/nowhere") == folder


PREPARE = """
    import sys
    from corpus import prepare, tokenizer as loading, units
    from runtime import console, ranks
    units.MIN_UNIT_BYTES = 2**20
    source, tokenizer, cache_dir, num_workers = sys.argv[1:]
    tokenizer = loading.load_tokenizer(tokenizer)
    print("ready", flush=True)
    print(prepare.prepare_dataset(source, tokenizer, cache_dir, int(num_workers)), flush=True)
    if console.world_size() > 1:
        ranks.assemble()
"""


@pytest.fixture
def slow_source(tmp_path):
    """Takes a few seconds to tokenize."""
    rows = [{"text": inspect.getsource(pydoc)[i * 10 :]} for i in range(160)]
    return write_jsonl(tmp_path / "slow.jsonl", rows)


def run_to_the_end(code, *arguments):
    process = run_python(code, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return Path(output.splitlines()[-1])


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestCache:
    def test_second_call_builds_nothing(self, tokenizer, tmp_path, capsys):
        source = write_jsonl(tmp_path / "x.jsonl", ROWS)
        folder = prepare_dataset(str(source), tokenizer, tmp_path / "cache")
        before = (folder / "manifest.json").stat()
        capsys.readouterr()
        assert prepare_dataset(str(source), tokenizer, tmp_path / "cache", 2) == folder
        assert (folder / "manifest.json").stat() == before
        assert capsys.readouterr().out == ""
        (folder / "manifest.json").unlink()
        assert prepare_dataset(str(source), tokenizer, tmp_path / "cache") == folder
        assert len(PackedDataset(folder, 4)) > 0
        os.utime(source, ns=(0, 0))
        assert prepare_dataset(str(source), tokenizer, tmp_path / "cache") != folder

    def test_a_killed_builder_is_continued(self, tokenizer, tokenizer_folder, slow_source, tmp_path):
        """Killed at several moments, in one and in two processes; finished shards stay as they are."""
        cache, kept = tmp_path / "cache", {}
        for num_workers, finished in ((1, 1), (2, 3), (2, 6)):
            builder = run_python(PREPARE, slow_source, tokenizer_folder, cache, num_workers)
            wait_until(lambda count=finished: len(list(cache.glob("*/.preparation/unit-*.json"))) >= count)
            children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
            builder.send_signal(signal.SIGKILL)
            builder.communicate(timeout=30)
            wait_until(lambda ended=children: not any(map(is_running, ended)))
            assert not list(cache.glob("*/manifest.json"))
            records = sorted(cache.glob("*/.preparation/unit-*.json"))
            found = {record: record.stat().st_mtime_ns for record in records}
            assert found.items() >= kept.items()
            kept = found
        folder = run_to_the_end(PREPARE, slow_source, tokenizer_folder, cache, 2)
        assert {record: record.stat().st_mtime_ns for record in kept} == kept
        assert not [path for path in (folder / ".preparation").iterdir() if path.name.startswith("tokens")]
        assert files_of(folder) == files_of(run_to_the_end(PREPARE, slow_source, tokenizer_folder, tmp_path / "two", 1))

    def test_two_jobs_and_other_ranks_build_once(self, tokenizer_folder, slow_source, tmp_path):
        arguments = (slow_source, tokenizer_folder, tmp_path / "cache", 1)
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [{}, *({**place, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")]
        processes = [run_python(PREPARE, *arguments, **environment) for environment in environments]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert "".join(outputs).count("tokenized 160 documents") == 1
        assert "".join(outputs[:2]).count("another job is preparing") == 1
        assert len({output.splitlines()[-1] for output in outputs}) == 1
        assert (Path(outputs[0].splitlines()[-1]) / "manifest.json").is_file()


def test_the_command_that_follows_can_be_pasted(words, tokenizer_folder, tmp_path):
    program, output = ROOT / "scripts" / "prepare_dataset.py", tmp_path / "prep 1"
    command = [sys.executable, program, "-d", words[0], "--tokenizer", tokenizer_folder, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("train on it: "))
    assert shlex.split(line)[3:] == ["pretrain.py", "-d", str(output), "--tokenizer", str(tokenizer_folder)]
