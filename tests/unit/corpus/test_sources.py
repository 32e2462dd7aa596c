"""Every kind of source gives the same ids, counted by slice, its unusable rows by reason."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import LlamaTokenizerFast

from corpora import ROWS, TEXTS, documents_of, error_of, reference_stream, stream_of, write_jsonl
from corpus.prepare import prepare_dataset


def as_jsonl(folder):
    return write_jsonl(folder / "rows.jsonl", ROWS)


def as_json_with_byte_order_mark_and_blank_lines(folder):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (folder / "rows.json").write_text("\ufeff" + lines)
    return folder / "rows.json"


def as_gzip_of_two_members(folder):
    lines = as_jsonl(folder).read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").unlink()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:])))
    return folder / "rows.jsonl.gz"


def as_zstd(folder):
    with pa.CompressedOutputStream(str(folder / "rows.jsonl.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    return folder / "rows.jsonl.zst"


def as_parquet(folder):
    table = pa.table({"meta": [json.dumps(row.get("meta")) for row in ROWS], "text": TEXTS})
    pa.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


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


def as_saved_dataset(folder):
    datasets.Dataset.from_dict({"text": TEXTS, "n": [0] * 6}).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def as_saved_dataset_with_splits(folder):
    train, test = datasets.Dataset.from_dict({"text": TEXTS}), datasets.Dataset.from_dict({"text": ["no"]})
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_dataset_with_one_other_split(folder):
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_selection(folder):
    shuffled = datasets.Dataset.from_dict({"text": ["no", *reversed(TEXTS)]}).select(range(6, 0, -1))
    shuffled.save_to_disk(folder / "saved")
    return folder / "saved"


class TestSources:
    @pytest.mark.parametrize(
        "write",
        [
            as_jsonl,
            as_json_with_byte_order_mark_and_blank_lines,
            as_gzip_of_two_members,
            as_zstd,
            as_parquet,
            as_nested_folder_of_mixed_kinds,
            as_saved_dataset,
            as_saved_dataset_with_splits,
            as_saved_dataset_with_one_other_split,
            as_saved_selection,
        ],
    )
    def test_every_kind_gives_the_same_ids(self, tokenizer, tmp_path, write, capfd):
        source = tmp_path / "source"
        source.mkdir()
        folder = prepare_dataset(str(write(source)), tokenizer, tmp_path / "cache")
        found, expected = stream_of(folder).tolist(), reference_stream(tokenizer, TEXTS)
        assert documents_of(found, tokenizer.bos_token_id) == documents_of(expected, tokenizer.bos_token_id)
        output, errors = capfd.readouterr()
        assert "tokenized 5 documents" in output
        assert "1 with text empty" in output
        assert "tokenizing" not in errors  # no bar where stderr is no terminal

    def test_counts_by_slice(self, tokenizer, tmp_path):
        (tmp_path / "wiki").mkdir()
        write_jsonl(tmp_path / "rows.jsonl", ROWS)
        write_jsonl(tmp_path / "wiki" / "0.jsonl", [{"text": "ab"}, {"text": "cd"}])
        manifest = json.loads(
            (prepare_dataset(str(tmp_path), tokenizer, tmp_path / ".cache") / "manifest.json").read_text()
        )
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
        for reason in (
            "2 with text missing or null",
            "2 with text not a string",
            "1 with text empty",
            "1 with text with",
        ):
            assert reason in output

    def test_a_prepared_folder_is_a_source(self, tokenizer, tokenizer_folder, words):
        folder = prepare_dataset(str(words[0]), tokenizer, words[1])
        assert prepare_dataset(str(folder), tokenizer, Path("/nonexistent")) == folder
        other = LlamaTokenizerFast.from_pretrained(tokenizer_folder, bos_token="</s>")
        assert "--tokenizer" in error_of(prepare_dataset, str(folder), other, words[1])
