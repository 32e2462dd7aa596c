"""Turns files of text into the folder of tokens that `data_utils.PackedDataset` reads.

The folder holds `tokens-00000.bin`, `tokens-00001.bin`, ... (little-endian uint16, or uint32 for a vocabulary above
65536) with ONE continuous stream of documents, BOS ... EOS each, in the order of the source, and `manifest.json`.
A sequence may span two shards, and nothing depends on the sequence length or on the number of processes.
"""

import codecs
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import console
from console import InputError
from data_utils import FORMAT_VERSION, MANIFEST_NAME, TextEncoder, read_manifest
from files import exclusive_lock, sync, write_json

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
SLICE_COLUMN = "red_pajama_subset"
SHARD_TOKENS = 2**31
BATCH_BYTES = 2**20
COLUMNAR_ROWS = 64
SMALL_SOURCE_BYTES = 2**23
POLL_SECONDS = 0.5


class SourceFile(NamedTuple):
    """A file of documents; `slice` names the part of the data set that they are counted under."""

    path: Path
    slice: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """All files of a data set in the order in which they are read; `name` is what the user called it."""

    name: str
    files: list[SourceFile]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the files' paths, sizes and times of change."""
        identity = [(str(file.path), *file[1:]) for file in self.files]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class Batch(NamedTuple):
    """Consecutive rows of a file: lines of JSON, or rows already read. `first_row` counts from 1."""

    file: SourceFile
    first_row: int
    rows: list[bytes | dict]
    input_bytes: int


@dataclass
class EncodedBatch:
    tokens: np.ndarray
    slice_documents: Counter
    slice_tokens: Counter
    skipped: Counter
    input_bytes: int


# Sources


def resolve_source(name: str) -> Source:
    """The files behind `--dataset`. Raises InputError if there are none."""
    root = Path(os.path.abspath(os.path.expanduser(name)))
    if root.is_file():
        if not root.name.endswith(FILE_SUFFIXES):
            raise InputError(f"--dataset: {name} is not of a known kind: {', '.join(FILE_SUFFIXES)}")
        return Source(name, [_source_file(root, root.parent)])
    if not root.is_dir():
        raise InputError(f"--dataset: {name} is neither a file nor a folder here; download it from the hub first")
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
        if "train" not in splits and len(splits) > 1:
            raise InputError(f"--dataset: {name} has no split 'train'; give the folder of one of: {', '.join(splits)}")
        root /= "train" if "train" in splits else splits[0]
    if (root / "state.json").is_file():
        data_files = json.loads((root / "state.json").read_bytes())["_data_files"]
        paths = [root / data_file["filename"] for data_file in data_files]
        return Source(name, [_source_file(path, root.parent) for path in paths])
    found = [root / path for path in sorted(glob.iglob("**/*", root_dir=root, recursive=True))]
    paths = [path for path in found if path.name.endswith(FILE_SUFFIXES) and not path.is_dir()]
    paths = [path for path in paths if path.name != MANIFEST_NAME]
    if not paths:
        raise InputError(f"--dataset: {name} holds no file of a known kind: {', '.join(FILE_SUFFIXES)}")
    return Source(name, [_source_file(path, root) for path in paths])


def _source_file(path: Path, root: Path) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"--dataset: {path} cannot be read ({error.strerror}); restore or remove it") from error
    if status.st_size == 0:
        raise InputError(f"--dataset: {path} is empty; copy it again or remove it")
    return SourceFile(path, path.relative_to(root).parts[0].partition(".")[0], status.st_size, status.st_mtime_ns)


def read_batches(file: SourceFile) -> Iterator[Batch]:
    """Reads a file in batches of about BATCH_BYTES, in constant memory. Raises InputError if it is damaged."""
    reader = {".parquet": _parquet_rows, ".arrow": _arrow_rows}.get(file.path.suffix, _json_lines)
    first_row, rows, size, reported = 1, [], 0, 0
    try:
        for row, row_size, position in reader(file):
            rows.append(row)
            size += row_size
            if size >= BATCH_BYTES:
                yield Batch(file, first_row, rows, position - reported)
                first_row, rows, size, reported = first_row + len(rows), [], 0, position
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--dataset: {file.path} cannot be read beyond row {first_row + len(rows) - 1} ({reason}); copy it again"
        ) from error
    yield Batch(file, first_row, rows, file.size - reported)


