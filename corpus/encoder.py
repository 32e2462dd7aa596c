"""Turns texts into token ids: the tokenizer's own ids, by a faster way where it is proven to give the same."""

import contextlib
import copy
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils import Trie

from corpus.tokenizer import unknown_id, vocabulary_size
from corpus.vocabulary import (
    FOUND_IN_TEXT,
    RESERVED,
    equal_sentencepiece,
    hide,
    letters,
    neighbours,
    plain_spec,
    special_tokens_of_text,
    tables_of,
)
from runtime.console import InputError, first_line

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
        self._plain_text = _PlainText(tokenizer)
        self.unknown = unknown_id(tokenizer, self._plain_text.tables)
        self.letters = self._plain_text.letters  # special tokens that text may contain
        # SentencePiece puts a space before every text; some tokenizers do not if the text begins with a space.
        self.sentencepiece, self.bare_leading_space = equal_sentencepiece(
            tokenizer, self._plain_text.tables, self._plain_text.hidden
        )

    def encode(self, documents: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return one array of `dtype` per document, [number of tokens], with BOS and EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not self.can_cut or sum(map(len, documents)) < FEW_CHARACTERS:
            return [np.array([bos, *ids, eos], self.dtype) for ids in self.tokenize(documents, threads)]
        arrays = self._encode_by_parts(documents, threads)
        if arrays is None:
            arrays = []
            for document in documents:
                pieces = [np.array(ids, self.dtype) for ids in self._encode_in_pieces(document, threads)]
                arrays.append(np.concatenate([[bos], *pieces, [eos]], dtype=self.dtype, casting="unsafe"))
        return arrays

    def tokenize(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS."""
        if not self.sentencepiece:
            return self._plain_text.encode(texts)
        if not self.bare_leading_space:
            return self.sentencepiece.encode(list(texts), num_threads=threads)
        bare = [text.startswith((" ", "▁")) for text in texts]
        led = ["\n" + text if bare_ else text for text, bare_ in zip(texts, bare, strict=True)]
        encoded = self.sentencepiece.encode(led, num_threads=threads)
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
            (ids,) = self.tokenize([prefix + document[start:stop]], threads)
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
        frame = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        frame += [bool(self.sentencepiece), self.bare_leading_space]
        if self._plain_text.hidden and not self.sentencepiece:
            frame.append("special tokens are not made of text")
        if self.vocab_size > 2**16 >= len(self.tokenizer):
            frame.append(self.vocab_size)
        if self.sentencepiece and not self._plain_text.has_additions(self._rules):
            rules = self.sentencepiece.serialized_model_proto()
        else:
            rules = self._plain_text.state
        return hashlib.sha256(json.dumps(frame).encode() + rules).hexdigest()


class _PlainText:
    """Encodes plain text: special tokens spelled out stay text, other added tokens are used.

    transformers' `split_special_tokens` is not enough. Slow tokenizers ignore it in batches, and the model of a fast
    one may have a special token in its vocabulary like any word; a text with such a token is encoded again with a model
    in which that word is renamed.

    Attributes:
        hidden: special tokens that the model itself makes from text, and their ids.
        letters: special tokens that text needs as characters, such as a `!` used for padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.tables: dict[str, Any] | None = None
        self.hidden: dict[str, int] = {}
        self.letters: set[str] = set()
        if not tokenizer.is_fast:
            self._slow = _without_special_tokens(tokenizer)
            return
        ids = tokenizer.get_vocab()
        self.tables = tables_of(tokenizer)
        self.letters = letters(self.tables)
        if framing := self.letters & {tokenizer.bos_token, tokenizer.eos_token}:
            raise InputError(
                f"--tokenizer: its BOS or EOS token is {framing.pop()!r}, which text cannot do without; set another in "
                "its tokenizer_config.json"
            )
        self.hidden = {token: ids[token] for token in special_tokens_of_text(self.tables) - self.letters}
        self._fast = _loaded(self.tables)
        self._hiding = self._fast if not self.hidden else _loaded(hide(self.tables, self.hidden))
        visible = {token["content"] for token in self.tables["added_tokens"]} - self.hidden.keys()
        if self._fast.get_vocab() != ids or any(self._hiding.token_to_id(token) != ids[token] for token in visible):
            raise InputError("--tokenizer: its added tokens get other ids once it is saved; number them without gaps")
        if doubtful := self._registered_twice():
            raise InputError(
                f"--tokenizer: {doubtful!r} is both a piece of its model and an added token with other settings, and "
                "copies of the tokenizer disagree about it; remove it from the added tokens"
            )
        self._unknown = self.hidden.get(str(tokenizer.unk_token))
        self._wrong = set(self.hidden.values()) - {self._unknown}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if not self.tokenizer.is_fast:
            return [self._slow.convert_tokens_to_ids(self._slow.tokenize(text)) for text in texts]
        with unknown_refused():
            encoded = [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
            for number, text in enumerate(texts if self.hidden else ()):
                if self._makes_special(text, encoded[number]):
                    encoded[number] = self._hiding.encode(text, add_special_tokens=False).ids
        return encoded

    def _registered_twice(self) -> str | None:
        """Return an added token that the tokenizer and its own copy split texts at differently, or None.

        transformers adds a token again if its settings are others than the model's. Both then count in this tokenizer,
        and in a copy the last.
        """
        tokens = [token["content"] for token in self.tables["added_tokens"] if not token["special"]]
        texts = [f"{token} {token}" for token in tokens]
        if not texts:
            return None
        with unknown_refused():
            own = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            copied = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        pairs = zip(tokens, own, copied, strict=True)
        return next((token for token, ids, encoding in pairs if ids != encoding.ids), None)

    def _makes_special(self, text: str, ids: list[int]) -> bool:
        """Return True if the ids have a hidden token. The unknown token counts only if the text spells it."""
        return not self._wrong.isdisjoint(ids) or (self._unknown in ids and str(self.tokenizer.unk_token) in text)

    @cached_property
    def state(self) -> bytes:
        """Everything that the ids depend on, special tokens included."""
        if self.tokenizer.is_fast:
            return json.dumps(self.tables, sort_keys=True).encode()
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return b"".join(path.name.encode() + path.read_bytes() for path in sorted(Path(folder).iterdir()))

    def has_additions(self, rules: ModelProto) -> bool:
        """Return True if there are added tokens besides the model's own special tokens."""
        for id_, token in self.tokenizer.added_tokens_decoder.items():
            own = id_ < len(rules.pieces) and rules.pieces[id_].type in RESERVED
            if not own or rules.pieces[id_].piece != token.content:
                return True
            if not token.special or token.lstrip or token.rstrip or token.single_word:
                return True
        return False


def _loaded(tables: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(tables))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_special_tokens(tokenizer: PreTrainedTokenizer) -> PreTrainedTokenizer:
    plain = copy.copy(tokenizer)
    plain.split_special_tokens = False  # True would split other added tokens too
    plain._added_tokens_decoder = {
        id_: token for id_, token in tokenizer.added_tokens_decoder.items() if not token.special
    }
    plain._added_tokens_encoder = {token.content: id_ for id_, token in plain._added_tokens_decoder.items()}
    plain.tokens_trie = Trie(plain._added_tokens_encoder)
    return plain


@contextlib.contextmanager
def unknown_refused() -> Iterator[None]:
    """Raise InputError if a fast tokenizer has no token for some text, not even an unknown token."""
    try:
        yield
    except Exception as error:  # tokenizers raises no other class
        raise InputError(
            f"--tokenizer: it has no token for some text ({first_line(error)}); set the unknown token of the model in "
            "its tokenizer.json"
        ) from error
