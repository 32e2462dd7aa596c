"""Files written by an earlier commit: resuming from them gives the numbers that the commit logged.

Commit 462033e wrote `tests/support/formats`: a prepared folder, checkpoints of pretrain.py and of finetune.py with
adapters, and rows.json with the metrics of each run to its end.
"""

import json
import shutil

import pytest

from launching import ROOT, start_finetune, start_pretrain

FORMATS = ROOT / "tests" / "support" / "formats"
ROWS = json.loads((FORMATS / "rows.json").read_text())
RECIPE = ["-p", "zero2", "-x", "bf16", "--lr", "1e-2"]
PRETRAIN = [*RECIPE, "-b", "2", "-l", "32", "-s", "2", "-i", "3", "--max_steps", "6", "--eval_interval", "3"]
FINETUNE = [*RECIPE, "-b", "4", "-e", "2"]


def check(run, expected: list[dict]) -> None:
    assert run.wait() == 0, run.output()
    rows = run.metrics[-len(expected) :]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, before in zip(rows, expected, strict=True):
        assert {name: row[name] for name in before} == pytest.approx(before, rel=1e-6)


def test_a_checkpoint_and_a_prepared_folder_resume(tmp_path):
    shutil.copytree(FORMATS / "pretrained", tmp_path / "checkpoint")
    data = ["-c", FORMATS / "config.json", "-d", FORMATS / "prepared", "--tokenizer", FORMATS / "tokenizer"]
    with start_pretrain(*data, *PRETRAIN, "-f", "latest", folder=tmp_path) as run:
        check(run, ROWS["pretrain"])


def test_adapters_resume(tmp_path):
    shutil.copytree(FORMATS / "finetuned", tmp_path / "checkpoint")
    flags = ["--model_path", FORMATS / "base", "-d", FORMATS / "instructions.jsonl", "--cache_dir", tmp_path / "cache"]
    lora = ["--lora_rank", "2", "-i", "3", "--max_steps", "6", "-f", "latest"]
    with start_finetune(*flags, *FINETUNE, *lora, folder=tmp_path) as run:
        check(run, ROWS["finetune"])


def test_packs_of_examples_are_the_same(tmp_path):
    flags = ["--model_path", FORMATS / "base", "-d", FORMATS / "instructions.jsonl", "--cache_dir", tmp_path / "cache"]
    with start_finetune(*flags, *FINETUNE, "--pack", "-i", "2", "--max_steps", "3", folder=tmp_path) as run:
        check(run, ROWS["pack"])
