"""Builds the folder of tokenized examples that `data_utils.InstructionDataset` reads.

The folder holds

    tokens.bin      the tokens of all examples, concatenated; little-endian uint16 (uint32 for a vocabulary above 65536)
    labels.bin      one byte per token, 1 if the model learns it
    ends.bin        where each example ends in tokens.bin, in tokens; int64
    packs.bin       the numbers of the examples, pack by pack; int64
    pack_ends.bin   where each pack ends in packs.bin, in examples; int64
    manifest.json   counts, and the sizes and checksums of the other files

Checkpoints refer to these files: the data set's fingerprint is computed from their checksums.
"""

import hashlib
import json
import os
import shutil
import socket
from array import array
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus.instructions import Encoded, ExampleEncoder
from corpus.manifest import MANIFEST_NAME, list_skipped
from corpus.order import Permutation
from corpus.rows import read_rows
from corpus.sources import Source
from corpus.workers import call, forked_pool
from runtime.console import InputError, first_line, say
from runtime.files import checksum, exclusive_lock, sync, write_json

FORMAT_VERSION = 2
BATCH_ROWS = 256
PARALLEL_BYTES = 2**23  # a source of this size is tokenized on all cores
PACK_WINDOW = 2**14  # examples


def prepare_examples(source: Source, encoder: ExampleEncoder, cache_dir: Path) -> Path:
    """Return the folder in `cache_dir` with the examples of `source`; build it unless it is there and undamaged.

    One process of a node checks and builds, the others wait. A build that is killed leaves nothing that looks complete.

    Raises:
        InputError: no row can be used, or `cache_dir` cannot be written to.
    """
    if source.remark:
        say(source.remark)
    key = json.dumps([FORMAT_VERSION, encoder.fingerprint, source.fingerprint])
    folder = Path(cache_dir) / f"examples-{hashlib.sha256(key.encode()).hexdigest()}"
    if not _damaged_file(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder.with_suffix(".lock"), "the data set is being tokenized; waiting for it"):
            if damaged := _damaged_file(folder):
                if folder.exists():
                    say(f"{damaged} is damaged or missing; tokenizing the data set again")
                _build(folder, source, encoder)
    except OSError as error:
        raise InputError(
            f"--cache_dir: cannot write to {cache_dir} ({error.strerror or first_line(error)}); "
            "make room there, or give a folder with enough"
        ) from error
    return folder


def _damaged_file(folder: Path) -> Path | None:
    """Return the first file that is missing or differs from what was written, or None."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.pop("sha256") != _digest(manifest):
            return path
        for name, expected in manifest["files"].items():
            path = folder / name
            if checksum(path) != expected:
                return path
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return path
    return None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _build(folder: Path, source: Source, encoder: ExampleEncoder) -> None:
    for stale in (folder, *folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    # On a file system without locks, another node may build the same folder at the same time.
    partial = folder.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        lengths, skipped, cut = _write_examples(partial, source, encoder)
        if not lengths:
            raise InputError(
                f"--dataset: {_files(source)} of {source.name} has no usable row "
                f"(skipped: {list_skipped(skipped)}); correct the rows or give others"
                + (", or raise --max_length" if any("--max_length" in reason for reason in skipped) else "")
            )
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
            f"skipped rows: {list_skipped(skipped)}"
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(source: Source) -> str:
    first, more = source.files[0].path, len(source.files) - 1
    return f"{first} and {more} more" if more else first


def _write_examples(folder: Path, source: Source, encoder: ExampleEncoder) -> tuple[array, Counter, int]:
    """Write tokens, labels and ends. Return the lengths, the skipped rows by reason, and how many examples were cut."""
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
    (folder / "ends.bin").write_bytes(np.cumsum(lengths, dtype="<i8").tobytes())
    return lengths, skipped, cut


def _encoded_batches(source: Source, encoder: ExampleEncoder) -> Iterator[tuple[list[Encoded | str], int]]:
    """Yield encoded batches in the order of the rows, each with the number of bytes read for it."""
    workers = len(os.sched_getaffinity(0)) if source.size >= PARALLEL_BYTES else 1
    if workers == 1:
        yield from ((list(encoder.encode(rows)), read_bytes) for rows, read_bytes in _row_batches(source))
        return
    batches, pending = _row_batches(source), deque()
    with forked_pool(workers, encoder) as pool:
        while True:
            while len(pending) < 4 * workers and (batch := next(batches, None)):
                pending.append((pool.submit(call, _encode, batch[0]), batch[1]))
            if not pending:
                return
            future, read_bytes = pending.popleft()
            examples, notes = future.result()
            encoder.take_notes(notes)
            yield examples, read_bytes


def _encode(encoder: ExampleEncoder, rows: list[dict]) -> tuple[list[Encoded | str], tuple[set[str], ...]]:
    return list(encoder.encode(rows)), encoder.notes


def _row_batches(source: Source) -> Iterator[tuple[list[dict], int]]:
    """Yield batches of rows, each with the number of bytes read for it."""
    for file in source.files:
        rows, position, done = [], 0, 0
        for columns, position in read_rows(file.fetch(), ()):
            rows.append(columns)
            if len(rows) == BATCH_ROWS:
                yield rows, position - done
                rows, done = [], position
        yield rows, position - done


def _write_packs(folder: Path, lengths: Sequence[int], capacity: int) -> None:
    members, ends = array("q"), array("q")
    for examples in pack(lengths, capacity):
        members.extend(examples)
        ends.append(len(members))
    (folder / "packs.bin").write_bytes(np.array(members, "<i8").tobytes())
    (folder / "pack_ends.bin").write_bytes(np.array(ends, "<i8").tobytes())


def pack(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Yield groups of examples whose tokens fit into `capacity` together.

    Best fit, longest first, among PACK_WINDOW examples at a time, which a fixed permutation chooses.
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
