"""Texts to token ids, as fast as is proven to give the tokenizer's own ids."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from transformers import (
    PreTrainedTokenizerBase,
)

from corpus.plain_text import FOUND_IN_TEXT, PlainText, equal_sentencepiece, neighbours, plain_spec
from corpus.tokenizer import vocabulary_size

PIECE_CHARACTERS, MAX_PIECE_CHARACTERS = 2**16, 2**20
FEW_CHARACTERS = 2**11
BLOCK_BYTES = 2**22  # in which equal parts are encoded once
PARTS_AT_ONCE = 64  # the longer a text is, the slower is SentencePiece
OPEN, CLOSE, LINE_END = SIGNS = b"\xfe\xff\n"  # the first two are in no UTF-8 text


class TextEncoder:
    """Turns documents into BOS + ids + EOS.

    The ids are the tokenizer's. A special token spelled out in a document, such as `</s>`, stays text; a token that was
    added and is not special is used. SentencePiece itself, which is faster, does it where `tokenizer_tables` proves
    that it gives the same ids.

    Byte-pair encoding joins no two bytes that no token of the vocabulary has side by side. So the documents are cut
    between all such bytes, and of the parts, which are words or less, those that are equal are encoded once; the ids
    stay what they are. This takes a model that falls back to bytes: others make one token of unknown characters in a
    row.

    SentencePiece and its lists need up to 70 bytes of memory a character. So where a part is very long, as a run of one
    letter can be, a document above PIECE_CHARACTERS is encoded in pieces, cut where no token could lie across the cut;
    only if there is no such place among MAX_PIECE_CHARACTERS, it is cut anyway.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._plain_text = PlainText(tokenizer)
        self.letters = self._plain_text.letters  # special tokens that every text may hold
        # SentencePiece puts a space before every text, some tokenizers not before one that begins with a space.
        self.sentencepiece, self.bare_leading_space = equal_sentencepiece(tokenizer, self._plain_text)

    def encode(self, documents: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """One array of `dtype` per document, [number of tokens]."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not self.can_cut or sum(map(len, documents)) < FEW_CHARACTERS:
            return [np.array([bos, *ids, eos], self.dtype) for ids in self._encode(documents, threads)]
        arrays = self._encode_by_parts(documents, threads)
        if arrays is None:
            arrays = []
            for document in documents:
                pieces = [np.array(ids, self.dtype) for ids in self._encode_in_pieces(document, threads)]
                arrays.append(np.concatenate([[bos], *pieces, [eos]], dtype=self.dtype, casting="unsafe"))
        return arrays

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands, without BOS and EOS."""
        return self._encode(texts)

    def _encode(self, documents: Sequence[str], threads: int = 1) -> list[list[int]]:
        if not self.sentencepiece:
            return self._plain_text.encode(documents)
        if not self.bare_leading_space:
            return self.sentencepiece.encode(list(documents), num_threads=threads)
        bare = [document.startswith((" ", "▁")) for document in documents]
        texts = ["\n" + document if bare_ else document for document, bare_ in zip(documents, bare, strict=True)]
        encoded = self.sentencepiece.encode(texts, num_threads=threads)
        return [ids[len(self._line_end) :] if bare_ else ids for ids, bare_ in zip(encoded, bare, strict=True)]

    def _encode_by_parts(self, documents: Sequence[str], threads: int) -> list[np.ndarray] | None:
        """Return what `encode` returns, or None if a part is longer than PIECE_CHARACTERS."""
        text = b"".join(map(self._framed, documents))
        arrays, stops, start = [np.empty(0, self.dtype)], [0], 0
        while start < len(text):
            block = np.frombuffer(SIGNS + text[start : start + BLOCK_BYTES], np.uint8)
            ends = np.flatnonzero(self._cuts[block[:-1].astype(np.uint16) << 8 | block[1:]]) + 1
            if start + BLOCK_BYTES >= len(text):
                ends = np.append(ends, len(block))
            if len(ends) == len(SIGNS) or np.diff(ends).max() > PIECE_CHARACTERS:
                return None
            ids, ends_of_ids = self._encode_block(block, ends, threads)
            arrays.append(ids)
            stops += (sum(map(len, arrays[:-1])) + ends_of_ids[block[ends[len(SIGNS) :] - 1] == CLOSE]).tolist()
            start += int(ends[-1]) - len(SIGNS)
        stream = np.concatenate(arrays)
        return [stream[start:stop] for start, stop in itertools.pairwise(stops)]

    def _framed(self, document: str) -> bytes:
        text = document.replace("▁", " ")  # which SentencePiece takes for the same
        bare = not text or (self.bare_leading_space and text.startswith(" "))
        prefix = "" if bare or not self._rules.normalizer_spec.add_dummy_prefix else " "
        return b"%c%b%c" % (OPEN, (prefix + text).encode(), CLOSE)

    def _encode_block(self, block: np.ndarray, ends: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the parts of a block, SIGNS before them left out, and where those of each part end."""
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        parts = pa.Array.from_buffers(pa.binary(), len(ends), buffers).dictionary_encode()
        distinct = self._encode_parts(parts.dictionary[len(SIGNS) :].to_pylist(), threads)
        chosen = distinct.take(parts.indices[len(SIGNS) :])
        _, offsets, data = chosen.buffers()
        ends_of_ids = np.frombuffer(offsets, np.int32, len(chosen) + 1)[1:] // self.dtype.itemsize
        return np.frombuffer(data, self.dtype, ends_of_ids[-1]), ends_of_ids

    def _encode_parts(self, parts: list[bytes], threads: int) -> pa.BinaryArray:
        """The ids of SIGNS and of these parts, each as bytes of `dtype`. A line end parts them for SentencePiece."""
        *prefix, line_end = self._line_end
        texts = [b"\n".join([b"", *parts[i : i + PARTS_AT_ONCE]]) for i in range(0, len(parts), PARTS_AT_ONCE)]
        encoded = self.sentencepiece.encode(texts, num_threads=threads)
        ids = np.fromiter(itertools.chain.from_iterable(some[len(prefix) :] for some in encoded), np.int64)
        starts = np.flatnonzero(ids == line_end)
        lengths = np.diff(starts, append=len(ids)) - 1
        signs = np.array([self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, line_end], self.dtype)
        values = np.concatenate([signs, ids[ids != line_end].astype(self.dtype)])
        offsets = np.cumsum(np.concatenate([[0], [1] * len(SIGNS), lengths])) * self.dtype.itemsize
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(values)]
        return pa.Array.from_buffers(pa.binary(), len(SIGNS) + len(parts), buffers)

    def _encode_in_pieces(self, document: str, threads: int) -> Iterator[list[int]]:
        """The ids of the pieces of a document. All but the first are encoded behind a line end, which is taken off."""
        start, prefix = 0, ""
        while start < len(document):
            stop = self._place_to_cut(document, start)
            (ids,) = self._encode([prefix + document[start:stop]], threads)
            yield ids[len(self._line_end) :] if prefix else ids
            start, prefix = stop, "\n"

    def _place_to_cut(self, document: str, start: int) -> int:
        """The first place from PIECE_CHARACTERS on that separates two characters which no token has side by side."""
        last = min(start + MAX_PIECE_CHARACTERS, len(document))
        for place in range(start + PIECE_CHARACTERS, last):
            if document[place - 1 : place + 1].replace(" ", "▁") not in self._neighbours:
                return place
        return last

    @cached_property
    def _line_end(self) -> list[int]:
        return self.sentencepiece.encode("\n")

    @cached_property
    def _neighbours(self) -> set[str]:
        """Every pair of characters that stand side by side in some token."""
        return neighbours(self._rules)

    @cached_property
    def _cuts(self) -> np.ndarray:
        """True where a text may be cut between two bytes, [65536]: before a character, if no token has both of them."""
        pieces = [piece.piece for piece in self._rules.pieces if piece.type in FOUND_IN_TEXT]
        joined = np.frombuffer("\n".join(pieces).replace("▁", " ").encode(), np.uint8)
        cuts = np.ones((256, 256), bool)
        cuts[joined[:-1], joined[1:]] = False
        cuts[:, 0x80:0xC0] = False
        cuts[LINE_END, :] = cuts[:, LINE_END] = True  # see `can_cut`
        return cuts.reshape(-1)

    @cached_property
    def _rules(self) -> ModelProto:
        return ModelProto.FromString(self.sentencepiece.serialized_model_proto())

    @cached_property
    def can_cut(self) -> bool:
        """Parts of a text can be encoded by themselves: it is encoded as it stands, and a line end by itself."""
        if not self.sentencepiece or not plain_spec(self._rules) or any("\n" in pair for pair in self._neighbours):
            return False
        rules = self._rules.trainer_spec
        return rules.model_type == TrainerSpec.BPE and rules.byte_fallback and not rules.treat_whitespace_as_suffix

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that the ids depend on, those of special tokens too."""
        frame = [
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            bool(self.sentencepiece),
            self.bare_leading_space,
        ]
        if self._plain_text.hidden and not self.sentencepiece:
            frame.append("special tokens are not made of text")
        if self.vocab_size > 2**16 >= len(self.tokenizer):
            frame.append(self.vocab_size)
        if self.sentencepiece and not self._plain_text.has_additions(self._rules):
            rules = self.sentencepiece.serialized_model_proto()
        else:
            rules = self._plain_text.state
        return hashlib.sha256(json.dumps(frame).encode() + rules).hexdigest()
