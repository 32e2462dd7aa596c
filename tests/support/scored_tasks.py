"""A task of our own for lm-evaluation-harness, and its scores by transformers alone."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    ("def main(argument):\n    return", ["argument", "None", "zebra"]),
    ("import", ["os", "the", "of"]),
    ("for number in", ["range(10):", "def", "numbers:"]),
    ("A list", ["is a mutable sequence.", "of", "import"]),
]
TASK = {
    "task": "code_words",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
}


@torch.no_grad()
def log_likelihoods(folder: Path, tokenizer_folder: Path | None = None) -> list[list[float]]:
    """Return for each question and answer the model's summed log-probability of the answer's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
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


def best_answers(folder: Path, tokenizer_folder: Path | None = None) -> list[int]:
    """Return the number of the answer that the model finds the most likely, for each question."""
    scores = log_likelihoods(folder, tokenizer_folder)
    return [max(range(len(answers)), key=answers.__getitem__) for answers in scores]


def scores_of(answers: list[int], folder: Path, tokenizer_folder: Path | None = None) -> dict[str, float]:
    """Return the fraction of right answers, and the mean squared error of the answers' probabilities (Brier's)."""
    probabilities = torch.tensor(log_likelihoods(folder, tokenizer_folder)).softmax(-1)
    right = torch.nn.functional.one_hot(torch.tensor(answers), probabilities.shape[1])
    accuracy = (probabilities.argmax(-1) == torch.tensor(answers)).double().mean()
    return {"acc": accuracy.item(), "brier_score": (probabilities - right).square().sum(-1).mean().item()}


def write_task(folder: Path, answers: list[int], name: str = "code_words", **changes) -> Path:
    """Write a task file, and beside it its questions with the numbers of the right answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": question, "choices": choices, "answer": answer}
        for (question, choices), answer in zip(QUESTIONS, answers, strict=True)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    content = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}} | changes
    (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder / f"{name}.yaml"