def _json_lines(file: SourceFile) -> Iterator[tuple[bytes, int, int]]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix)
    with open(file.path, "rb") as raw:
        lines = io.BufferedReader(pa.CompressedInputStream(raw, compression), BATCH_BYTES) if compression else raw
        line = b""
        for line in lines:
            yield line, len(line), raw.tell()
        if not line:
            raise InputError(f"--dataset: {file.path} is empty; copy it again or remove it")


def _parquet_rows(file: SourceFile) -> Iterator[tuple[dict, int, int]]:
    with pa.parquet.ParquetFile(file.path) as parquet:
        columns = _wanted_columns(parquet.schema_arrow.names, file)
        done = 0
        for table in parquet.iter_batches(COLUMNAR_ROWS, columns=columns):
            done += table.num_rows
            yield from _table_rows(table, file.size * done // parquet.metadata.num_rows)


def _arrow_rows(file: SourceFile) -> Iterator[tuple[dict, int, int]]:
    with pa.memory_map(str(file.path)) as raw, pa.ipc.open_stream(raw) as stream:
        columns = _wanted_columns(stream.schema.names, file)
        for table in stream:
            for start in range(0, table.num_rows, COLUMNAR_ROWS):
                yield from _table_rows(table.slice(start, COLUMNAR_ROWS).select(columns), raw.tell())


def _table_rows(table: pa.RecordBatch, position: int) -> Iterator[tuple[dict, int, int]]:
    row_size = table.nbytes // max(1, table.num_rows) + 1
    for row in table.to_pylist():
        yield row, row_size, position


def _wanted_columns(columns: Iterable[str], file: SourceFile) -> list[str]:
    if "text" not in columns:
        raise InputError(
            f"--dataset: {file.path} has no column 'text', only: {', '.join(columns)}; "
            "rename the column that holds the documents to 'text'"
        )
    return [name for name in columns if name in ("text", SLICE_COLUMN)]


# Tokens


def encode_batch(encoder: TextEncoder, batch: Batch) -> EncodedBatch:
    """Raises InputError on a line that is not a JSON object and on a first row without `text`.

    Rows whose text is missing, empty, or not a string of Unicode characters are skipped and counted.
    """
    texts, slices, skipped = [], [], Counter()
    for number, row in enumerate(batch.rows, batch.first_row):
        if isinstance(row, bytes):
            if row.isspace():
                continue
            row = _parse_line(row, f"--dataset: {batch.file.path}, line {number}")
        if batch.first_row == 1 and not texts and not skipped:
            _wanted_columns(row.keys(), batch.file)
        text = row.get("text")
        if reason := _unusable(text):
            skipped[reason] += 1
            continue
        texts.append(text)
        slices.append(_slice_of(row) or batch.file.slice)
    documents = encoder.encode(texts)
    slice_tokens = Counter()
    for name, document in zip(slices, documents, strict=True):
        slice_tokens[name] += len(document)
    tokens = np.concatenate([np.empty(0, encoder.dtype), *documents])
    return EncodedBatch(tokens, Counter(slices), slice_tokens, skipped, batch.input_bytes)


def _parse_line(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        remedy = "correct or remove it" if line.endswith(b"\n") else "the file seems cut off: copy it again"
        raise InputError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}); {remedy}") from error
    if not isinstance(row, dict):
        raise InputError(f'{where}: a JSON {type(row).__name__}; each line must be an object like {{"text": "..."}}')
    return row


def _unusable(text: object) -> str | None:
    if text is None:
        return "text missing or null"
    if not isinstance(text, str):
        return "text not a string"
    if not text:
        return "text empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text with unpaired surrogates"


def _slice_of(row: dict) -> str | None:
    meta = row.get("meta")
    name = row.get(SLICE_COLUMN) or (meta.get(SLICE_COLUMN) if isinstance(meta, dict) else None)
    return name if isinstance(name, str) else None


def encode_files(files: list[SourceFile], encoder: TextEncoder, num_workers: int) -> Iterator[EncodedBatch]:
    """Encodes in `num_workers` processes, in the order of the files, with a bounded number of batches in memory."""
    batches = itertools.chain.from_iterable(map(read_batches, files))
    if num_workers <= 1:
        yield from (encode_batch(encoder, batch) for batch in batches)
        return
    # Forked workers do not import the main program again; they use neither CUDA nor threads of their own.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (encoder,))
    pending = deque()
    try:
        for batch in batches:
            pending.append(executor.submit(_encode_in_worker, batch))
            if len(pending) == 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "--num_workers: a tokenizing process was killed, most likely for lack of memory; use fewer of them"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(encoder: TextEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    return encode_batch(_worker_encoder, batch)


# The prepared folder


class ShardWriter:
    """Writes a stream of tokens into files of `shard_tokens` each; `shards` describes those that are complete."""

    def __init__(self, folder: Path, shard_tokens: int):
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.shards: list[dict] = []
        self._file = None

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None:
                self._file = open(self.folder / f"tokens-{len(self.shards):05d}.bin", "wb")  # noqa: SIM115
                self._tokens, self._hash = 0, hashlib.sha256()
            piece, tokens = np.split(tokens, [self.shard_tokens - self._tokens])
            self._file.write(piece)
            self._hash.update(piece)
            self._tokens += len(piece)
            if self._tokens == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))
            name = Path(self._file.name).name
            self.shards.append({"file": name, "tokens": self._tokens, "sha256": self._hash.hexdigest()})
            self._file = None


