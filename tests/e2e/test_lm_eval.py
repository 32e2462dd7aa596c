"""Evaluation of a run's `final` folder by lm-evaluation-harness, on a task of our own."""

import json
import os
import subprocess
import sys

import pytest

from scored_tasks import QUESTIONS, best_answers, log_likelihoods, write_task


def test_scores_are_those_of_the_model(finished_run, tmp_path):
    final = finished_run.save_dir / "final"
    expected, best = log_likelihoods(final), best_answers(final)
    write_task(tmp_path, [best[0], best[1], (best[2] + 1) % 3, best[3]])  # the model gets three of four right
    model = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={final},dtype=float32",
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    task = ["--tasks", "code_words", "--include_path", str(tmp_path), "--output_path", str(tmp_path), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lm_eval", *model, *task]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["code_words"]["acc,none"] == 0.75
    (samples,) = tmp_path.rglob("samples_code_words_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    for sample in logged:
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        assert scores == pytest.approx(expected[sample["doc_id"]], rel=1e-4)
    assert len(logged) == len(QUESTIONS)
