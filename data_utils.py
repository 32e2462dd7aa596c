"""Data sets of packed sequences: of a prepared folder, or of random tokens for benchmarks.

`corpus/prepare.py` writes the folder of tokens that `PackedDataset` reads; `corpus/order.py` has the order of the
sequences. S is the sequence length, `max_length`.
"""

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from corpus.encoder import TextEncoder
from corpus.examples import _listing
from corpus.manifest import HELD_OUT, MANIFEST_NAME, TRAIN, read_manifest
from corpus.order import GlobalOrder, MixedOrder, Order, Permutation, splitmix64
from corpus.sources import Source
from corpus.stream import TokenStream
from model_utils import IGNORE_INDEX
from runtime.console import InputError, RunError, size_text


class PackedDataset(Dataset):
    """A split of a prepared folder in sequences of S tokens: its shards, one behind the other, cut every S tokens.

    With `slice_weights` the shards of each slice are put together and cut by themselves, so that every sequence is of
    one slice; `slices` then names them and the sequences of each, and `order` draws from them by weight.

    Items are {"input_ids": int64 [S], "labels": int64 [S]}, both the same ids: the model shifts the labels. With
    `document_ends`, the ids of the tokens BOS and EOS, items hold what keeps documents apart (see `mark_documents`).
    Raises InputError if a shard is missing or of the wrong size, or if the stream is shorter than one sequence.
    """

    def __init__(
        self,
        folder: str | Path,
        max_length: int,
        document_ends: tuple[int, int] | None = None,
        *,
        split: str = TRAIN,
        slice_weights: dict[str, float] | None = None,
    ):
        self.folder = Path(folder)
        self.max_length = max_length
        self.document_ends = document_ends
        self.slice_weights = slice_weights
        self.manifest = read_manifest(self.folder)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        streams: dict[str, list[dict]] = {}
        for shard in self.manifest["shards"]:
            if shard.get("split", TRAIN) == split:
                streams.setdefault(shard["slice"] if slice_weights else "", []).append(shard)
        self.shards = [shard for name in sorted(streams) for shard in streams[name]]
        self._shard_ends = list(itertools.accumulate(shard["tokens"] for shard in self.shards))
        self._opened: dict[int, np.memmap] = {}
        for shard in self.shards:
            self._check_size(self.folder / shard["file"], shard["tokens"] * self.dtype.itemsize)
        self.slices: dict[str, range] = {}
        self._first_sequences, self._first_tokens = [0], [0]
        for name in sorted(streams):
            tokens = sum(shard["tokens"] for shard in streams[name])
            first = self._first_sequences[-1]
            self.slices[name] = range(first, first + tokens // max_length)
            self._first_sequences.append(self.slices[name].stop)
            self._first_tokens.append(self._first_tokens[-1] + tokens)
        if slice_weights:
            self.order(seed=0)  # which checks them
        if len(self) == 0 and split == HELD_OUT:
            raise InputError(
                f"--eval_fraction: {self._first_tokens[-1]} tokens are held out, and a sequence takes {max_length}; "
                "give a larger fraction"
            )
        if len(self) == 0:
            share = self.manifest.get("eval_fraction")
            held_out = f" beside the {share:g} of it that --eval_fraction holds out" if share else ""
            raise InputError(
                f"--max_length: one sequence takes {max_length} tokens, but the whole data set has "
                f"{self._first_tokens[-1]}{held_out} ({self.folder}); lower --max_length or give more data"
            )

    @staticmethod
    def _check_size(path: Path, expected: int) -> None:
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise InputError(
                f"--dataset: {path} has {found} bytes instead of {expected}; delete its folder to prepare it anew"
            )

    def __len__(self) -> int:
        return self._first_sequences[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        stream = bisect_right(self._first_sequences, index) - 1
        start = self._first_tokens[stream] + (index - self._first_sequences[stream]) * self.max_length
        ids = torch.from_numpy(self._tokens(start, start + self.max_length))
        item = {"input_ids": ids, "labels": ids.clone()}
        return mark_documents(item, *self.document_ends) if self.document_ends else item

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        pieces = []
        while start < stop:
            number = bisect_right(self._shard_ends, start)
            shard = self._shard(number)
            shard_start = self._shard_ends[number] - len(shard)
            pieces.append(shard[start - shard_start : stop - shard_start])
            start += len(pieces[-1])
        ids = np.concatenate(pieces)
        if ids.max() >= self.manifest["vocab_size"]:
            raise RunError(
                f"--dataset: {self.folder / self.shards[number]['file']} is damaged: it holds the token {ids.max()} of "
                f"a vocabulary of {self.manifest['vocab_size']}; scripts/prepare_dataset.py --verify finds all that are"
            )
        return ids.astype(np.int64)

    def _shard(self, number: int) -> np.memmap:
        if number not in self._opened:
            path = self.folder / self.shards[number]["file"]
            try:
                self._opened[number] = np.memmap(path, self.dtype, mode="r", shape=self.shards[number]["tokens"])
            except (OSError, ValueError) as error:
                raise RunError(
                    f"--dataset: {path} has gone or changed since the run began ({error}); bring it back and resume"
                ) from error
        return self._opened[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}

    @property
    def mean_length(self) -> float:
        """Tokens in a sequence."""
        return self.max_length

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Settings that sequences and their order depend on beside data, seed and length."""
        return {"slice_weights": self.slice_weights, "document_mask": self.document_ends is not None}

    def order(self, seed: int) -> Order:
        if self.slice_weights:
            return MixedOrder(self.slices, self.slice_weights, seed)
        return GlobalOrder(len(self), seed)

    collate: Callable | None = None  # torch's default

    @property
    def description(self) -> str:
        text = f"{len(self):,} sequences of {self.max_length} tokens; {self.tail_tokens} tokens left over"
        if self.slice_weights:
            order = MixedOrder(self.slices, self.slice_weights, seed=0)
            text += f"\nslices (times in an epoch): {order.describe(len(self))}"
        return text

    @property
    def tail_tokens(self) -> int:
        """Tokens that fill no whole sequence, at the end of all or of each slice, and are left out."""
        return self._first_tokens[-1] - len(self) * self.max_length

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the tokens to train on, wherever they lie and whatever `max_length` is."""
        shards = [shard["sha256"] for shard in self.manifest["shards"] if shard.get("split", TRAIN) == TRAIN]
        content = [self.manifest["dtype"], self.manifest["tokenizer_fingerprint"], shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def mark_documents(item: dict[str, torch.Tensor], bos: int, eos: int) -> dict[str, torch.Tensor]:
    """Adds `position_ids`, int64 [S], which restart at 0 at each BOS, whose label then does not count.

    BOS alone marks the documents, since TextEncoder writes none inside of one. Where a tokenizer has the same token for
    both, a document opens with the second of two.
    """
    ids = item["input_ids"]
    opens = ids == bos
    if bos == eos:
        opens[1:] &= opens[:-1].clone()
    opens[0] = True
    places = torch.arange(len(ids))
    starts = torch.where(opens, places, 0).cummax(0).values
    return {**item, "labels": item["labels"].masked_fill(opens, IGNORE_INDEX), "position_ids": places - starts}


class RandomDataset(Dataset):
    """Sequences of random tokens, for benchmarks: sequence i is a function of (seed, i). Items as in PackedDataset."""

    def __init__(self, num_sequences: int, max_length: int, vocab_size: int, seed: int):
        self.num_sequences, self.max_length, self.vocab_size, self.seed = num_sequences, max_length, vocab_size, seed

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(splitmix64(splitmix64(self.seed) ^ index) >> 1)
        ids = torch.randint(self.vocab_size, (self.max_length,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


ENDLESS = 2**62


class StreamedDataset(Dataset):
    """Sequences by their position in the order of the run, to be asked for in ascending positions.

    Items are those of PackedDataset, and `stream`, from which a later run goes on: the state of the stream where the
    buffer begins that the item is of, and that buffer's number.
    """

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder,
        max_length: int,
        seed: int,
        buffer: int,
        document_ends: tuple[int, int] | None = None,
        slice_weights: dict[str, float] | None = None,
    ):
        """Reads nothing yet.

        Args:
            buffer: sequences that are shuffled together; two such buffers are in memory.

        Raises:
            InputError: a weight's slice is not there, or the size of a file is not known.
        """
        self.source, self.encoder, self.max_length, self.seed = source, encoder, max_length, seed
        self.buffer, self.document_ends, self.slice_weights = buffer, document_ends, slice_weights
        names = sorted({file.slice for file in source.files})
        missing = sorted(set(slice_weights or {}) - set(names))
        if missing:
            raise InputError(
                f"--slice_weights: the data have no file of {', '.join(missing)}; they have {', '.join(names)}"
            )
        unknown = [file.path for file in source.files if not file.size]
        if unknown:
            raise InputError(f"--streaming: the size of {unknown[0]} is not known; prepare the data set instead")
        self.start: dict | None = None
        self._stream: TokenStream | None = None

    def check(self) -> None:
        """Reads a document of every slice. Raises InputError if there is none, or the file is damaged."""
        stream = TokenStream(self.source, self.encoder, self.max_length, self.seed, self.slice_weights)
        for reader in stream.readers.values():
            reader.next_text()

    def resume(self, stream: dict | None) -> None:
        """Goes on from what an item of an earlier run had as `stream`."""
        self.start = stream

    @property
    def mean_length(self) -> float:
        """Tokens in a sequence."""
        return self.max_length

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> dict:
        if self._stream is None:
            number, state = (self.start["buffer"], self.start["state"]) if self.start else (0, None)
            weights = self.slice_weights
            self._stream = TokenStream(self.source, self.encoder, self.max_length, self.seed, weights, state)
            self._sequences: dict[int, np.ndarray] = {}
            self._states: dict[int, dict] = {}
            self._read = number * self.buffer
        number, place = divmod(position, self.buffer)
        # The next buffer is read as this one is used up, so that no step waits for a whole buffer.
        self._read_until(self._stream, max((number + 1) * self.buffer, position + self.buffer), keep=number)
        index = number * self.buffer + Permutation(self.buffer, self.seed, number)[place]
        ids = torch.from_numpy(self._sequences[index].astype(np.int64))
        item = {"input_ids": ids, "labels": ids.clone()}
        if self.document_ends:
            item = mark_documents(item, *self.document_ends)
        return {**item, "stream": {"buffer": number, "state": self._states[number]}}

    def _read_until(self, stream: TokenStream, stop: int, keep: int) -> None:
        for number in [number for number in self._states if number < keep]:
            del self._states[number]
            for index in range(number * self.buffer, (number + 1) * self.buffer):
                self._sequences.pop(index, None)
        while self._read < stop:
            number, place = divmod(self._read, self.buffer)
            if place == 0:
                self._states[number] = stream.state
            sequence = stream.next_sequence()
            if number >= keep:
                self._sequences[self._read] = sequence
            self._read += 1

    @staticmethod
    def collate(items: list[dict]) -> dict:
        batch = default_collate([{name: item[name] for name in item if name != "stream"} for item in items])
        return {**batch, "stream": json.dumps(items[-1]["stream"])}

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Settings that sequences and their order depend on beside data, seed and length."""
        return {
            "slice_weights": self.slice_weights,
            "document_mask": self.document_ends is not None,
            "shuffle_buffer": self.buffer,
        }

    def order(self, seed: int) -> Sequence[int]:
        return range(ENDLESS)

    @property
    def description(self) -> str:
        files = self.source.files
        return (
            f"a stream of {len(files):,} files, {size_text(self.source.size)}, in sequences of {self.max_length} "
            f"tokens, shuffled among {self.buffer:,}"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of the names of the files, their content, and the tokenizer."""
        names = json.dumps([(file.path, file.slice) for file in self.source.files])
        return f"{xxhash.xxh3_64(names.encode()).hexdigest()} {self.source.fingerprint} {self.encoder.fingerprint}"

    def continues(self, fingerprint: str) -> bool:
        """Return True if a position in the stream of that fingerprint holds here too; files may have been corrected."""
        return fingerprint.split()[::2] == self.fingerprint.split()[::2]


class TrainingData(Protocol):
    """Interface of the data sets that a run trains on: packed, streamed, or examples."""

    @property
    def fingerprint(self) -> str:
        """Changes when the tokens do, wherever they lie."""
        ...

    @property
    def mean_length(self) -> float:
        """Tokens in a sequence, without padding."""
        ...

    @property
    def description(self) -> str:
        """For people, in a line or two."""
        ...

    @property
    def collate(self) -> Callable | None:
        """Makes a batch of items; None: torch's default does."""
        ...

    def order(self, seed: int) -> Order:
        """In which a run of this seed reads the sequences."""
        ...

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Return the settings that the order depends on beside data, seed and length; `saved`: the resumed run's."""
        ...

    def __len__(self) -> int: ...


PAD_MULTIPLE = 8  # lengths that tensor cores take well
WINDOW_GROUPS = 64


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