def prepare_dataset(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    num_workers: int | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """The folder with the tokens of `source`, built in `cache_dir` unless it is there or `source` is such a folder.

    Local rank 0 builds, the other local ranks wait; so call it before any collective operation that could time out.
    A build that is killed leaves nothing that looks complete. Raises InputError on input that cannot be used and on a
    `cache_dir` that cannot be written.
    """
    encoder = TextEncoder(tokenizer)
    if (Path(source) / MANIFEST_NAME).is_file() and (Path(source) / "tokens-00000.bin").is_file():
        return _check_tokenizer(Path(source), encoder)
    resolved = resolve_source(source)
    key = json.dumps([FORMAT_VERSION, encoder.fingerprint, resolved.fingerprint])
    folder = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()
    manifest = folder / MANIFEST_NAME
    if console.local_rank() != 0:
        _wait_for(manifest)
    elif not manifest.is_file():
        if num_workers is None:
            num_workers = 1 if resolved.size < SMALL_SOURCE_BYTES else len(os.sched_getaffinity(0))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            waiting = "another job is preparing the same data set; waiting for it"
            with exclusive_lock(folder.with_suffix(".lock"), waiting):
                if not manifest.is_file():
                    _build(folder, resolved, encoder, num_workers, shard_tokens)
        except OSError as error:
            raise InputError(
                f"--cache_dir: cannot write to {cache_dir} ({error.strerror}); give a folder with enough room"
            ) from error
    return folder


def _check_tokenizer(folder: Path, encoder: TextEncoder) -> Path:
    if read_manifest(folder)["tokenizer_fingerprint"] != encoder.fingerprint:
        raise InputError(f"--dataset: {folder} was prepared with another tokenizer; give that one as --tokenizer")
    return folder


def _wait_for(manifest: Path) -> None:
    parent = os.getppid()
    while not manifest.is_file():
        if os.getppid() != parent:
            sys.exit("the launcher is gone; no longer waiting for the data set")
        time.sleep(POLL_SECONDS)


def _build(folder: Path, source: Source, encoder: TextEncoder, num_workers: int, shard_tokens: int) -> None:
    started = time.monotonic()
    partial = folder.with_suffix(".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    writer = ShardWriter(partial, shard_tokens)
    slice_documents, slice_tokens, skipped = Counter(), Counter(), Counter()
    encoded_batches = encode_files(source.files, encoder, num_workers)
    try:
        with tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress:
            for encoded in encoded_batches:
                writer.append(encoded.tokens)
                slice_documents.update(encoded.slice_documents)
                slice_tokens.update(encoded.slice_tokens)
                skipped.update(encoded.skipped)
                progress.update(encoded.input_bytes)
        writer.close()
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in sorted(skipped.items()))
        if not slice_documents:
            raise InputError(
                f"--dataset: {source.name} has no usable row (skipped: {reasons or 'none'}); "
                "give documents in the column 'text'"
            )
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": encoder.dtype.name,
            "vocab_size": encoder.vocab_size,
            "tokenizer_fingerprint": encoder.fingerprint,
            "source_fingerprint": source.fingerprint,
            "total_tokens": slice_tokens.total(),
            "documents": slice_documents.total(),
            "skipped": skipped,
            "slices": {
                name: {"documents": slice_documents[name], "tokens": slice_tokens[name]}
                for name in sorted(slice_documents)
            },
            "shards": writer.shards,
        }
        write_json(partial / MANIFEST_NAME, manifest)
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        encoded_batches.close()
        shutil.rmtree(partial, ignore_errors=True)
    console.say(
        f"tokenized {slice_documents.total():,} documents into {slice_tokens.total():,} tokens "
        f"in {time.monotonic() - started:.1f} s; skipped rows: {reasons or 'none'}\nkept for the next time in {folder}"
    )
