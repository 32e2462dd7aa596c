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
import itertools
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
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from console import InputError, first_line, say
from data_order import GlobalOrder, Order, Permutation, splitmix64
from data_utils import IGNORE_INDEX, MANIFEST_NAME
from dataset_files import read_rows
from dataset_shards import follow_parent
from dataset_sources import Source
from files import checksum, exclusive_lock, sync, write_json
from instruction_rows import Encoded, ExampleEncoder

FORMAT_VERSION = 2
BATCH_ROWS = 256
PARALLEL_BYTES = 2**23  # of a source that several processes tokenize
PAD_MULTIPLE = 8  # lengths that tensor cores take well
WINDOW_GROUPS = 64
PACK_WINDOW = 2**14  # examples
COMPLETE, ABSENT = "complete", "absent"


# ------------------------------------------------------------------------------------------------------ prepared folder


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


# ------------------------------------------------------------------------------------------------------------- data set


class InstructionDataset(Dataset):
    """The examples of a prepared folder, or packs of them.

    Items are {"input_ids": int64 [length], "labels": int64 [length]}; a pack has `position_ids` too, which restart at 0
    with each example.

    Args:
        packed: an item is a pack of examples.
        multiple: batches are padded to a multiple of it, and of PAD_MULTIPLE.

    Raises:
        InputError: a file of the folder is missing or of the wrong size.
    """

    def __init__(self, folder: Path, packed: bool = False, multiple: int = 1):
        self.folder, self.packed = Path(folder), packed
        self.multiple = int(np.lcm(PAD_MULTIPLE, multiple))
        self.group_size = 1
        self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, file in self.manifest["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != file["bytes"]:
                raise InputError(
                    f"--dataset: {path} has {found} bytes instead of {file['bytes']}; "
                    "delete its folder to prepare it anew"
                )
        self._open()

    def _open(self) -> None:
        def mapped(name: str, dtype: npt.DTypeLike) -> np.memmap:
            return np.memmap(self.folder / name, dtype, mode="r")

        self._tokens = mapped("tokens.bin", np.dtype(self.manifest["dtype"]).newbyteorder("<"))
        self._labels = mapped("labels.bin", np.bool_)
        self._ends = mapped("ends.bin", "<i8")
        if self.packed:
            self._members, self._pack_ends = mapped("packs.bin", "<i8"), mapped("pack_ends.bin", "<i8")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, np.memmap)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._pack_ends if self.packed else self._ends)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        if not self.packed:
            return self._example(index)
        first = self._pack_ends[index - 1] if index else 0
        examples = [self._example(number) for number in self._members[first : self._pack_ends[index]]]
        item = {name: torch.cat([example[name] for example in examples]) for name in ("input_ids", "labels")}
        item["position_ids"] = torch.cat([torch.arange(len(example["labels"])) for example in examples])
        return item

    def _example(self, number: int) -> dict[str, torch.Tensor]:
        span = slice(self._ends[number - 1] if number else 0, self._ends[number])
        ids = torch.from_numpy(self._tokens[span].astype(np.int64))
        learned = torch.from_numpy(self._labels[span].copy())
        return {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORE_INDEX)}

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self._ends[index] - (self._ends[index - 1] if index else 0))

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Sets the size of the groups of LengthGroupedOrder: the global batch, or that of the start of the run.

        Args:
            saved: the settings of the run that is resumed; empty for a new one.

        Returns:
            The setting to save.
        """
        self.group_size = saved.get("length_group", global_batch)
        return {"length_group": self.group_size}

    def order(self, seed: int) -> Order:
        if self.packed:
            return GlobalOrder(len(self), seed)
        return LengthGroupedOrder(self, seed, self.group_size)

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pads on the right to the length of the longest, rounded up, where causal attention never looks.

        Returns:
            `input_ids`, `labels` and, of packs, `position_ids`, [B, S]; `token_count`, [1], without padding.
        """
        lengths = [len(item["input_ids"]) for item in items]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        batch = {"token_count": torch.tensor([sum(lengths)])}
        for name, filler in (("input_ids", 0), ("labels", IGNORE_INDEX)):
            rows = [*(item[name] for item in items), torch.empty(longest, dtype=torch.int64)]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=filler)[:-1]
        if self.packed:  # padding is one more example
            rows = [torch.cat([item["position_ids"], torch.arange(longest - len(item["labels"]))]) for item in items]
            batch["position_ids"] = torch.stack(rows)
        return batch

    @property
    def longest(self) -> int:
        """Positions of a batch that holds the longest example."""
        return -(-self.manifest["longest"] // self.multiple) * self.multiple

    @property
    def mean_length(self) -> float:
        """Tokens in a sequence, without padding."""
        return self.manifest["tokens"] / len(self)

    @property
    def description(self) -> str:
        manifest = self.manifest
        packs = f" in {len(self):,} packs" if self.packed else ""
        return (
            f"{manifest['examples']:,} examples{packs} of {self.mean_length:.1f} tokens on average, the longest of "
            f"{manifest['longest']:,}; {manifest['cut']:,} cut off; "
            f"skipped rows: {_listing(manifest['skipped']) or 'none'}"
            + (f"; not used: {', '.join(unused)}" if (unused := manifest.get("unused")) else "")
        )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with tokens and labels, and with how they are put into sequences."""
        content = [self.manifest["dtype"], self.manifest["encoder_fingerprint"], self.manifest["files"], self.packed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class LengthGroupedOrder:
    """The endless order of a run's sequences, the same on every rank, in groups of similar length.

    Within an epoch each sequence comes exactly once. As in GlobalOrder, a permutation keyed by (seed, epoch) mixes all
    of them; each window of it is sorted by length and cut into groups, which another permutation puts in order. So a
    group is one optimizer step's worth of like lengths, while its members and its place change with the epoch.
    A function of position alone, in memory for one window.
    """

    def __init__(self, dataset: InstructionDataset, seed: int, group_size: int):
        self.dataset, self.seed, self.group_size = dataset, seed, group_size
        # At least four windows, else a small data set would have the same groups in every epoch.
        groups = min(WINDOW_GROUPS, max(1, len(dataset) // (4 * group_size)))
        self.window_size = groups * group_size
        self._cached: tuple[int, int] | None = None  # epoch and number of the window
        self._window: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, len(self.dataset))
        window, place = divmod(index, self.window_size)
        if self._cached != (epoch, window):
            self._cached, self._window = (epoch, window), self._arranged(epoch, window)
        return self._window[place]

    def _arranged(self, epoch: int, window: int) -> list[int]:
        count = len(self.dataset)
        permutation = Permutation(count, self.seed, epoch)
        start = window * self.window_size
        members = [permutation[index] for index in range(start, min(start + self.window_size, count))]
        members.sort(key=self.dataset.length)
        whole = len(members) // self.group_size
        order = Permutation(whole, splitmix64(self.seed ^ window), epoch) if whole > 1 else range(whole)
        groups = [members[group * self.group_size :][: self.group_size] for group in order]
        return [*itertools.chain.from_iterable(groups), *members[whole * self.group_size :]]
