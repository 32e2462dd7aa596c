"""Reads a data set during training, without preparing it first.

The documents of all slices make one stream of tokens, cut every S tokens. The next document always comes from the slice
that has been read least in proportion to its size or weight. `data_utils.StreamedDataset` then shuffles each buffer of
sequences. So there is one global order for any number of ranks, as with a prepared data set. The price is that every
data-parallel rank reads and tokenizes the whole stream and keeps only its share.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from corpus.encoder import TextEncoder
from corpus.manifest import list_skipped
from corpus.order import Permutation, splitmix64
from corpus.rows import Document, read_documents, unusable
from corpus.sources import Source, SourceFile
from runtime.console import InputError, say


@dataclass
class SlicePosition:
    """Position in a slice: the next row to read, and its file's place in the epoch's order.

    Attributes:
        bytes_read: bytes of the slice before that row, in this epoch.
        tokens: tokens read from the slice since the beginning of the stream.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    bytes_read: int = 0
    tokens: int = 0


class SliceReader:
    """Reads the usable documents of a slice endlessly, the files in a new order every epoch.

    Attributes:
        skipped: the rows that this reader has skipped, by reason.
    """

    def __init__(
        self, files: list[SourceFile], weight: float | None, seed: int, position: SlicePosition, report: bool = True
    ):
        """
        Args:
            report: print a line about skipped rows, now and then.
        """
        self.files, self.weight, self.seed, self.report = files, weight, seed, report
        self.skipped: Counter[str] = Counter()
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
        """Return the next usable document. Raises InputError on a damaged file, or if an epoch has no usable one."""
        position, start = self.position, self.position.epoch
        while position.epoch < start + 2:
            file = self._file(position.file)
            if self._documents is None:
                self._documents = read_documents(file.fetch(), file.slice, start_row=position.row)
            for document in self._documents:
                position.row += 1
                position.bytes_read = self._file_start + document.position
                if not (reason := unusable(document.text)):
                    return document.text
                self._count_skipped(reason, file)
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

    def _count_skipped(self, reason: str, file: SourceFile) -> None:
        self.skipped[reason] += 1
        total = self.skipped.total()
        if self.report and (self.skipped[reason] == 1 or total == 10 ** (len(str(total)) - 1)):
            say(
                f"slice {file.slice}: skipped rows so far: {list_skipped(self.skipped)}; "
                f"the last is row {self.position.row} of {file.path}"
            )


class TokenStream:
    """Cuts the documents of all slices into sequences of S tokens.

    Args:
        weights: relative weights of the slices to read; default: all slices, by size.
        state: the `state` of an earlier stream, which this one continues.
        report: print lines about skipped rows.
    """

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder,
        max_length: int,
        seed: int,
        weights: dict[str, float] | None = None,
        state: dict | None = None,
        report: bool = True,
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
                report,
            )
            for number, name in enumerate(sorted(by_slice))
        }
        self._rest = np.empty(0, encoder.dtype)  # of the last document
        self._before = self._positions()  # where it begins
        self._length = 0  # its tokens
        if state["offset"]:
            self._read_document()
            self._rest = self._rest[state["offset"] :]

    def _positions(self) -> dict[str, dict]:
        return {name: dict(vars(reader.position)) for name, reader in self.readers.items()}

    @property
    def state(self) -> dict:
        """Position of the next token, for JSON: each slice's position before its document, and its place in that."""
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
        """Return the ids of the next sequence, [S], in the encoder's dtype."""
        pieces, missing = [], self.max_length
        while missing:
            if not len(self._rest):
                self._read_document()
            pieces.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(pieces[-1])
        return np.concatenate(pieces)
