"""Sources on this machine and their names: the files found, their documents by slice, and rows that are skipped."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import LlamaTokenizerFast

from corpora import ROWS, TEXTS, documents_in, documents_of, error_of, reference_stream, stream_of, write_jsonl
from corpus.prepare import prepare_dataset
from corpus.rows import read_documents
from corpus.sources import resolve_source
from hub_server import Branches, HubServer, connect

ROW = b'{"text": "a"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        connect(monkeypatch, server, tmp_path / "hf")
        server.repositories["some/one"] = Branches({"main": {"a.jsonl": ROW}, "v1": {"b.jsonl": ROW}})
        server.repositories["some/pointer"] = Branches({"main": {"a.parquet": POINTER}})
        yield server


def as_jsonl(folder):
    return write_jsonl(folder / "rows.jsonl", ROWS)


def as_json_with_byte_order_mark_and_blank_lines(folder):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (folder / "rows.json").write_text("\ufeff" + lines)
    return folder / "rows.json"


def as_nested_folder_of_mixed_kinds(folder):
    (folder / "b" / "c").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    pa.parquet.write_table(pa.table({"text": TEXTS[2:4]}), folder / "b" / "1.parquet")
    write_jsonl(folder / "b" / "c" / "2.json", ROWS[4:])
    (folder / "README.md").write_text("not data")
    (folder / "manifest.json").write_text("{")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden.jsonl").write_text("not data")
    return folder


def as_saved_dataset_with_one_other_split(folder):
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(folder / "saved")
    return folder / "saved"


class TestSources:
    @pytest.mark.parametrize(
        "write",
        [
            as_jsonl,
            as_json_with_byte_order_mark_and_blank_lines,
            as_nested_folder_of_mixed_kinds,
            as_saved_dataset_with_one_other_split,
        ],
    )
    def test_the_ids_are_those_of_the_texts(self, tokenizer, tmp_path, write, capfd):
        """Other containers are compared with JSONL in test_containers.py."""
        source = tmp_path / "source"
        source.mkdir()
        folder = prepare_dataset(str(write(source)), tokenizer, tmp_path / "cache")
        found, expected = stream_of(folder).tolist(), reference_stream(tokenizer, TEXTS)
        assert documents_of(found, tokenizer.bos_token_id) == documents_of(expected, tokenizer.bos_token_id)
        output, errors = capfd.readouterr()
        assert "tokenized 5 documents" in output
        assert "1 with text empty" in output
        assert "tokenizing" not in errors  # no progress bar if stderr is no terminal

    def test_counts_by_slice(self, tokenizer, tmp_path):
        (tmp_path / "wiki").mkdir()
        write_jsonl(tmp_path / "rows.jsonl", ROWS)
        write_jsonl(tmp_path / "wiki" / "0.jsonl", [{"text": "ab"}, {"text": "cd"}])
        folder = prepare_dataset(str(tmp_path), tokenizer, tmp_path / ".cache")
        manifest = json.loads((folder / "manifest.json").read_text())
        documents = {name: counts["documents"] for name, counts in manifest["slices"].items()}
        assert documents == {"arxiv": 1, "github": 1, "rows": 3, "wiki": 2}
        assert manifest["documents"] == 7
        assert manifest["total_tokens"] == sum(counts["tokens"] for counts in manifest["slices"].values())
        assert manifest["skipped"] == {"text empty": 1}

    def test_unusable_rows_are_counted(self, tokenizer, tmp_path, capsys):
        texts = ["good", None, 7, "", "half \ud83d", ["x"], "fine"]
        write_jsonl(tmp_path / "rows.jsonl", [*({"text": text} for text in texts), {"no": "text"}])
        folder = prepare_dataset(str(tmp_path), tokenizer, tmp_path / "cache")
        assert stream_of(folder).tolist() == reference_stream(tokenizer, ["good", "fine"])
        output = capsys.readouterr().out
        assert output.count("\n") == 2
        assert output.endswith(f"kept for the next time in {folder}\n")
        for reason in ("2 with text missing or null", "2 with text not a string", "1 with text empty"):
            assert reason in output
        assert "1 with text with unpaired surrogates" in output

    def test_a_prepared_folder_is_a_source(self, tokenizer, tokenizer_folder, words):
        folder = prepare_dataset(str(words[0]), tokenizer, words[1])
        assert prepare_dataset(str(folder), tokenizer, Path("/nonexistent")) == folder
        other = LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>")
        assert "--tokenizer" in error_of(prepare_dataset, str(folder), other, words[1])

    def test_pointers_of_git_lfs(self, hub, tmp_path):
        path = tmp_path / "a.parquet"
        path.write_bytes(POINTER)
        assert error_of(resolve_source, str(path)) == (
            f"--dataset: {path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {tmp_path}"
        )
        (file,) = resolve_source("some/pointer").files
        assert "a.parquet is a Git LFS pointer" in error_of(lambda: list(read_documents(file.fetch(), file.slice)))


class TestNames:
    def test_revision_in_the_name(self, hub):
        (file,) = resolve_source("some/one/").files
        assert file.path == "a.jsonl"
        assert resolve_source("some/one@v1") == resolve_source("some/one", revision="v1")
        assert error_of(resolve_source, "some/one@v1", revision="main") == (
            "--dataset_revision: main is not the revision in --dataset some/one@v1; give one of them"
        )

    @pytest.mark.parametrize(
        ("url", "remedy"),
        [
            ("https://huggingface.co/datasets/some/one", "give the hub name some/one"),
            ("https://hf.co/datasets/some/one/tree/v1", "give the hub name some/one@v1"),
            ("https://mirror.example.com/datasets/some/one", "give the hub name some/one"),
            ("http://example.com/a.jsonl", "give a file, a folder, or a hub name OWNER/NAME"),
        ],
    )
    def test_urls(self, url, remedy):
        assert error_of(resolve_source, url) == f"--dataset: {url} is a URL; {remedy}"


class TestCopies:
    """Files that programs leave beside the data are not read in addition to them."""

    @pytest.mark.parametrize(
        "names", [("c4.jsonl", "c4.jsonl.gz"), ("c4.jsonl", "c4.jsonl.zst"), ("c4.json.gz", "c4.json.zst")]
    )
    def test_packed_and_unpacked(self, tmp_path, names):
        for name in (*names, "other.jsonl", "c4.jsonl.gz.jsonl"):
            (tmp_path / name).write_bytes(ROW)
        assert error_of(resolve_source, str(tmp_path)) == (
            f"--dataset: {tmp_path} has both {names[0]} and {names[1]}, which seem to be one file packed and unpacked; "
            "remove one of them, rename it if they differ, or give one of them"
        )
        assert [file.path for file in resolve_source(str(tmp_path), slices=["other"]).files] == ["other.jsonl"]
        (tmp_path / names[0]).unlink()
        assert len(resolve_source(str(tmp_path)).files) == 3

    def test_one_name_in_two_folders(self, tmp_path):
        for name in ("a/0.jsonl", "b/0.jsonl.gz"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(ROW)
        assert len(resolve_source(str(tmp_path)).files) == 2

    @pytest.mark.parametrize("split", ["english", "test", "train"])
    def test_results_of_map_in_the_cache_of_datasets(self, tmp_path, split):
        data = datasets.Dataset.from_generator(lambda: iter([{"text": "a"}]), cache_dir=str(tmp_path), split=split)
        data.map(lambda row: {"text": "b"})
        data.map(lambda row: {"text": "c"}, num_proc=2)
        (path,) = (Path(file["filename"]) for file in data.cache_files)
        assert len(list(path.parent.glob("cache-*.arrow"))) == 2
        for root in (tmp_path, path.parent):
            source = resolve_source(str(root))
            assert [document.text for document in documents_in(source)] == ["a"]
            assert "2 made by .map() (" in source.remark or split == "train"

    def test_a_file_of_such_a_name_elsewhere_is_data(self, tmp_path):
        table = pa.table({"text": ["a"]})
        with pa.ipc.new_stream(str(tmp_path / "cache-0123456789abcdef.arrow"), table.schema) as stream:
            stream.write_table(table)
        assert [document.text for document in documents_in(resolve_source(str(tmp_path)))] == ["a"]
