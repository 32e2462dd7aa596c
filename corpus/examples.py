"""Data sets of fine-tuning: examples, tokenized once into a folder, and batches of them.

The folder holds

    tokens.bin      the examples' tokens, one after the other, little-endian uint16 (uint32 above 65536)
    labels.bin      one byte a token, 1 where it is to be learned
    ends.bin        the number of tokens up to the end of each example, int64
    packs.bin       the examples by pack, int64, and pack_ends.bin, the number of examples up to the end of each pack
    manifest.json

B is the batch size, S the length of its longest sequence, rounded up.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
from array import array
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus.instructions import Encoded, ExampleEncoder
from corpus.manifest import MANIFEST_NAME
from corpus.order import Permutation
from corpus.rows import read_rows
from corpus.sources import Source
from corpus.units import follow_parent
from runtime.console import InputError, first_line, say
from runtime.files import checksum, exclusive_lock, sync, write_json

FORMAT_VERSION = 2
BATCH_ROWS = 256
PARALLEL_BYTES = 2**23  # of a source that several processes tokenize
PACK_WINDOW = 2**14  # examples
COMPLETE, ABSENT = "complete", "absent"


def prepare_examples(source: Source, encoder: ExampleEncoder, cache_dir: Path) -> Path:
    """Return the folder with the examples of `source`, built in `cache_dir` unless it is there and undamaged.

    One process a node checks and builds, the others wait; a build that is killed leaves nothing that looks complete.

    Raises:
        InputError: no row can be used, or `cache_dir` cannot be written to.
    """
    if source.remark:
        say(source.remark)
    key = json.dumps([FORMAT_VERSION, encoder.fingerprint, source.fingerprint])
    folder = Path(cache_dir) / f"examples-{hashlib.sha256(key.encode()).hexdigest()}"
    if _state(folder) == COMPLETE:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder.with_suffix(".lock"), "the data set is being tokenized; waiting for it"):
            state = _state(folder)
            if state not in (COMPLETE, ABSENT):
                say(f"{folder / state} is damaged; tokenizing the data set again")
            if state != COMPLETE:
                _build(folder, source, encoder)
    except OSError as error:
        raise InputError(
            f"--cache_dir: cannot write to {cache_dir} ({error.strerror or first_line(error)}); "
            "make room there, or give a folder with enough"
        ) from error
    return folder


def _state(folder: Path) -> str:
    """Return COMPLETE, ABSENT, or the name of a file that is not as it was written."""
    name = MANIFEST_NAME
    try:
        if not (folder / name).is_file():
            return ABSENT
        manifest = json.loads((folder / name).read_bytes())
        if manifest.pop("sha256") != _digest(manifest):
            return name
        for name, expected in manifest["files"].items():
            if checksum(folder / name) != expected:
                return name
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return name
    return COMPLETE


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _build(folder: Path, source: Source, encoder: ExampleEncoder) -> None:
    for stale in (folder, *folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    # Where the file system has no locks, other nodes build the same at the same time.
    partial = folder.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        lengths, skipped, cut = _write_examples(partial, source, encoder)
        if not lengths:
            raise InputError(
                f"--dataset: {_files(source)} of {source.name} has no usable row "
                f"(skipped: {_listing(skipped) or 'none'}); correct the rows or give others"
                + (", or raise --max_length" if any("--max_length" in reason for reason in skipped) else "")
            )
        (partial / "ends.bin").write_bytes(np.cumsum(lengths, dtype="<i8").tobytes())
        _write_packs(partial, lengths, encoder.max_length)
        files = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": encoder.encoder.dtype.name,
            "encoder_fingerprint": encoder.fingerprint,
            "source_fingerprint": source.fingerprint,
            "examples": len(lengths),
            "tokens": int(sum(lengths)),
            "longest": int(max(lengths)),
            "cut": cut,
            "skipped": skipped,
            "unused": encoder.unused,
            "files": files,
        }
        manifest["sha256"] = _digest(manifest)
        for name in files:
            sync(partial / name)
        write_json(partial / MANIFEST_NAME, manifest)
        sync(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST_NAME).is_file():
                raise
        sync(folder.parent)
        say(
            f"tokenized {len(lengths):,} examples of {source.name} into {sum(lengths):,} tokens; "
            f"skipped rows: {_listing(skipped) or 'none'}"
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_examples(folder: Path, source: Source, encoder: ExampleEncoder) -> tuple[array, Counter, int]:
    """Writes tokens.bin and labels.bin; returns the lengths, the skipped rows by reason, and how many were cut."""
    lengths, skipped, cut = array("q"), Counter(), 0
    bar = tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, open(folder / "tokens.bin", "wb") as tokens, open(folder / "labels.bin", "wb") as labels:
        for examples, read_bytes in _encoded_batches(source, encoder):
            for example in examples:
                if isinstance(example, str):
                    skipped[example] += 1
                    continue
                tokens.write(example.ids.astype(encoder.encoder.dtype).tobytes())
                labels.write(example.labels.tobytes())
                lengths.append(len(example.ids))
                cut += example.cut
            bar.update(read_bytes)
    return lengths, skipped, cut


def _encoded_batches(source: Source, encoder: ExampleEncoder) -> Iterator[tuple[list[Encoded | str], int]]:
    """Examples in the order of the rows, and how many more bytes of their file are read; on all cores if worth it."""
    workers = len(os.sched_getaffinity(0)) if source.size >= PARALLEL_BYTES else 1
    if workers == 1:
        yield from ((list(encoder.encode(rows)), read_bytes) for rows, read_bytes in _row_batches(source))
        return
    # Forked workers do not import the main program again; they use neither CUDA nor threads of their own.
    context = multiprocessing.get_context("fork")
    pending = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as executor:
        for rows, read_bytes in _row_batches(source):
            pending.append((executor.submit(_encode_in_worker, rows), read_bytes))
            if len(pending) == 4 * workers:
                yield _collected(encoder, *pending.popleft())
        for future, read_bytes in pending:
            yield _collected(encoder, future, read_bytes)


def _collected(encoder: ExampleEncoder, future: Future, read_bytes: int) -> tuple[list[Encoded | str], int]:
    examples, notes = future.result()
    encoder.take_notes(notes)
    return examples, read_bytes


_worker_encoder: ExampleEncoder  # of a worker process


def _start_worker(encoder: ExampleEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    follow_parent()


def _encode_in_worker(rows: list[dict]) -> tuple[list[Encoded | str], tuple[set[str], ...]]:
    return list(_worker_encoder.encode(rows)), _worker_encoder.notes


def _row_batches(source: Source) -> Iterator[tuple[list[dict], int]]:
    """Rows, and how many more bytes of their file are read."""
    for file in source.files:
        rows, position, done = [], 0, 0
        for columns, position in read_rows(file.fetch(), ()):
            rows.append(columns)
            if len(rows) == BATCH_ROWS:
                yield rows, position - done
                rows, done = [], position
        yield rows, position - done


def _files(source: Source) -> str:
    first, more = source.files[0].path, len(source.files) - 1
    return f"{first} and {more} more" if more else first


def _listing(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} with {reason}" for reason, count in sorted(skipped.items()))


def _write_packs(folder: Path, lengths: Sequence[int], capacity: int) -> None:
    """Writes packs.bin and pack_ends.bin."""
    end, ends = 0, array("q")
    with open(folder / "packs.bin", "wb") as packs:
        for members in pack(lengths, capacity):
            packs.write(np.array(members, "<i8").tobytes())
            end += len(members)
            ends.append(end)
    (folder / "pack_ends.bin").write_bytes(np.array(ends, "<i8").tobytes())


def pack(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Groups examples so that the tokens of each group fit into `capacity`.

    Best fit, longest first, among PACK_WINDOW examples that a fixed permutation brings together.
    """
    order = Permutation(len(lengths), seed=0, epoch=0)
    for start in range(0, len(lengths), PACK_WINDOW):
        window = [order[position] for position in range(start, min(start + PACK_WINDOW, len(lengths)))]
        packs: list[list[int]] = []
        open_packs: list[tuple[int, int]] = []  # room and number of each, by room
        for example in sorted(window, key=lambda example: (-lengths[example], example)):
            place = bisect_left(open_packs, (lengths[example], 0))
            if place < len(open_packs):
                room, number = open_packs.pop(place)
            else:
                room, number = capacity, len(packs)
                packs.append([])
            packs[number].append(example)
            insort(open_packs, (room - lengths[example], number))
        yield from packs
