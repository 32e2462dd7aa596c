"""Turns texts into token ids: the tokenizer's own ids, by a faster way where it is proven to give the same."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from transformers import PreTrainedTokenizerBase

from corpus.plain_text import FOUND_IN_TEXT, PlainText, equal_sentencepiece, neighbours, plain_spec
from corpus.tokenizer import vocabulary_size

PIECE_CHARACTERS, MAX_PIECE_CHARACTERS = 2**16, 2**20
FEW_CHARACTERS = 2**11
BLOCK_BYTES = 2**22  # equal parts in a block are encoded once
PARTS_AT_ONCE = 64  # SentencePiece is slower on longer texts
OPEN, CLOSE, LINE_END = SIGNS = b"\xfe\xff\n"  # the first two never occur in UTF-8


class TextEncoder:
    """Turns documents into BOS + ids + EOS.

    The ids are the tokenizer's, except that a special token spelled out in a document, such as `</s>`, stays text.
    Added tokens that are not special are used. SentencePiece itself, which is faster, encodes the documents if
    `equal_sentencepiece` proves that it gives the same ids.

    Byte-pair encoding never joins two bytes that are adjacent in no token of the vocabulary. Cutting the documents
    between all such bytes therefore keeps the ids. The parts are words or shorter, and equal parts are encoded only
    once. This needs a model with byte fallback; without it, adjacent unknown characters become one token.

    SentencePiece needs up to 70 bytes of memory per character. If a part is very long, such as a run of one letter, a
    document above PIECE_CHARACTERS is encoded in pieces, cut at places that no token can span. If there is no such
    place within MAX_PIECE_CHARACTERS, the document is cut anyway.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._plain_text = PlainText(tokenizer)
        self.letters = self._plain_text.letters  # special tokens that text may contain
        # SentencePiece puts a space before every text; some tokenizers do not if the text begins with a space.
        self.sentencepiece, self.bare_leading_space = equal_sentencepiece(tokenizer, self._plain_text)

    def encode(self, documents: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return one array of `dtype` per document, [number of tokens], with BOS and EOS."""
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
        """Return the ids of each text, without BOS and EOS."""
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
        """Return the arrays of `encode`, or None if a part is longer than PIECE_CHARACTERS."""
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
        text = document.replace("▁", " ")  # the same character to SentencePiece
        bare = not text or (self.bare_leading_space and text.startswith(" "))
        prefix = "" if bare or not self._rules.normalizer_spec.add_dummy_prefix else " "
        return b"%c%b%c" % (OPEN, (prefix + text).encode(), CLOSE)

    def _encode_block(self, block: np.ndarray, ends: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a block without its leading SIGNS, and where the ids of each part end."""
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        parts = pa.Array.from_buffers(pa.binary(), len(ends), buffers).dictionary_encode()
        distinct = self._encode_parts(parts.dictionary[len(SIGNS) :].to_pylist(), threads)
        chosen = distinct.take(parts.indices[len(SIGNS) :])
        _, offsets, data = chosen.buffers()
        ends_of_ids = np.frombuffer(offsets, np.int32, len(chosen) + 1)[1:] // self.dtype.itemsize
        return np.frombuffer(data, self.dtype, ends_of_ids[-1]), ends_of_ids

    def _encode_parts(self, parts: list[bytes], threads: int) -> pa.BinaryArray:
        """Return the ids of SIGNS and of each part as bytes of `dtype`. Line ends separate parts for SentencePiece."""
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
        """Yield the ids of each piece of a document. Those after the first are encoded with a line end in front."""
        start, prefix = 0, ""
        while start < len(document):
            stop = self._place_to_cut(document, start)
            (ids,) = self._encode([prefix + document[start:stop]], threads)
            yield ids[len(self._line_end) :] if prefix else ids
            start, prefix = stop, "\n"

    def _place_to_cut(self, document: str, start: int) -> int:
        """Return the first place beyond PIECE_CHARACTERS between two characters that are adjacent in no token."""
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
        """All pairs of characters that are adjacent in some token."""
        return neighbours(self._rules)

    @cached_property
    def _cuts(self) -> np.ndarray:
        """True for two bytes that a text may be cut between, [65536]: no token has both; a character begins there."""
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
        """True if parts of a text can be encoded separately: no normalization, and line ends join no other token."""
        if not self.sentencepiece or not plain_spec(self._rules) or any("\n" in pair for pair in self._neighbours):
            return False
        rules = self._rules.trainer_spec
        return rules.model_type == TrainerSpec.BPE and rules.byte_fallback and not rules.treat_whitespace_as_suffix

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the ids depend on, special tokens included."""
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
