"""Small corpora, their tokens by a slow, obvious reference, and Python programs that use the modules."""

import itertools
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sentencepiece

from launching import ROOT
from runtime.console import InputError

TEXTS = ["The first document.", "Ünïcode 日本語 😀\r\n\ttab", "a\x00b", "not </s> the end", "", "  42 spaces  "]
ROWS = [
    {"text": TEXTS[0], "meta": "{'timestamp': 1}"},
    {"text": TEXTS[1], "meta": {"red_pajama_subset": "arxiv", "year": 2023}},
    {"text": TEXTS[2], "meta": {"url": ["x", {"y": None}]}, "red_pajama_subset": "github"},
    {"text": TEXTS[3]},
    {"text": TEXTS[4], "meta": 3.5},
    {"text": TEXTS[5], "meta": []},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream_of(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return np.concatenate([np.fromfile(folder / shard["file"], manifest["dtype"]) for shard in manifest["shards"]])


def documents_of(stream, bos):
    """The documents of a stream, sorted: where rows name several slices, their order is that of the slices."""
    starts = [place for place, token in enumerate(stream) if token == bos]
    return sorted(list(stream[start:stop]) for start, stop in itertools.pairwise([*starts, len(stream)]))


def reference_stream(tokenizer, texts):
    """One token at a time through SentencePiece, never through the code under test."""
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    stream = []
    for text in texts:
        if text:
            stream += [model.bos_id(), *model.encode(text), model.eos_id()]
    return stream


def error_of(function, *arguments, **options):
    """The single line of the InputError that a call ends in."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
