"""Reads a data set while training goes on, without preparing it first.

The documents of all slices make one stream of tokens, cut every S tokens: the next document is always of the slice that
has been read least, in proportion to its size or its weight. Each BUFFER of sequences is then put in a pseudo-random
order. So there is one global order, as of a prepared data set, whatever the number of ranks. The price is that every
data-parallel rank reads and tokenizes the whole stream, of which it keeps its share.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, default_collate

from console import InputError, size_text
from data_order import Permutation, splitmix64
from data_utils import mark_documents
from dataset_sources import Document, Source, SourceFile, unusable
from tokenization import TextEncoder

ENDLESS = 2**62


@dataclass
class SlicePosition:
    """Position in a slice: the next row of a file, the file by its place in the epoch's order.

    Attributes:
        bytes_read: of the slice in this epoch, up to that row.
        tokens: read from the slice since the beginning of the stream.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    bytes_read: int = 0
    tokens: int = 0


class SliceReader:
    """The usable documents of a slice without end, its files in another order in every epoch."""

    def __init__(self, files: list[SourceFile], weight: float | None, seed: int, position: SlicePosition):
        self.files, self.weight, self.seed = files, weight, seed
        self.size = sum(file.size for file in files)
        self.position = position
        self._start_epoch()
        self._file_start = sum(self._file(number).size for number in range(position.file))  # bytes, in the epoch

    @property
    def progress(self) -> float:
        """Progress in the slice relative to the others: the fraction of its bytes, or tokens divided by weight."""
        if self.weight:
            return self.position.tokens / self.weight
        return self.position.epoch + self.position.bytes_read / self.size

    def _start_epoch(self) -> None:
        self._order = Permutation(len(self.files), self.seed, self.position.epoch)
        self._documents: Iterator[Document] | None = None

    def _file(self, number: int) -> SourceFile:
        return self.files[self._order[number]]

    def next_text(self) -> str:
        """Raises InputError on damaged files, and if a whole epoch has no usable document."""
        position, start = self.position, self.position.epoch
        while position.epoch < start + 2:
            file = self._file(position.file)
            if self._documents is None:
                self._documents = file.documents(start_row=position.row)
            for document in self._documents:
                position.row += 1
                position.bytes_read = self._file_start + document.position
                if not unusable(document.text):
                    return document.text
            self._documents = None
            self._file_start += file.size
            position.file, position.row, position.bytes_read = position.file + 1, 0, self._file_start
            if position.file == len(self.files):
                position.epoch, position.file, position.bytes_read = position.epoch + 1, 0, 0
                self._file_start = 0
                self._start_epoch()
        raise InputError(
            f"--dataset: the slice {self.files[0].slice} has no usable document; give documents in the column 'text'"
        )


class TokenStream:
    """Sequences of S tokens from all slices. `state` says where the next one starts, and a new stream goes on there."""

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder,
        max_length: int,
        seed: int,
        weights: dict[str, float] | None = None,
        state: dict | None = None,
    ):
        self.encoder, self.max_length = encoder, max_length
        by_slice: dict[str, list[SourceFile]] = {}
        for file in source.files:
            if not weights or file.slice in weights:
                by_slice.setdefault(file.slice, []).append(file)
        state = state or {"slices": {}, "offset": 0}
        self.readers = {
            name: SliceReader(
                by_slice[name],
                weights[name] if weights else None,
                splitmix64(splitmix64(seed) ^ number),
                SlicePosition(**state["slices"].get(name, {})),
            )
            for number, name in enumerate(sorted(by_slice))
        }
        self._rest = np.empty(0, encoder.dtype)  # of the document that was read last
        self._before = self._positions()  # where that document was read
        self._length = 0  # of it
        if state["offset"]:
            self._read_document()
            self._rest = self._rest[state["offset"] :]

    def _positions(self) -> dict[str, dict]:
        return {name: dict(vars(reader.position)) for name, reader in self.readers.items()}

    @property
    def state(self) -> dict:
        """JSON: where each slice stood before the document that the next token is of, and that token's place in it."""
        if len(self._rest):
            return {"slices": self._before, "offset": self._length - len(self._rest)}
        return {"slices": self._positions(), "offset": 0}

    def _read_document(self) -> None:
        self._before = self._positions()
        reader = min(self.readers.values(), key=lambda reader: reader.progress)
        (self._rest,) = self.encoder.encode([reader.next_text()])
        self._length = len(self._rest)
        reader.position.tokens += self._length

    def next_sequence(self) -> np.ndarray:
        """[S], in the encoder's dtype."""
        pieces, missing = [], self.max_length
        while missing:
            if not len(self._rest):
                self._read_document()
            pieces.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(pieces[-1])
        return np.concatenate(pieces)


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
