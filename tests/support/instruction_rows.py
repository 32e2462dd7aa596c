"""Rows for fine-tuning: encoded, written to a file, and prepared."""

import json

from corpus.examples import prepare_examples
from corpus.instructions import SHAPES, ExampleEncoder
from corpus.sources import resolve_source

PROMPTED, INSTRUCTED, CHAT = SHAPES
ROWS = [
    {"prompt": "Name a colour.\n\nAnswer:", "completion": "green"},
    {"prompt": "Count to three: ", "completion": "1 2 3"},
    {"prompt": "def add(a, b):\n", "completion": "    return a + b"},
    {"prompt": "un", "completion": " breakable </s>"},
    {"prompt": "", "completion": "nothing was asked"},
    {"prompt": "日本語 é", "completion": "\n\n😀"},
]


def encoded(tokenizer, *rows, shape=PROMPTED, max_length=200, train_on_prompt=False):
    return list(ExampleEncoder(tokenizer, shape, max_length, train_on_prompt).encode(rows))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve_source(str(path))


def prepare_rows(folder, rows, max_length=64, train_on_prompt=False, *, tokenizer):
    """Return the prepared folder of the rows; reuse the file of as many rows if it exists."""
    path = folder / f"rows-{len(rows)}.jsonl"
    source = resolve_source(str(path)) if path.exists() else write_rows(path, rows)
    return prepare_examples(source, ExampleEncoder(tokenizer, PROMPTED, max_length, train_on_prompt), folder / "cache")
