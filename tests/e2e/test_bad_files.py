"""Unusable models, data and checkpoints: main() reports each in one line and writes nothing."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

import finetune
from model_utils import load_config

TEXT = {"text": "Some words of an ordinary document, enough of them to make tokens. " * 20}
ROW = json.dumps(TEXT).encode() + b"\n"


def config_file(folder: Path, **changes) -> Path:
    """Write the config.json of the model `test` with some fields changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**load_config("test").to_dict(), **changes}))
    return path


def test_vocabulary_larger_than_the_models(problems, tmp_path):
    (problem,) = problems("-c", config_file(tmp_path, vocab_size=1000))
    assert all(part in problem for part in ("--tokenizer", "1024", "1000"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "config.json"),
        ("{", "config.json"),
        ("[1]", "list"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}', "100"),
    ],
)
def test_config_file(problems, tmp_path, content, expected):
    (tmp_path / "config.json").write_text(content)
    (problem,) = problems("-c", tmp_path)
    assert problem.startswith("--config: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "empty"),
        ("blank.jsonl", b"\n\n", "it has no row"),
        ("text.jsonl", b"Once upon a time\n", "line 1"),
        ("cut.jsonl", ROW + ROW[:40], "line 2"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("column.jsonl", b'{"content": "words"}\n', "no column 'text'"),
        ("null.jsonl", b'{"text": null}\n' * 3, "3 with text missing or null"),
        ("numbers.jsonl", b'{"text": 3}\n' * 2, "2 with text not a string"),
        ("latin.jsonl", '{"text": "café"}\n'.encode("latin-1"), "UTF-8"),
        ("cut.jsonl.gz", gzip.compress(ROW * 99)[:-20], "cannot be read"),
        ("not.jsonl.gz", ROW, "is not compressed; take .gz off its name"),
        ("not.parquet", ROW, "cannot be read"),
        ("words.txt", b"Once upon a time\n", "known kind"),
        ("notes.txt", b"Once upon a time\n", """jq -Rsc 'split("\\n\\n")[] | {text: .}' FILE"""),
        ("indented.json", b'{\n "text": "words"\n}\n', "jq -c . FILE"),
        ("short.jsonl", b'{"text": "short"}\n', "lower --max_length or give more data"),
    ],
)
def test_data(problems, tmp_path, cache_dir, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = problems("-d", path)
    assert expected in problem
    assert problem.startswith("--max_length: " if name == "short.jsonl" else "--dataset: ")
    assert not list(cache_dir.glob("*.partial"))


def test_damaged_tokenizer(problems, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nothing like a model")
    (problem,) = problems("--tokenizer", tmp_path)
    assert problem.startswith(f"--tokenizer: cannot load {tmp_path} ")


# ----------------------------------------------------------------------------------------------------- the checkpoints


@pytest.fixture
def checkpoint(finished_run, few_data, tmp_path) -> tuple[Path, list]:
    """Return a copy of a checkpoint, and the flags that resume it."""
    folder = tmp_path / "saved" / "epoch0-step2"
    shutil.copytree(finished_run.save_dir / "epoch0-step2", folder)
    return folder, ["-d", few_data, "-x", "bf16", "-b", 8, "-s", 1, "-f", folder]


def test_hugging_face_folder_is_no_checkpoint(problems, checkpoint, finished_run):
    folder, flags = checkpoint
    for model in (folder / "model", finished_run.save_dir / "final"):
        (problem,) = problems(*flags, "-f", model)
        assert problem.startswith(f"--load: {model} ")
        assert "--init_from" in problem


def test_checkpoints_are_looked_for_before_data_is_prepared(problems, objections, finished_run, tmp_path):
    """`objections` checks that nothing is written, not even to the cache."""
    taken, cache = finished_run.save_dir, ["--cache_dir", tmp_path / "cache"]
    cases = {
        "--load: no/such/folder does not exist": ["-f", "no/such/folder"],
        f"--save_dir: {taken} holds the checkpoints of a run": ["-o", taken],
        f"--load: {taken / 'epoch0-step2'} is at step 2, and": ["-o", taken, "-f", taken / "epoch0-step2"],
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What?", "completion": "That."}) + "\n")
    tuning = ["--model_path", taken / "final", "-d", rows, "-p", "zero2", "-x", "bf16"]
    for expected, flags in cases.items():
        for found in (problems(*cache, *flags), objections(finetune, [*tuning, *cache, *flags])):
            assert found[0].startswith(expected)


@pytest.mark.parametrize("damage", ["manifest", "weights", "truncated"])
def test_incomplete_checkpoint(problems, checkpoint, damage):
    folder, flags = checkpoint
    weights = sorted((folder / "optimizer").iterdir())[0]
    if damage == "truncated":
        os.truncate(weights, 1000)
    else:
        (folder / "manifest.json" if damage == "manifest" else weights).unlink()
    (problem,) = problems(*flags)
    assert problem.startswith(f"--load: {folder} is an incomplete checkpoint")
    (problem,) = problems(*flags, "-f", "latest", "-o", folder.parent)
    assert problem.startswith("--load latest: no complete checkpoint")


def test_initial_weights_and_a_checkpoint(problems, checkpoint, monkeypatch, capsys):
    """`-f latest` may be combined with --init_from: the first run starts from it, a resumed one ignores it."""
    folder, flags = checkpoint
    flags += ["--init_from", folder / "model"]
    assert problems(*flags)[0].startswith("--init_from: starts a new run from a model's weights, --load resumes")
    for save_dir, line in ((folder.parent, "length: 3 "), (folder / "none", "a new run begins")):
        with pytest.raises(pytest.fail.Exception, match="no problem was found"):
            problems(*flags, "-f", "latest", "-o", save_dir)
        assert line in capsys.readouterr().out


def test_folder_that_is_no_checkpoint(problems, checkpoint, tmp_path):
    _, flags = checkpoint
    (problem,) = problems(*flags, "-f", tmp_path)
    assert problem.startswith(f"--load: {tmp_path} is not a checkpoint")


def test_checkpoint_of_another_run(problems, checkpoint, sample, tmp_path):
    _, flags = checkpoint
    cases = {
        "num_hidden_layers 4 (not 2)": ["-c", config_file(tmp_path, num_hidden_layers=2)],
        "--seed was 42 in the checkpoint and is 43 now": ["--seed", 43],
        "--max_length was 64 in the checkpoint and is 32 now": ["-l", 32],
        "the data was ": ["-d", sample / "data"],
        "--lr was 0.0003 in the checkpoint and is 0.1 now": ["--lr", 0.1],
        "at step 2 and the run ends at step 1": ["--max_steps", 1],
    }
    for expected, changed in cases.items():
        found = problems(*flags, *changed)
        assert all(problem.startswith("--load: ") for problem in found)
        assert any(expected in problem for problem in found)


def test_init_from(problems, finished_run, checkpoint, tmp_path):
    folder, flags = checkpoint
    model = finished_run.save_dir / "final"
    cases = {
        "is not a Hugging Face model folder": ["--init_from", folder],
        "num_key_value_heads 2 (not 4)": ["--init_from", model, "-c", config_file(tmp_path, num_key_value_heads=4)],
        "give only one": ["--init_from", model, *flags],
    }
    for expected, changed in cases.items():
        (problem,) = problems(*changed)
        assert problem.startswith("--init_from: ")
        assert expected in problem


def test_another_tokenizer_than_the_models(problems, finished_run, byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.save_pretrained(tmp_path)
    model = finished_run.save_dir / "final"
    (problem,) = problems("--init_from", model, "--tokenizer", tmp_path)
    assert problem.startswith("--tokenizer: its token ")
    assert f"that of --init_from {model} is " in problem
