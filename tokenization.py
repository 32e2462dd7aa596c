"""Tokenizers: loaded from a folder or the hub, and what turns documents into ids."""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import hub
from console import InputError, first_line

LLAMA_TOKENIZER = "hf-internal-testing/llama-tokenizer"
PIECE_CHARACTERS, MAX_PIECE_CHARACTERS = 2**16, 2**20
FEW_CHARACTERS = 2**11
BLOCK_BYTES = 2**22  # in which equal parts are encoded once
PARTS_AT_ONCE = 64  # the longer a text is, the slower is SentencePiece
OPEN, CLOSE, LINE_END = SIGNS = b"\xfe\xff\n"  # the first two are in no UTF-8 text
Piece = ModelProto.SentencePiece
FOUND_IN_TEXT = (Piece.NORMAL, Piece.USER_DEFINED, Piece.UNUSED)
PROBE = (
    "It's 1,234.5 km  to the\tcafé:\r\n\n    def f(x): return x**2  # naïve\n日本語 😀 \u202e\xa0end ",
    "  two spaces first",
    "\x00\n<0x0A> ▁",
)


def add_tokenizer_arg(parser: argparse._ActionsContainer) -> None:
    """The flag of the tokenizer, where a model's own is not at hand."""
    parser.add_argument("--tokenizer", default=LLAMA_TOKENIZER, help=f"hub name or folder (default: {LLAMA_TOKENIZER})")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder (`tokenizer.model` alone is enough) or from the Hugging Face hub.

    Raises InputError if there is none, or if it lacks a BOS or EOS token.
    """
    if not name_or_path.strip():
        raise InputError("--tokenizer: it is empty; give a folder or a hub name, or leave the flag out")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise InputError(f"--tokenizer: {name_or_path} is a file; give the folder that holds it")
    if not path.exists() and (path.is_absolute() or name_or_path.startswith((".", "~"))):
        raise InputError(f"--tokenizer: {name_or_path} does not exist; give a folder with a tokenizer or a hub name")
    if path.is_dir():
        hub.refuse_pointers(sorted(path.glob("tokenizer*")), "--tokenizer")
    else:
        hub.check_name(name_or_path, "--tokenizer", "a folder with a tokenizer")
    try:
        tokenizer = _from_folder(path) if path.is_dir() else _from_hub(name_or_path)
        if not tokenizer:  # what transformers returns for a damaged tokenizer.model
            raise ValueError("damaged tokenizer.model")
    except InputError:
        raise
    # tokenizers raises bare Exception on a damaged file.
    except Exception as error:
        raise InputError(
            f"--tokenizer: cannot load {name_or_path} ({first_line(error)}); "
            "give a folder that holds tokenizer.model or tokenizer.json with tokenizer_config.json"
        ) from error
    missing = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise InputError(f"--tokenizer: {name_or_path} has no {' and no '.join(missing)}; set it in its configuration")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Refuses a tokenizer that has tokens the model does not know."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--tokenizer: its vocabulary of {len(tokenizer)} is larger than the model's of {config.vocab_size}"
        )


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    fast, settings = (folder / "tokenizer.json").is_file(), folder / "tokenizer_config.json"
    if fast or settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        # transformers 5 names the class anew that reads nothing but tokenizer.json, and has a list of further tokens.
        loader = PreTrainedTokenizerFast if content.get("tokenizer_class") == "TokenizersBackend" else AutoTokenizer
        options: dict[str, Any] = {"use_fast": fast, "trust_remote_code": False}
        if isinstance(extra := content.get("extra_special_tokens"), list):
            options |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
        return loader.from_pretrained(folder, **options)
    if (folder / "tokenizer.model").is_file():
        return LlamaTokenizer.from_pretrained(folder, legacy=False)
    raise InputError(f"--tokenizer: {folder} holds neither tokenizer.model nor tokenizer.json; give a folder with one")


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    name, revision = hub.split_revision(name)
    choice = {"revision": revision or "main", "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, **choice)
    except (OSError, ValueError):
        hub.check_cache(name, "--tokenizer")
        _check_hub_has(name, revision)
        return AutoTokenizer.from_pretrained(name, **choice)


def _check_hub_has(name: str, revision: str | None) -> None:
    """Fails at once where from_pretrained would go on retrying for most of a minute."""
    try:
        HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        raise InputError(
            f"--tokenizer: {name} is no folder, and the hub refuses it ({hub.status_of(error)}); check the name"
        ) from error
    except OSError as error:
        raise InputError(
            f"--tokenizer: {name} is no folder, is not in the hub's cache on this machine, and the hub cannot be "
            "reached; give a folder that holds tokenizer.model"
        ) from error


class TextEncoder:
    """Turns documents into BOS + ids + EOS.

    Uses SentencePiece itself, which is faster, where the tokenizer is based on a model that gives the same ids.
    A special token spelled out in a document, such as `</s>`, stays text.

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
        self.vocab_size = len(tokenizer)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self.sentencepiece = self._load_sentencepiece()
        self.bare_leading_space = False  # SentencePiece puts a space before every text, some tokenizers not before one
        if self.sentencepiece and self._encode(PROBE) != self._encode_with_tokenizer(PROBE):
            self.bare_leading_space = self._is_plain
            if self._encode(PROBE) != self._encode_with_tokenizer(PROBE):
                self.sentencepiece, self.bare_leading_space = None, False

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
            return self._encode_with_tokenizer(documents) if documents else []
        if not self.bare_leading_space:
            return self.sentencepiece.encode(list(documents), num_threads=threads)
        bare = [document.startswith((" ", "▁")) for document in documents]
        texts = ["\n" + document if bare_ else document for document, bare_ in zip(documents, bare, strict=True)]
        encoded = self.sentencepiece.encode(texts, num_threads=threads)
        return [ids[len(self._line_end) :] if bare_ else ids for ids, bare_ in zip(encoded, bare, strict=True)]

    def _encode_by_parts(self, documents: Sequence[str], threads: int) -> list[np.ndarray] | None:
        """What `encode` returns, or None if a part is longer than PIECE_CHARACTERS."""
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
        pieces = map(self.sentencepiece.id_to_piece, range(len(self.sentencepiece)))
        return {pair for piece in pieces for pair in map("".join, itertools.pairwise(piece))}

    @cached_property
    def _cuts(self) -> np.ndarray:
        """Whether a text may be cut between two bytes, [65536]: before a character, where no token has both of them."""
        pieces = [piece.piece for piece in self._rules.pieces if piece.type in FOUND_IN_TEXT]
        joined = np.frombuffer("\n".join(pieces).replace("▁", " ").encode(), np.uint8)
        cuts = np.ones((256, 256), bool)
        cuts[joined[:-1], joined[1:]] = False
        cuts[:, 0x80:0xC0] = False
        cuts[LINE_END, :] = cuts[:, LINE_END] = True  # see `_is_plain`
        return cuts.reshape(-1)

    @cached_property
    def _rules(self) -> ModelProto:
        return ModelProto.FromString(self.sentencepiece.serialized_model_proto())

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the text is encoded as it stands, but for a space that is put before it, and a line end by itself."""
        if not self.sentencepiece:
            return False
        rules = self._rules.normalizer_spec
        plain = not rules.precompiled_charsmap and not rules.remove_extra_whitespaces and rules.escape_whitespaces
        return plain and not any("\n" in pair for pair in self._neighbours)

    @cached_property
    def can_cut(self) -> bool:
        """Whether the parts of a text can be encoded by themselves."""
        if not self._is_plain:
            return False
        rules = self._rules.trainer_spec
        return rules.model_type == TrainerSpec.BPE and rules.byte_fallback and not rules.treat_whitespace_as_suffix

    def _encode_with_tokenizer(self, documents: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(list(documents), **options)["input_ids"]

    def _load_sentencepiece(self) -> SentencePieceProcessor | None:
        vocab_file = getattr(self.tokenizer, "vocab_file", None)
        if not vocab_file:
            return None
        try:
            return SentencePieceProcessor(model_file=vocab_file)
        except (OSError, RuntimeError):
            return None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that the ids depend on."""
        if self.sentencepiece:
            rules = self.sentencepiece.serialized_model_proto()
        elif self.tokenizer.is_fast:
            state = json.loads(self.tokenizer.backend_tokenizer.to_str())
            rules = json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True).encode()
        else:
            rules = json.dumps([type(self.tokenizer).__name__, self.tokenizer.get_vocab()], sort_keys=True).encode()
        frame = [
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            bool(self.sentencepiece),
            self.bare_leading_space,
        ]
        return hashlib.sha256(json.dumps(frame).encode() + rules).hexdigest()
