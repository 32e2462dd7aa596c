"""A small sample corpus and tokenizer, made once by the real command."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from launching import ROOT, run_script
from scripts.make_sample_data import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    SLICES,
    Novelty,
    corpus_lines,
    split_long,
    train_tokenizer,
    write_corpus,
)

PROGRAM = ROOT / "scripts" / "make_sample_data.py"
MEGABYTES, VOCAB_SIZE = 0.5, 1000
CODE = "def f(x):\n\tif x:\n        return  {'ké': 2026}  # 🦙 ﬁ Å\n\n\n"


def run(output_dir: Path, *options: str) -> subprocess.CompletedProcess:
    return run_script(PROGRAM, "--output_dir", output_dir, *options)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample data")  # a path with a space
    made = run(folder, "--megabytes", str(MEGABYTES), "--vocab_size", str(VOCAB_SIZE))
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.splitlines()) == 2
    assert "trainer" not in made.stderr  # no log of SentencePiece
    return folder


@pytest.fixture(scope="module")
def rows(sample) -> dict[str, list[dict]]:
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (sample / "data").iterdir()
    }


def test_the_seven_slices_of_redpajama(rows):
    assert set(rows) == {
        f"{name}_sample.jsonl" for name in ("arxiv", "book", "c4", "cc_2023-06", "github", "stackexchange", "wikipedia")
    }
    subsets = {name: {row["red_pajama_subset"] for row in slice_rows} for name, slice_rows in rows.items()}
    assert subsets.pop("cc_2023-06_sample.jsonl") == {"common_crawl"}
    assert all(subset == {name.removesuffix("_sample.jsonl")} for name, subset in subsets.items())


def test_rows_are_well_formed(rows):
    for row in (row for slice_rows in rows.values() for row in slice_rows):
        assert set(row) == {"text", "meta", "red_pajama_subset"}
        assert len(row["text"]) >= MIN_CHARACTERS
        assert row["text"] == row["text"].strip()


def test_meta_differs_between_slices_and_holds_no_absolute_path(rows):
    metas = {name: slice_rows[0]["meta"] for name, slice_rows in rows.items()}
    assert {type(meta) for meta in metas.values()} == {str, dict}
    assert len({tuple(meta) for meta in metas.values() if isinstance(meta, dict)}) > 2
    for row in (row for slice_rows in rows.values() for row in slice_rows):
        meta = row["meta"] if isinstance(row["meta"], dict) else json.loads(row["meta"])
        assert meta
        assert not any(value.startswith("/") for value in meta.values())


def test_no_text_occurs_twice(rows):
    texts = [row["text"] for slice_rows in rows.values() for row in slice_rows]
    assert len(set(texts)) == len(texts)


def test_sizes_follow_the_fractions(rows):
    assert sum(piece.fraction for piece in SLICES) == pytest.approx(1)
    for piece in SLICES:
        size = sum(len(row["text"].encode()) for row in rows[piece.file])
        wanted = piece.fraction * MEGABYTES * 1e6
        assert wanted <= size <= wanted + 3 * MAX_CHARACTERS


def test_the_same_installation_gives_the_same_files(sample, tmp_path):
    write_corpus(tmp_path, MEGABYTES)
    for path in (sample / "data").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    model = train_tokenizer(corpus_lines(tmp_path), VOCAB_SIZE)
    assert model == (sample / "tokenizer" / "tokenizer.model").read_bytes()


def test_a_second_run_changes_nothing(sample):
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    again = run(sample, "--megabytes", str(MEGABYTES), "--vocab_size", str(VOCAB_SIZE))
    assert again.returncode == 0
    assert "already exist" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in sample.rglob("*")} == before


def test_other_settings_replace_the_files(tmp_path):
    for vocab_size in (500, 600):
        assert run(tmp_path, "--megabytes", "0.1", "--vocab_size", str(vocab_size)).returncode == 0
        assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").vocab_size == vocab_size
    assert {path.name for path in tmp_path.iterdir()} == {"data", "tokenizer", "sample_data.json"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--megabytes", "0"], "--megabytes 0.0"),
        (["--megabytes", "nan"], "--megabytes nan"),
        (["--megabytes", "0.05", "--vocab_size", "1000000"], "--vocab_size 1000000"),
        (["--megabytes", "0.05", "--vocab_size", "10"], "--vocab_size 10 "),
    ],
)
def test_unusable_settings_are_named_and_leave_nothing(tmp_path, options, named):
    failed = run(tmp_path, *options)
    assert failed.returncode == 2
    assert named in failed.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("precious")
    failed = run(tmp_path)
    assert failed.returncode == 2
    assert "was not made by this program" in failed.stderr
    assert (tmp_path / "data" / "mine.jsonl").read_text() == "precious"
    assert "File exists" in run(tmp_path / "data" / "mine.jsonl").stderr


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow"])
def tokenizer(request, sample):
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer", use_fast=request.param, local_files_only=True)
    assert tokenizer.is_fast == request.param
    return tokenizer


def test_special_tokens_are_llamas(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id is None
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer("text").input_ids[0] == 1


def test_whitespace_and_rare_characters_survive(tokenizer):
    ids = tokenizer(CODE).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == CODE


def test_unknown_characters_become_bytes(tokenizer):
    assert tokenizer.tokenize("🦙")[-4:] == [f"<0x{byte:02X}>" for byte in "🦙".encode()]


def test_digits_are_split(tokenizer):
    assert tokenizer.tokenize("20261")[-5:] == list("20261")
    assert not [piece for piece in tokenizer.get_vocab() if len(piece.strip("▁")) > 1 and piece[-1].isdigit()]


def test_indentation_has_its_own_pieces(tokenizer):
    assert "▁" * 8 in tokenizer.get_vocab()


def test_fast_slow_and_bare_model_agree(sample, rows, tmp_path):
    folder = sample / "tokenizer"
    fast, slow = (AutoTokenizer.from_pretrained(folder, use_fast=use_fast) for use_fast in (True, False))
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    bare = LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    for text in [CODE, *(slice_rows[0]["text"] for slice_rows in rows.values())]:
        assert fast(text).input_ids == slow(text).input_ids == bare(text).input_ids


def test_split_long_cuts_between_definitions_and_loses_nothing():
    source = "".join(f"def function_{i}():\n    first\n\n    second\n\n\n" for i in range(50))
    parts = list(split_long(source, limit=400))
    assert "".join(parts) == source
    assert all(part.startswith("def ") and len(part) <= 400 for part in parts)
    assert list(split_long("a" * 1000, limit=400)) == ["a" * 1000]


def test_novelty_refuses_documents_that_mostly_repeat():
    novelty = Novelty()
    licence = "Permission is hereby granted, free of charge, to any person\nobtaining a copy of this software\n"
    assert novelty.is_new("Copyright Ada\n" + licence)
    assert not novelty.is_new("Copyright Grace\n" + licence)
    assert novelty.is_new(licence + "The rest is new, and there is much more of it than of what was seen above. " * 3)
