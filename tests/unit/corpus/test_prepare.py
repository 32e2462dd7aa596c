"""Preparing files of every kind: those that are read, those that are refused, and the cache."""

import functools
import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corpora import ROWS, error_of, reference_stream, run_python, stream_of, write_jsonl
from corpus import rows
from corpus.encoder import TextEncoder
from corpus.prepare import PREPARATION, prepare_dataset, prepare_folder
from corpus.sources import resolve_source
from data_utils import PackedDataset
from launching import ROOT
from model_utils import load_config
from pretrain import Data, open_data, parse_args
from training.flags import job_of, take

GOOD = b'{"text": "fine"}\n'


def parquet(*tables):
    """The content of a file with one row group per table."""
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
            ("x.jsonl.gz", gzip.compress(b"", mtime=0), "is empty: it has no row"),
            ("x.jsonl.zst", pa.compress(b"", "zstd", asbytes=True), "is empty: it has no row"),
            ("x.jsonl", b"\n \n", "is empty: it has no row"),
            ("x.jsonl.gz", gzip.compress(b"\n \n", mtime=0), "is empty: it has no row"),
            ("x.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), "is empty: it has no row"),
            ("x.parquet", parquet(), "is empty: it has no row"),
            ("x.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-3], "row 9 (Truncated compressed stream)"),
            ("x.jsonl.zst", pa.compress(GOOD * 9, "zstd", asbytes=True)[:-3], "row 0 (Truncated compressed stream"),
            ("x.jsonl.gz", GOOD, "is not compressed; take .gz off its name"),
            (
                "x.jsonl",
                GOOD + b'{"text": "cut o',
                "line 2: not valid JSON (Unterminated string starting at); the file seems",
            ),
            ("x.jsonl", GOOD + b"{'text': 1}\n", "line 2: not valid JSON"),
            ("x.jsonl", GOOD.strip() + b"\r" + GOOD, r"(Extra data); its lines end with CR alone: tr '\r' '\n'"),
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
        assert "./name does not exist; give a file, a folder or a hub name" in error_of(prepare, "./name")
        (tmp_path / "notes.txt").write_text("hello")
        assert "holds no file of a known kind: .jsonl" in error_of(prepare, str(tmp_path))
        assert "is not of a known kind: .jsonl" in error_of(prepare, str(tmp_path / "notes.txt"))
        (tmp_path / "rows.ndjson.gz").write_bytes(gzip.compress(GOOD))
        assert error_of(prepare, str(tmp_path)).endswith("; rename rows.ndjson.gz to .jsonl instead of .ndjson")
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
        """Above all not the folder of the data, which would from then on count as prepared."""
        write_jsonl(tmp_path / "x.jsonl", ROWS)
        source = resolve_source(str(tmp_path))
        message = error_of(prepare_folder, source, TextEncoder(tokenizer), tmp_path, 1)
        assert message == f"--output: {tmp_path} has other files; give a new or an empty folder"
        assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

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
        for name in ("x.jsonl", "y.jsonl"):
            (tmp_path / name).hardlink_to(tmp_path / "z.jsonl")
        assert [file.path for file in resolve_source(str(tmp_path)).files] == ["b.jsonl", "x.jsonl"]
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
        open_data(take(Data, args), tokenizer, job_of(args, load_config("test")))
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
    @pytest.mark.slow
    def test_very_long_and_very_many_documents(self, tokenizer_folder, tmp_path):
        """50 MB of words, 50 MB of one letter and a million documents are prepared in little memory."""
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
        monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
        (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "x" * 1000)
        assert problem in error_of(prepare_dataset, str(tmp_path), tokenizer, tmp_path / ".cache")


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

    def test_prepared_folder_that_cannot_be_written(self, words, tokenizer, monkeypatch):
        """A read-only cache works as long as nothing has to be prepared."""
        folder = prepare_dataset(str(words[0]), tokenizer, words[1])
        monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail("written"))
        assert prepare_dataset(str(folder), tokenizer, "/nowhere") == folder


def test_the_command_that_follows_can_be_pasted(words, tokenizer_folder, tmp_path):
    program, output = ROOT / "scripts" / "prepare_dataset.py", tmp_path / "prep 1"
    command = [sys.executable, program, "-d", words[0], "--tokenizer", tokenizer_folder, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("train on it: "))
    assert shlex.split(line)[3:] == ["pretrain.py", "-d", str(output), "--tokenizer", str(tokenizer_folder)]


def test_unknown_text_is_counted(tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in ("a b", "a c b", "d e")])
    write_jsonl(tmp_path / "none.jsonl", [{"text": "a b"}])
    for name, expected in (("some", "; 3 tokens stand for text that the tokenizer does not know"), ("none", "")):
        prepare_dataset(str(tmp_path / f"{name}.jsonl"), tokenizer, tmp_path / "cache")
        assert capsys.readouterr().out.splitlines()[0].endswith(f"skipped rows: none{expected}")
