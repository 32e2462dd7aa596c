"""Small corpora, prepared folders, a slow and obvious reference for their tokens, and child processes."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from corpus.rows import read_documents
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
    """Return the documents of a stream, sorted, since slices reorder them."""
    starts = [place for place, token in enumerate(stream) if token == bos]
    return sorted(list(stream[start:stop]) for start, stop in itertools.pairwise([*starts, len(stream)]))


def documents_in(source):
    """Return all documents of a source, file by file."""
    return [document for file in source.files for document in read_documents(file.fetch(), file.slice)]


def reference_stream(tokenizer, texts):
    """Return the tokens of the texts by plain SentencePiece."""
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    stream = []
    for text in texts:
        if text:
            stream += [model.bos_id(), *model.encode(text), model.eos_id()]
    return stream


def error_of(function, *arguments, **options):
    """Return the single line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files_of(folder):
    """Return the contents of a prepared folder's shards and manifest, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


PREPARE = """
    import sys
    from corpus import prepare, tokenizer as loading, units
    from runtime import console, ranks
    units.MIN_UNIT_BYTES = 2**20
    source, tokenizer, cache_dir, num_workers = sys.argv[1:]
    tokenizer = loading.load_tokenizer(tokenizer)
    print("ready", flush=True)
    print(prepare.prepare_dataset(source, tokenizer, cache_dir, int(num_workers)), flush=True)
    if console.world_size() > 1:
        ranks.assemble()
"""


def run_to_the_end(code, *arguments):
    process = run_python(code, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return Path(output.splitlines()[-1])


def wait_until(condition, what="", seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
