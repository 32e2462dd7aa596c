"""Evaluation of a run's `final` folder by lm-evaluation-harness, on a task of our own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    ("def main(argument):\n    return", ["argument", "None", "zebra"]),
    ("import", ["os", "the"]),
    ("for number in", ["range(10):", "def", "numbers:"]),
    ("A list", ["is a mutable sequence.", "of"]),
]
TASK = {
    "task": "code_words",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@torch.no_grad()
def log_likelihoods(folder) -> list[list[float]]:
    """Return for each question and answer the model's summed log-probability of the answer's tokens."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for question, choices in QUESTIONS:
        found.append([])
        for choice in choices:
            whole = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
            assert whole[0, 0] == tokenizer.bos_token_id
            learned = whole.shape[1] - len(tokenizer(question)["input_ids"])
            scores = model(whole).logits[0, -learned - 1 : -1].log_softmax(-1)
            found[-1].append(scores.gather(1, whole[0, -learned:, None]).sum().item())
    return found


def test_scores_are_those_of_the_model(finished_run, tmp_path):
    final = finished_run.save_dir / "final"
    expected = log_likelihoods(final)
    best = [max(range(len(scores)), key=scores.__getitem__) for scores in expected]
    answers = [best[0], best[1], (best[2] + 1) % 3, best[3]]  # the model gets three of four right
    rows = [
        {"question": question, "choices": choices, "answer": answer}
        for (question, choices), answer in zip(QUESTIONS, answers, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "code_words.yaml").write_text(json.dumps(TASK | data))  # JSON is YAML
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
