"""Every Dataset that a loop reads: packed and streamed text, examples of fine-tuning, random tokens.

`corpus/prepare.py` writes the folder that PackedDataset reads, `corpus/examples.py` that of InstructionDataset;
`corpus/order.py` has the orders in which a run reads the sequences. B is the batch size, S the sequence length:
`max_length`, or for examples the length of the longest in the batch, rounded up.
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
from torch.utils.data import Dataset, default_collate, get_worker_info

from corpus.encoder import TextEncoder
from corpus.manifest import HELD_OUT, MANIFEST_NAME, TRAIN, list_skipped, read_manifest
from corpus.order import (
    GlobalOrder,
    InterleavedOrder,
    Interleaving,
    LengthGroupedOrder,
    MixedOrder,
    Order,
    Permutation,
    splitmix64,
)
from corpus.sources import Source
from corpus.stream import TokenStream
from model_utils import IGNORE_INDEX
from runtime.console import InputError, RunError, size_text


class TrainingData(Protocol):
    """Interface of the data sets that a run trains on: text, mixtures of it, streams and examples."""

    @property
    def fingerprint(self) -> str:
        """Digest that changes with the tokens, and not with the folder that they are in."""

    @property
    def mean_length(self) -> float:
        """Mean number of tokens in a sequence, without padding."""

    @property
    def description(self) -> str:
        """One or two lines for people."""

    @property
    def collate(self) -> Callable | None:
        """Function that makes a batch of items; None stands for torch's default."""

    def order(self, seed: int) -> Order:
        """Return the order in which a run with this seed reads the sequences."""

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Return the settings, beside data, seed and length, that the order depends on; they go into checkpoints.

        Args:
            saved: the settings of the run that is resumed; empty for a new run.
        """

    def __len__(self) -> int: ...


def check_size(path: Path, expected: int) -> None:
    """Raise InputError unless the file has the expected number of bytes."""
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise InputError(
            f"--dataset: {path} has {found} bytes instead of {expected}; delete its folder to prepare it anew"
        )


class TextDataset(Dataset):
    """Sequences of S tokens of text, all of which the model learns.

    Items are {"input_ids": int64 [S], "labels": int64 [S]}, both the same ids: the model shifts the labels. With
    `document_ends`, the ids of BOS and EOS, `mark_documents` adds what keeps documents apart.
    """

    collate: Callable | None = None  # torch's default

    def __init__(self, max_length: int, document_ends: tuple[int, int] | None, slice_weights: dict[str, float] | None):
        self.max_length, self.document_ends, self.slice_weights = max_length, document_ends, slice_weights

    def item(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the item of a sequence's ids, [S]."""
        ids = torch.from_numpy(tokens.astype(np.int64))
        item = {"input_ids": ids, "labels": ids.clone()}
        return mark_documents(item, *self.document_ends) if self.document_ends else item

    @property
    def mean_length(self) -> float:
        """Number of tokens in a sequence."""
        return self.max_length

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Return the settings, beside data, seed and length, that the order depends on."""
        return {"slice_weights": self.slice_weights, "document_mask": self.document_ends is not None}


class PackedDataset(TextDataset):
    """A split of a prepared folder as sequences of S tokens: its shards, concatenated and cut every S tokens.

    With `slice_weights`, the shards of each slice are concatenated and cut separately, so each sequence comes from one
    slice; `order` then draws from the slices by weight.

    Attributes:
        slices: the sequences of each slice, by its name; without `slice_weights`, all under the name "".

    Raises:
        InputError: a shard is missing or has the wrong size, or there are fewer than S tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        max_length: int,
        document_ends: tuple[int, int] | None = None,
        *,
        split: str = TRAIN,
        slice_weights: dict[str, float] | None = None,
        name: str | None = None,
    ):
        """
        Args:
            name: of the data set in messages, as the user gave it; by default the folder.
        """
        super().__init__(max_length, document_ends, slice_weights)
        self.folder = Path(folder)
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
            check_size(self.folder / shard["file"], shard["tokens"] * self.dtype.itemsize)
        tokens = {name: sum(shard["tokens"] for shard in streams[name]) for name in sorted(streams)}
        self._first_tokens = list(itertools.accumulate(tokens.values(), initial=0))
        self._first_sequences = list(itertools.accumulate((n // max_length for n in tokens.values()), initial=0))
        self.slices = dict(zip(tokens, map(range, self._first_sequences, self._first_sequences[1:]), strict=True))
        if slice_weights:
            self.order(seed=0)  # checks the weights
        if len(self) == 0 and split == HELD_OUT:
            raise InputError(
                f"--eval_fraction: {self._first_tokens[-1]} tokens of {name or folder} are held out, and a sequence "
                f"takes {max_length}; give a larger fraction"
            )
        if len(self) == 0:
            share = self.manifest.get("eval_fraction")
            held_out = f" beside the {share:g} of it that --eval_fraction holds out" if share else ""
            raise InputError(
                f"--max_length: one sequence takes {max_length} tokens, but the whole data set has "
                f"{self._first_tokens[-1]}{held_out} ({name or folder}); lower --max_length or give more data"
            )

    def __len__(self) -> int:
        return self._first_sequences[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        stream = bisect_right(self._first_sequences, index) - 1
        start = self._first_tokens[stream] + (index - self._first_sequences[stream]) * self.max_length
        return self.item(self._tokens(start, start + self.max_length))

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
        return ids

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

    def order(self, seed: int) -> Order:
        """Return the order in which a run with this seed reads the sequences."""
        if self.slice_weights:
            return MixedOrder(self.slices, self.slice_weights, seed)
        return GlobalOrder(len(self), seed)

    @property
    def description(self) -> str:
        """One or two lines for people."""
        text = f"{len(self):,} sequences of {self.max_length} tokens; {self.tail_tokens} tokens left over"
        if self.slice_weights:
            order = MixedOrder(self.slices, self.slice_weights, seed=0)
            text += f"\nslices (times in an epoch): {order.describe(len(self))}"
        return text

    @property
    def tail_tokens(self) -> int:
        """Number of tokens left out because they fill no whole sequence, at the end of the data or of each slice."""
        return self._first_tokens[-1] - len(self) * self.max_length

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the tokens to train on; the folder and `max_length` have no influence."""
        shards = [shard["sha256"] for shard in self.manifest["shards"] if shard.get("split", TRAIN) == TRAIN]
        content = [self.manifest["dtype"], self.manifest["tokenizer_fingerprint"], shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class MixtureDataset(Dataset):
    """Several PackedDatasets, of which the order draws evenly by weight; each keeps a position of its own.

    Attributes:
        state: what a checkpoint keeps of the mixture, from `settle`.
    """

    collate: Callable | None = None  # torch's default

    def __init__(self, parts: dict[str, PackedDataset], weights: dict[str, float], alone: str | None = None):
        """
        Args:
            parts: by name, all of one sequence length.
            weights: by the same names.
            alone: as in InterleavedOrder.
        """
        self.parts, self.weights, self.alone = {name: parts[name] for name in sorted(parts)}, weights, alone
        self._firsts = list(itertools.accumulate(map(len, self.parts.values()), initial=0))
        self.state = self.settle(None, 0)

    def settle(self, saved: dict | None, position: int) -> dict:
        """Set and return the state: where this mixture began, and how often each data set was drawn from before.

        The state also knows data sets that are no longer in the mixture. Its `lengths` are an epoch's sequences by data
        set, its `max_lengths` their tokens, `unread` the parts of epochs that were counted without being read.

        Args:
            saved: the state in the checkpoint at `position`. If its mixture was another, this one begins there, and
                each data set continues where it was, if its content is the same. If its sequences had another length it
                begins the next epoch, since those that it has read lie scattered over this one.
        """
        own: dict[str, dict] = {
            "fingerprints": {name: part.fingerprint for name, part in self.parts.items()},
            "lengths": {name: len(part) for name, part in self.parts.items()},
            "max_lengths": {name: part.max_length for name, part in self.parts.items()},
        }
        saved = saved or {"weights": self.weights, "start": position, "before": {}}
        known = {key: values | saved.get(key, {}) for key, values in own.items()}
        other = [name for name in self.parts if known["fingerprints"][name] != own["fingerprints"][name]]
        cut_anew = [name for name in self.parts if known["max_lengths"][name] != own["max_lengths"][name]]
        if other or cut_anew or saved["weights"] != self.weights:
            before = draws_of(saved, position) | dict.fromkeys(other, 0)
            unread = {name: part for name, part in saved.get("unread", {}).items() if name not in other}
            for name in cut_anew:
                length, drawn = known["lengths"][name], before.get(name, 0)
                before[name] = -(-drawn // length) * own["lengths"][name]
                unread[name] = unread.get(name, 0) + -drawn % length / length
            saved = {"weights": self.weights, "start": position, "before": before, "unread": unread}
        self.state = saved | {key: known[key] | values for key, values in own.items()}
        return self.state

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = bisect_right(self._firsts, index) - 1
        return list(self.parts.values())[number][index - self._firsts[number]]

    def order(self, seed: int) -> Order:
        """Return the order in which a run with this seed reads the sequences."""
        ranges = map(range, self._firsts, self._firsts[1:])
        sequences = dict(zip(self.parts, ranges, strict=True))
        return InterleavedOrder(sequences, interleaving_of(self.state), seed, self.alone)

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Return the settings, beside data, seed and length, that the order depends on."""
        (masked,) = {part.document_ends is not None for part in self.parts.values()}
        return {"mixture": self.weights, "document_mask": masked}

    @property
    def mean_length(self) -> float:
        """Number of tokens in a sequence."""
        return next(iter(self.parts.values())).max_length

    def epochs(self, position: int) -> str:
        """Return how many epochs of each data set are read before a position, for people."""
        return ", ".join(f"{name} {epochs:.2f}" for name, epochs in sorted(epochs_of(self.state, position).items()))

    @property
    def description(self) -> str:
        """One line for each data set and one for all."""
        parts = [f"{name}: {self.weights[name]:.2%} of {part.description}" for name, part in self.parts.items()]
        return "\n".join([f"a mixture of {len(self.parts)}, {len(self):,} sequences in all", *parts])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the tokens of any data set and with their names, not with the weights."""
        content = [(name, part.fingerprint) for name, part in self.parts.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def interleaving_of(state: dict) -> Interleaving:
    """Return the interleaving of a mixture, from what a checkpoint keeps of it."""
    return Interleaving(state["weights"], state["start"], state["before"])


def draws_of(state: dict, position: int) -> dict[str, int]:
    """Return how often each data set was drawn from before a position, also those that the mixture has no longer."""
    return state["before"] | interleaving_of(state).draws(position)


def epochs_of(state: dict, position: int) -> dict[str, float]:
    """Return how many epochs are read of each data set before a position; of older checkpoints perhaps not all."""
    draws, unread, lengths = draws_of(state, position), state.get("unread", {}), state.get("lengths", {})
    return {name: draws.get(name, 0) / length - unread.get(name, 0) for name, length in lengths.items()}


def mark_documents(item: dict[str, torch.Tensor], bos: int, eos: int) -> dict[str, torch.Tensor]:
    """Return the item with `position_ids`, int64 [S], that restart at 0 at each BOS, and that BOS ignored as a label.

    BOS is enough to find documents, since TextEncoder writes none inside one. If BOS and EOS are the same token, a
    document opens with the second of two.
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
    """Sequences of random tokens for benchmarks; sequence i is a function of (seed, i). Items as in TextDataset."""

    def __init__(self, num_sequences: int, max_length: int, vocab_size: int, seed: int):
        self.num_sequences, self.max_length, self.vocab_size, self.seed = num_sequences, max_length, vocab_size, seed

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(splitmix64(splitmix64(self.seed) ^ index) >> 1)
        ids = torch.randint(self.vocab_size, (self.max_length,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


ENDLESS = 2**62


class StreamedDataset(TextDataset):
    """Sequences read from the source's files while training runs.

    The index is the position in the run's order; read positions in ascending order. Items also have `stream`, from
    which a later run continues: the number of the item's buffer, and the state of the stream at its start.
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
        """Check the arguments; reads no file.

        Args:
            buffer: number of sequences that are shuffled together; two such buffers are in memory.

        Raises:
            InputError: a slice with a weight is missing, or the size of a file is unknown.
        """
        super().__init__(max_length, document_ends, slice_weights)
        self.source, self.encoder, self.seed, self.buffer = source, encoder, seed, buffer
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
        self._buffers: dict[int, tuple[dict, list[np.ndarray]]] = {}  # by number: the stream's state before it

    def check(self) -> None:
        """Read a document of every slice. Raises InputError if a slice has none or its file is damaged."""
        for reader in self._open(None, report=False).readers.values():  # these rows are read again
            reader.next_text()

    def resume(self, stream: dict | None) -> None:
        """Continue from the `stream` of an item of an earlier run."""
        self.start = stream

    def _open(self, state: dict | None, report: bool) -> TokenStream:
        return TokenStream(self.source, self.encoder, self.max_length, self.seed, self.slice_weights, state, report)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> dict:
        if self._stream is None:  # in the process that reads
            start = self.start or {"buffer": 0, "state": None}
            worker = get_worker_info()  # of several, each reads all
            stream = self._open(start["state"], report=worker is None or worker.id == 0)
            self._read, self._stream = start["buffer"] * self.buffer, stream
        number, place = divmod(position, self.buffer)
        # Reads the next buffer bit by bit while this one is used, so that no step waits for a whole buffer.
        self._read_until(self._stream, max((number + 1) * self.buffer, position + self.buffer), keep=number)
        state, sequences = self._buffers[number]
        item = self.item(sequences[Permutation(self.buffer, self.seed, number)[place]])
        return {**item, "stream": {"buffer": number, "state": state}}

    def _read_until(self, stream: TokenStream, stop: int, keep: int) -> None:
        while self._read < stop:
            number, place = divmod(self._read, self.buffer)
            if place == 0:
                self._buffers = {kept: buffer for kept, buffer in self._buffers.items() if kept >= keep}
                self._buffers[number] = (stream.state, [])
            self._buffers[number][1].append(stream.next_sequence())
            self._read += 1

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Return the items as a batch, with the `stream` of the last one as JSON."""
        batch = default_collate([{name: item[name] for name in item if name != "stream"} for item in items])
        return {**batch, "stream": json.dumps(items[-1]["stream"])}

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Return the settings, beside data, seed and length, that the order depends on."""
        return {**super().fix_order(saved, global_batch), "shuffle_buffer": self.buffer}

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
        """Digests of the files' names, of their content, and of the tokenizer."""
        names = json.dumps([(file.path, file.slice) for file in self.source.files])
        return f"{xxhash.xxh3_64(names.encode()).hexdigest()} {self.source.fingerprint} {self.encoder.fingerprint}"

    def continues(self, fingerprint: str) -> bool:
        """Return True if a position in the stream with that fingerprint is valid here; file contents may differ."""
        return fingerprint.split()[::2] == self.fingerprint.split()[::2]


PAD_MULTIPLE = 8  # lengths that suit tensor cores


class InstructionDataset(Dataset):
    """The examples in a folder of `prepare_examples`, or packs of them.

    Items are {"input_ids": int64 [length], "labels": int64 [length]}; a pack also has `position_ids`, which restart at
    0 with each example.

    Args:
        packed: each item is a pack of examples.
        multiple: pad batches to a multiple of this and of PAD_MULTIPLE.

    Raises:
        InputError: a file of the folder is missing or has the wrong size.
    """

    def __init__(self, folder: Path, packed: bool = False, multiple: int = 1):
        self.folder, self.packed = Path(folder), packed
        self.multiple = int(np.lcm(PAD_MULTIPLE, multiple))
        self.group_size = 1
        self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        self._tokens = self._mapped("tokens.bin", np.dtype(self.manifest["dtype"]).newbyteorder("<"))
        self._labels = self._mapped("labels.bin", np.bool_)
        self._ends = self._mapped("ends.bin", "<i8")
        self._members = self._mapped("packs.bin", "<i8")
        self._pack_ends = self._mapped("pack_ends.bin", "<i8")

    def _mapped(self, name: str, dtype: npt.DTypeLike) -> np.memmap:
        check_size(self.folder / name, self.manifest["files"][name]["bytes"])
        return np.memmap(self.folder / name, dtype, mode="r")

    def __reduce__(self) -> tuple:  # a pickled memmap would hold the file's content
        return InstructionDataset, (self.folder, self.packed, self.multiple), {"group_size": self.group_size}

    def __len__(self) -> int:
        return len(self._pack_ends if self.packed else self._ends)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        if not self.packed:
            return self._example(index)
        examples = [self._example(number) for number in self._members[_span(self._pack_ends, index)]]
        item = {name: torch.cat([example[name] for example in examples]) for name in ("input_ids", "labels")}
        item["position_ids"] = torch.cat([torch.arange(len(example["labels"])) for example in examples])
        return item

    def _example(self, number: int) -> dict[str, torch.Tensor]:
        span = _span(self._ends, number)
        ids = torch.from_numpy(self._tokens[span].astype(np.int64))
        learned = torch.from_numpy(self._labels[span].copy())
        return {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORE_INDEX)}

    def fix_order(self, saved: dict, global_batch: int) -> dict:
        """Set the group size of LengthGroupedOrder: the global batch at the start of the run. Return it to be saved.

        Args:
            saved: the settings of the run that is resumed; empty for a new run.
        """
        self.group_size = saved.get("length_group", global_batch)
        return {"length_group": self.group_size}

    def order(self, seed: int) -> Order:
        """Return the order in which a run with this seed reads the items."""
        if self.packed:
            return GlobalOrder(len(self), seed)
        return LengthGroupedOrder(self._ends, seed, self.group_size)

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad on the right, where causal attention never looks, to the longest length, rounded up to `multiple`.

        Returns:
            `input_ids`, `labels` and, for packs, `position_ids`, [B, S]; `token_count`, [1], without padding.
        """
        lengths = [len(item["input_ids"]) for item in items]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        batch = {"token_count": torch.tensor([sum(lengths)])}
        for name, filler in (("input_ids", 0), ("labels", IGNORE_INDEX)):
            rows = [*(item[name] for item in items), torch.empty(longest, dtype=torch.int64)]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=filler)[:-1]
        if self.packed:  # the padding counts as one more example
            rows = [torch.cat([item["position_ids"], torch.arange(longest - len(item["labels"]))]) for item in items]
            batch["position_ids"] = torch.stack(rows)
        return batch

    @property
    def longest(self) -> int:
        """Length of a batch with the longest example."""
        return -(-self.manifest["longest"] // self.multiple) * self.multiple

    @property
    def mean_length(self) -> float:
        """Mean number of tokens in an item, without padding."""
        return self.manifest["tokens"] / len(self)

    @property
    def description(self) -> str:
        manifest = self.manifest
        packs = f" in {len(self):,} packs" if self.packed else ""
        return (
            f"{manifest['examples']:,} examples{packs} of {self.mean_length:.1f} tokens on average, the longest of "
            f"{manifest['longest']:,}; {manifest['cut']:,} cut off; skipped rows: {list_skipped(manifest['skipped'])}"
            + (f"; not used: {', '.join(unused)}" if (unused := manifest.get("unused")) else "")
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with tokens, labels and packing."""
        content = [self.manifest["dtype"], self.manifest["encoder_fingerprint"], self.manifest["files"], self.packed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _span(ends: np.ndarray, index: int) -> slice:
    """Return the range of run `index`, where run i ends at ends[i]."""
    return slice(ends[index - 1] if index else 0, ends[index])
