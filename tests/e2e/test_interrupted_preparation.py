"""Interrupted preparations: wherever and however often they stop, they end with the same files."""

import functools
import gzip
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from corpora import files_of
from corpus import prepare, units
from corpus.encoder import TextEncoder
from corpus.manifest import is_held_out
from corpus.prepare import PREPARATION, prepare_folder
from corpus.sources import resolve_source

PLACES_TO_END = [
    (units.ShardWriter, "append"),
    (units, "sync"),
    (units, "write_json"),
    (prepare, "write_json"),
    (prepare, "_merge"),
]


def write_random_files(random, folder):
    """Write files of several formats, slices and sizes; return their (text, slice) pairs in file order."""
    documents = {}
    for number in range(random.randint(1, 6)):
        name = f"{random.choice('ab')}-{number:05d}"
        rows = [
            {"text": f"{name} {row} " * random.randint(0, 9), "red_pajama_subset": random.choice((None, None, "c"))}
            for row in range(random.randint(1, 60))
        ]
        rows[0]["text"] = "one"
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        kind = random.choice(("jsonl", "jsonl.gz", "jsonl.zst", "parquet"))
        if kind == "parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.{kind}", row_group_size=7)
        elif kind == "jsonl":
            (folder / f"{name}.{kind}").write_bytes(content)
        else:
            compress = gzip.compress if kind == "jsonl.gz" else functools.partial(pa.compress, codec="zstd")
            (folder / f"{name}.{kind}").write_bytes(bytes(compress(content)))
        documents[f"{name}.{kind}"] = [(row["text"], row["red_pajama_subset"] or name[0]) for row in rows]
    return [document for name in sorted(documents) for document in documents[name] if document[0]]


def kill_in(function, calls):
    """Wrap `function` so that the process exits, as if killed, after `calls - 1` calls, or in the first."""

    def wrapped(*arguments, **options):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os._exit(9)
        function(*arguments, **options)
        if calls == 1:
            os._exit(9)

    return wrapped


@settings(deadline=None, max_examples=20, phases=[Phase.generate])
@given(case=st.integers(0, 2**32))
def test_whatever_interrupts_a_preparation_it_ends_with_the_same_files(tokenizer, case):
    """Kill the main process or a worker anywhere, delete or truncate files, and continue with other unit sizes."""
    random, encoder = Random(case), TextEncoder(tokenizer)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        data, whole, folder = (Path(name, part) for part in ("data", "whole", "folder"))
        data.mkdir()
        documents = write_random_files(random, data)
        eval_fraction = random.choice((0.0, 0.2))
        patch.setattr(units, "MIN_UNIT_BYTES", random.choice((150, 700, 3000)))
        assert prepare_folder(resolve_source(str(data)), encoder, whole, 1, eval_fraction=eval_fraction)
        model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
        for kind in {(slice, is_held_out(text, eval_fraction)) for text, slice in documents}:
            texts = [text for text, slice in documents if (slice, is_held_out(text, eval_fraction)) == kind]
            expected = [id for text in texts for id in (model.bos_id(), *model.encode(text), model.eos_id())]
            shards = [
                shard
                for shard in json.loads((whole / "manifest.json").read_text())["shards"]
                if (shard["slice"], shard["split"] == "held_out") == kind
            ]
            stream = np.concatenate([np.fromfile(whole / shard["file"], np.uint16) for shard in shards])
            assert stream.tolist() == expected
        workers = random.choice((1, 1, 1, 2))

        def interrupted(place, name, calls):
            setattr(place, name, kill_in(getattr(place, name), calls))
            prepare_folder(resolve_source(str(data)), encoder, folder, workers, eval_fraction=eval_fraction)

        for _ in range(random.randint(1, 3)):
            place, name = random.choice(PLACES_TO_END)
            process = multiprocessing.get_context("fork").Process(
                target=interrupted, args=(place, name, random.randint(1, 9)), daemon=False
            )
            process.start()
            process.join()
            state = folder / PREPARATION
            for path in sorted([*folder.glob("tokens-*"), *state.glob("unit-*"), *state.glob("tokens-*")]):
                if random.random() < 0.1:
                    path.unlink()
                elif random.random() < 0.1:
                    os.truncate(path, path.stat().st_size // 2)
            if (state / "plan.json").exists():
                patch.setattr(units, "MIN_UNIT_BYTES", random.choice((150, 700, 3000)))
        assert prepare_folder(resolve_source(str(data)), encoder, folder, workers, eval_fraction=eval_fraction)
        assert files_of(folder) == files_of(whole)
        assert not [path for path in (folder / PREPARATION).iterdir() if path.name.startswith("tokens")]
