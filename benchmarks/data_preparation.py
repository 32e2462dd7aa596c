"""Compare the speed of preparing a data set with plain SentencePiece and with `datasets`, on the same text and cores.

    python benchmarks/data_preparation.py -d sample/data --tokenizer sample/tokenizer --megabytes 60 --rounds 3

Each round runs three programs, one after the other, each in one process per core:
- bare: SentencePiece encodes texts that are in memory; the ids are discarded;
- prepare: our preparation, from JSONL files to shards and manifest on disk;
- usual: `datasets` reads the same files, maps the fast tokenizer over them, and groups the ids into sequences.
Then it measures the time to open a prepared set of 10^9 tokens, and the memory of an order over 3 x 10^8 sequences.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import psutil
from transformers import LlamaTokenizerFast

from corpus.encoder import TextEncoder
from corpus.manifest import FORMAT_VERSION
from corpus.order import GlobalOrder
from corpus.prepare import prepare_dataset, prepare_folder
from corpus.rows import read_documents
from corpus.sources import resolve_source
from corpus.tokenizer import load_tokenizer
from data_utils import PackedDataset
from training.flags import ArgumentParser, add_flag

CORES = len(os.sched_getaffinity(0))
SEQUENCE_LENGTH = 4096
BATCH_BYTES = 2**20
TOKENS = 10**9
SEQUENCES = 3 * 10**8


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="data_preparation.py", description=__doc__)
    add_flag(parser, "-d --dataset", str, "local JSONL files, repeated to fill --megabytes", required=True)
    add_flag(parser, "--tokenizer", str, "folder with tokenizer.model", required=True)
    add_flag(parser, "--megabytes", 60, "megabytes of JSONL to prepare")
    add_flag(parser, "--rounds", 3, "runs of each program")
    return parser.parse_args()


def write_corpus(dataset: str, folder: Path, megabytes: int) -> list[str]:
    """Write JSONL files of some megabytes each into `folder`, and return their texts."""
    documents = [
        document.text for file in resolve_source(dataset).files for document in read_documents(file.fetch(), file.slice)
    ]
    texts, size, lines = [], 0, []
    for text in itertools.cycle(documents):
        lines.append(json.dumps({"text": text}) + "\n")
        texts.append(text)
        size += len(lines[-1])
        if size >= megabytes * 10**6:
            break
    folder.mkdir()
    rows = -(-len(lines) // (2 * CORES))
    for number, start in enumerate(range(0, len(lines), rows)):
        (folder / f"corpus-{number:05d}.jsonl").write_text("".join(lines[start : start + rows]), encoding="utf-8")
    return texts


def batches(texts: list[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children; other programs affect it less than wall time."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare(texts: list[str], encoder: TextEncoder) -> float:
    """Return the seconds from the moment when all processes are ready to the end of the last."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(CORES + 1)

    def encode(part: list[list[str]]) -> None:
        start.wait()
        for batch in part:
            encoder.sentencepiece.encode(batch, num_threads=1)

    everything = list(batches(texts))
    workers = [context.Process(target=encode, args=(everything[number::CORES],)) for number in range(CORES)]
    for worker in workers:
        worker.start()
    start.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def prepare(corpus: Path, encoder: TextEncoder, folder: Path) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_folder(resolve_source(str(corpus)), encoder, folder, CORES)
    return time.perf_counter() - started


