"""Damaged manifests, and held-out documents."""

import functools
import json

import numpy as np
import pytest

from corpora import error_of, files_of, reference_stream, write_jsonl
from corpus.manifest import is_held_out
from corpus.prepare import prepare_dataset
from data_utils import PackedDataset


class TestManifest:
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
