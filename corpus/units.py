"""Cuts the files of a data set into units and tokenizes them in several processes, each unit into its own shards.

A unit is some files of one slice, or a part of a large file. It becomes one shard, or several if its rows name several
slices or some are held out. It is finished once its record is written, so an interruption loses only unfinished units.
"""

import contextlib
import hashlib
import json
import multiprocessing
import operator
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from corpus.encoder import TextEncoder
from corpus.manifest import HELD_OUT, TRAIN, is_held_out
from corpus.rows import SLICE_COLUMN, Document, Span, can_be_split, read_documents, unusable
from corpus.sources import Source, SourceFile
from corpus.workers import call, forked_pool
from runtime.console import InputError
from runtime.files import sync, write_json

PREPARATION = ".preparation"
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**22, 2**14
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**22, 2**30
UNITS = 2**12  # about this many for a large data set, so that its manifest stays small
COMPRESSION_RATIO = 4  # of text, roughly
MAX_SLICES = 64  # in one unit
POLL_SECONDS = 0.2


class Piece(NamedTuple):
    """The index of a file of the source, and the part of the file that a unit reads."""

    file: int
    span: Span


Unit = list[Piece]


@dataclass(frozen=True)
class Preparation:
    """The folder, the input and the settings, for all processes of a machine."""

    folder: Path
    source: Source
    units: list[Unit]
    encoder: TextEncoder
    eval_fraction: float = 0.0  # fraction of the documents that is held out of training
    threads: int = 1  # of the tokenizer, in each process

    @property
    def state(self) -> Path:
        return self.folder / PREPARATION

    def record_path(self, unit: int) -> Path:
        return self.state / f"unit-{unit:05d}.json"

    def record(self, unit: int) -> dict | None:
        """Return the record of a unit, or None if it or one of the shards is missing."""
        try:
            record = json.loads(self.record_path(unit).read_bytes())
            sizes = [(self.folder / shard["file"]).stat().st_size for shard in record["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        expected = [shard["tokens"] * self.encoder.dtype.itemsize for shard in record["shards"]]
        return record if sizes == expected else None


def make_units(source: Source) -> list[Unit]:
    """Return units of about equal size: large files are cut if possible, small neighbours in a slice are joined."""
    unit_bytes = min(max(source.size // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units, room = [], 0
    for index, file in enumerate(source.files):
        weight = file.size if can_be_split(file.path) else file.size * COMPRESSION_RATIO
        weight = weight or unit_bytes  # a file of unknown size is a unit of its own
        parts = -(-file.size // unit_bytes) if can_be_split(file.path) else 1
        if parts > 1:
            ends = [file.size * part // parts for part in range(parts)]
            units += [[Piece(index, Span(*span))] for span in zip(ends, [*ends[1:], None], strict=True)]
            room = 0
        elif room < weight or source.files[index - 1].slice != file.slice:
            units.append([Piece(index, Span())])
            room = unit_bytes - weight
        else:
            units[-1].append(Piece(index, Span()))
            room -= weight
    return units


def read_units(saved: list | None, source: Source) -> list[Unit]:
    """Return the units that a plan has saved; `make_units` gives those of an older plan, which has none.

    Raises:
        ValueError, TypeError: `saved` does not describe units of that source.
    """
    if saved is None:
        return make_units(source)
    units = [[Piece(operator.index(file), Span(*span)) for file, span in unit] for unit in saved]
    files = [piece.file for unit in units for piece in unit]
    if not all(units) or sorted(set(files)) != list(range(len(source.files))):
        raise ValueError("units of other files")
    return units


class ShardWriter:
    """Writes one slice and split of a unit to a temporary file, which `close` renames to the shard's name."""

    def __init__(self, preparation: Preparation, name: str, slice: str, split: str):
        self.slice, self.split = slice, split
        self.path = preparation.folder / name
        self.temporary = preparation.state / f"{name}.{socket.gethostname()}.{os.getpid()}"
        self.documents = self.tokens = 0
        self._file = open(self.temporary, "wb", buffering=2**20)  # noqa: SIM115
        self._hash = hashlib.sha256()

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.data)
        self._hash.update(tokens.data)
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> dict:
        """Return the shard's entry for the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.temporary.replace(self.path)
        counts = {"documents": self.documents, "tokens": self.tokens}
        kind = {"slice": self.slice, "split": self.split}
        return {"file": self.path.name, **kind, **counts, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def tokenize_unit(preparation: Preparation, progress: "Progress", number: int) -> None:
    """Write the shards of a unit, then its record."""
    writers: dict[tuple[str, str], ShardWriter] = {}
    skipped, unknown = Counter(), 0
    try:
        for documents in _batches(preparation, preparation.units[number], skipped, progress):
            encoded = preparation.encoder.encode([document.text for document in documents], preparation.threads)
            for document, tokens in zip(documents, encoded, strict=True):
                kind = document.slice, HELD_OUT if is_held_out(document.text, preparation.eval_fraction) else TRAIN
                if kind not in writers:
                    _check_number_of_slices(preparation, number, writers)
                    suffix = f"-{len(writers)}" if writers else ""
                    name = f"tokens-{number:05d}{suffix}.bin"
                    writers[kind] = ShardWriter(preparation, name, *kind)
                writers[kind].append(tokens)
                if preparation.encoder.unknown is not None:
                    unknown += int(np.count_nonzero(tokens == preparation.encoder.unknown))
        shards = [writer.close() for writer in writers.values()]
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    sync(preparation.folder)
    write_json(preparation.record_path(number), {"shards": shards, "skipped": skipped, "unknown": unknown})


def _batches(preparation: Preparation, unit: Unit, skipped: Counter, progress: "Progress") -> Iterator[list[Document]]:
    """Yield the usable documents of a unit in batches of about BATCH_CHARACTERS, at most BATCH_DOCUMENTS."""
    batch, size = [], 0
    for piece in unit:
        file = preparation.source.files[piece.file]
        position = piece.span.start
        for document in read_documents(file.fetch(), file.slice, span=piece.span):
            if reason := unusable(document.text):
                skipped[reason] += 1
                continue
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                progress.add(document.position - position)
                position = document.position
                yield batch
                batch, size = [], 0
        progress.add(_end(file, piece.span) - position if file.size else 0)
    yield batch


def _end(file: SourceFile, span: Span) -> int:
    return file.size if span.stop is None else span.stop


def _check_number_of_slices(preparation: Preparation, number: int, writers: dict) -> None:
    slices = list(dict.fromkeys(slice for slice, _ in writers))
    if len(slices) == MAX_SLICES:
        path = preparation.source.files[preparation.units[number][0].file].path
        raise InputError(
            f"--dataset: {path} names more than {MAX_SLICES} slices ({', '.join(slices[:3])}, ...) in its "
            f"column '{SLICE_COLUMN}'; rename the column if it means something else"
        )


class Stopped(Exception):
    """Another process of the preparation has failed."""


class Progress:
    """Counts the bytes that all processes have read, and tells the processes to stop."""

    def __init__(self) -> None:
        self.bytes = multiprocessing.Value("q", 0)
        self.stop = multiprocessing.Value("b", 0)

    def add(self, count: int) -> None:
        if self.stop.value:
            raise Stopped
        with self.bytes.get_lock():
            self.bytes.value += count


def tokenize_units(preparation: Preparation, numbers: Sequence[int], num_workers: int) -> None:
    """Tokenize these units in `num_workers` processes.

    Raises:
        InputError: a unit failed, or a process was killed.
    """
    progress = Progress()
    files = preparation.source.files
    pieces = [(files[index], span) for number in numbers for index, span in preparation.units[number]]
    total = sum(_end(file, span) - span.start for file, span in pieces)
    known = all(file.size for file, _ in pieces)
    with tqdm(total=total if known else None, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        if num_workers <= 1 or not numbers:
            for number in numbers:
                tokenize_unit(preparation, progress, number)
                bar.update(progress.bytes.value - bar.n)
            return
        pool = forked_pool(num_workers, preparation, progress)
        pending: set[Future] = set()
        remaining = iter(numbers)
        try:
            while True:
                while len(pending) < 2 * num_workers and (unit := next(remaining, None)) is not None:
                    pending.add(pool.submit(call, tokenize_unit, unit))
                if not pending:
                    break
                done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(progress.bytes.value - bar.n)
        except BrokenProcessPool as error:
            raise InputError(
                f"--num_workers: one of {num_workers} tokenizing processes was killed, most likely for lack of memory; "
                "continue with fewer, scripts/prepare_dataset.py --num_workers; finished shards are kept"
            ) from error
        finally:
            progress.stop.value = 1
            pool.shutdown(cancel_futures=True)
