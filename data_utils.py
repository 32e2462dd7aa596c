"""Data sets of packed sequences: of a prepared folder, or of random tokens for benchmarks.

`dataset_preparation.py` writes the folder of tokens that `PackedDataset` reads; `data_order.py` has the order of the
sequences. S is the sequence length, `max_length`.
"""

import hashlib
import itertools
import json
import operator
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from console import InputError, RunError
from data_order import GlobalOrder, MixedOrder, Order, splitmix64
from files import is_plain_name

IGNORE_INDEX = -100
TRAIN, HELD_OUT = "train", "held_out"  # the splits of a prepared folder
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2


def is_held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to the held-out `fraction`, which its text alone decides."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def read_manifest(folder: Path, flag: str = "--dataset") -> dict:
    """The manifest of a prepared folder. Raises InputError if it is missing, damaged or of another format version."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _ = [Path(shard["file"]) / shard["sha256"] / shard["slice"] for shard in manifest["shards"]]
            if not all(is_plain_name(shard["file"]) for shard in manifest["shards"]):
                raise ValueError("a shard outside the folder")
            _ = np.dtype(manifest["dtype"]), manifest["tokenizer_fingerprint"], float(manifest["eval_fraction"])
            tokens = [operator.index(shard["tokens"]) for shard in manifest["shards"]]
            if min(*tokens, operator.index(manifest["vocab_size"])) <= 0 or sum(tokens) != manifest["total_tokens"]:
                raise ValueError("counts that cannot be")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{flag}: {folder / MANIFEST_NAME} cannot be read ({error!r}); delete the folder to prepare it anew"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{flag}: {folder} has format version {version}, this program reads {FORMAT_VERSION}; prepare it anew"
        )
    return manifest


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