def usual(corpus: Path, tokenizer: LlamaTokenizerFast, cache: Path) -> tuple[float, Sequence[list[int]]]:
    """Return the seconds, and the ids of each document before grouping."""

    def tokenize(rows: dict) -> dict:
        ids = tokenizer(rows["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[tokenizer.bos_token_id, *document, tokenizer.eos_token_id] for document in ids]}

    def group(rows: dict) -> dict:
        ids = list(itertools.chain(*rows["input_ids"]))
        whole = len(ids) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        return {"input_ids": [ids[start : start + SEQUENCE_LENGTH] for start in range(0, whole, SEQUENCE_LENGTH)]}

    datasets.disable_progress_bars()
    files = sorted(map(str, corpus.iterdir()))
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(cache))
    encoded = rows.map(tokenize, batched=True, num_proc=CORES, remove_columns=rows.column_names)
    grouped = encoded.map(group, batched=True, num_proc=CORES)
    seconds = time.perf_counter() - started
    assert len(grouped) > 0
    return seconds, encoded["input_ids"]


def stream_of(folder: Path) -> np.ndarray:
    manifest = json.loads((folder / "manifest.json").read_text())
    return np.concatenate([np.fromfile(folder / shard["file"], manifest["dtype"]) for shard in manifest["shards"]])


def opening_seconds(folder: Path, tokenizer_name: str) -> float:
    """Write a prepared set of TOKENS zeros as sparse files, and time opening it up to the first sequence."""
    tokenizer = load_tokenizer(tokenizer_name)
    folder.mkdir()
    shards: list[dict[str, Any]] = [
        {"file": f"tokens-{n:05d}.bin", "slice": "x", "tokens": TOKENS // 100, "sha256": "0" * 64} for n in range(100)
    ]
    for shard in shards:
        (folder / shard["file"]).touch()
        os.truncate(folder / shard["file"], 2 * shard["tokens"])
    fingerprint = TextEncoder(tokenizer).fingerprint
    manifest = {"format_version": FORMAT_VERSION, "dtype": "uint16", "tokenizer_fingerprint": fingerprint}
    manifest |= {"vocab_size": len(tokenizer), "eval_fraction": 0.0, "total_tokens": TOKENS, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    started = time.perf_counter()
    dataset = PackedDataset(prepare_dataset(str(folder), tokenizer, folder), SEQUENCE_LENGTH)
    _ = dataset[dataset.order(seed=0)[0]]
    return time.perf_counter() - started


def order_megabytes() -> float:
    """Return the resident memory that an order over SEQUENCES, and looking up 10^5 positions, add to the process."""
    before = psutil.Process().memory_info().rss
    order = GlobalOrder(SEQUENCES, seed=0)
    assert all(order[place] < SEQUENCES for place in range(0, SEQUENCES, 3000))
    return (psutil.Process().memory_info().rss - before) / 1e6


def main() -> int:
    args = parse_args()
    encoder = TextEncoder(load_tokenizer(args.tokenizer))
    fast = LlamaTokenizerFast.from_pretrained(args.tokenizer)
    seconds = {"bare": [], "prepare": [], "usual": []}
    cpu = {"bare": [], "prepare": [], "usual": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        texts = write_corpus(args.dataset, scratch / "corpus", args.megabytes)
        for number in range(args.rounds):
            started = cpu_seconds()
            seconds["bare"].append(bare(texts, encoder))
            cpu["bare"].append(cpu_seconds() - started)
            started = cpu_seconds()
            seconds["prepare"].append(prepare(scratch / "corpus", encoder, scratch / f"prepared{number}"))
            cpu["prepare"].append(cpu_seconds() - started)
            started = cpu_seconds()
            elapsed, encoded = usual(scratch / "corpus", fast, scratch / f"cache{number}")
            seconds["usual"].append(elapsed)
            cpu["usual"].append(cpu_seconds() - started)
            ids = np.concatenate([np.array(document, np.uint16) for document in encoded])
            stream = stream_of(scratch / f"prepared{number}")
            assert np.array_equal(stream, ids), "prepare and usual give different ids"
        plain = sum(map(len, encoder.sentencepiece.encode(texts)))
        print(f"{CORES} processes, {args.megabytes} MB, {len(texts):,} documents, {len(stream):,} tokens")
        assert encoder.bare_leading_space or plain + 2 * len(texts) == len(stream), "bare gives different ids"
        for kind, measured in (("wall", seconds), ("CPU", cpu)):
            medians = {side: statistics.median(times) for side, times in measured.items()}
            for side, times in measured.items():
                every = ", ".join(f"{elapsed:.2f}" for elapsed in times)
                print(
                    f"{side:8} {len(stream) / medians[side]:10,.0f} tokens per {kind} second, "
                    f"{medians['bare'] / medians[side]:.2f} of bare, {medians['usual'] / medians[side]:.2f} x usual; "
                    f"{kind} seconds: {every}"
                )
        print(f"opening 10^9 tokens: {opening_seconds(scratch / 'large', args.tokenizer):.3f} s")
    print(f"order over 3 x 10^8 sequences: {order_megabytes():.1f} MB")
    return 0


if __name__ == "__main__":
    process.run(main, "data_preparation.py")
