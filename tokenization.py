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
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import hub
from console import InputError, first_line
from tokenizer_tables import FOUND_IN_TEXT, PlainText, equal_sentencepiece, neighbours, plain_spec, tables_of

LLAMA_TOKENIZER = "hf-internal-testing/llama-tokenizer"
FRAME = ("bos_token", "eos_token")
PIECE_CHARACTERS, MAX_PIECE_CHARACTERS = 2**16, 2**20
FEW_CHARACTERS = 2**11
BLOCK_BYTES = 2**22  # in which equal parts are encoded once
PARTS_AT_ONCE = 64  # the longer a text is, the slower is SentencePiece
OPEN, CLOSE, LINE_END = SIGNS = b"\xfe\xff\n"  # the first two are in no UTF-8 text


def add_tokenizer_arg(parser: argparse._ActionsContainer) -> None:
    """The flag of the tokenizer, where a model's own is not at hand."""
    parser.add_argument("--tokenizer", default=LLAMA_TOKENIZER, help=f"hub name or folder (default: {LLAMA_TOKENIZER})")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or from the Hugging Face hub, as AutoTokenizer does.

    `tokenizer.model` alone is enough: it is read as AutoTokenizer reads it beside the config.json of a LLaMA model.
    Raises InputError if there is none, if it lacks a BOS or EOS token of its own, or if its ids are random.
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
        if path.is_dir() and (problem := _problem_of_settings(path)):
            raise InputError(f"--tokenizer: {problem}") from error
        raise InputError(
            f"--tokenizer: cannot load {name_or_path} ({first_line(error)}); "
            "give a folder that holds tokenizer.model or tokenizer.json with tokenizer_config.json"
        ) from error
    _check(tokenizer, name_or_path)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    missing = [kind for kind in FRAME if not getattr(tokenizer, kind)]
    if missing:
        raise InputError(f"--tokenizer: {name} has no {' and no '.join(missing)}; set it in its tokenizer_config.json")
    ids, unknown = tokenizer.get_vocab(), _unknown_id(tokenizer)
    for kind in FRAME:
        token = getattr(tokenizer, kind)
        if token not in ids or ids[token] == unknown:
            problem = "is the unknown token" if token in ids else "is not in its vocabulary"
            raise InputError(
                f"--tokenizer: {name} has '{token}' as its {kind}, which {problem}; correct its tokenizer_config.json"
            )
    if tokenizer.is_fast and (dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None)):
        raise InputError(
            f"--tokenizer: {name} has a dropout of {dropout}, so its ids are random; set it to null in tokenizer.json"
        )


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of text that has no token; None if there is no such text, as in GPT-2's, whatever `unk_token` says."""
    if not tokenizer.is_fast:
        return tokenizer.unk_token_id
    model = tables_of(tokenizer)["model"]
    return model.get("unk_id", tokenizer.get_vocab().get(model.get("unk_token")))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1, which is more than the number of tokens where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Refuses a tokenizer that has ids beyond the model's."""
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        holes = "" if size == len(tokenizer) else f" (its {len(tokenizer)} tokens have ids up to {size - 1})"
        raise InputError(
            f"--tokenizer: its vocabulary of {size}{holes} is larger than the model's of {config.vocab_size}; give the "
            "model's own tokenizer, or a model with as many embeddings"
        )


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    settings, has_model = folder / "tokenizer_config.json", (folder / "tokenizer.model").is_file()
    if not (settings.is_file() or (folder / "tokenizer.json").is_file() or has_model):
        raise InputError(
            f"--tokenizer: {folder} holds neither tokenizer.model nor tokenizer.json; give a folder with one"
        )
    if has_model and not settings.is_file() and not (folder / "config.json").is_file():
        return LlamaTokenizerFast.from_pretrained(folder, legacy=True)
    return _load(str(folder))


def _load(name: str, **choice: Any) -> PreTrainedTokenizerBase:
    """Loads what AutoTokenizer loads, and what transformers 5 has saved."""
    content = get_tokenizer_config(name, **choice)
    # transformers 5 names the class anew that reads nothing but tokenizer.json, and has a list of further tokens.
    loader = PreTrainedTokenizerFast if content.get("tokenizer_class") == "TokenizersBackend" else AutoTokenizer
    options: dict[str, Any] = {"trust_remote_code": False, **choice}
    if isinstance(extra := content.get("extra_special_tokens"), list):
        options |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return loader.from_pretrained(name, **options)


def _problem_of_settings(folder: Path) -> str | None:
    """Names the setting of a folder that keeps transformers from loading it, and the remedy."""
    settings = folder / "tokenizer_config.json"
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
        values = {kind: content.get(kind, kind) for kind in FRAME}
    except (OSError, ValueError, AttributeError):
        return None
    empty = [kind for kind, value in values.items() if not (value.get("content") if isinstance(value, dict) else value)]
    if empty:
        return f"{settings} leaves {' and '.join(empty)} empty; set it to the token in the vocabulary"
    if not content.get("tokenizer_class") and not (folder / "config.json").is_file():
        return f"{settings} names no tokenizer_class; set it, as PreTrainedTokenizerFast for tokenizer.json alone"
    if content.get("add_prefix_space") is not None and not (folder / "tokenizer.model").exists():
        return f"{settings} sets add_prefix_space, which needs tokenizer.model beside it; add it or remove the setting"
    return None


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    name, revision = hub.split_revision(name)
    choice = {"revision": revision or "main"}
    try:
        return _load(name, local_files_only=True, **choice)
    except (OSError, ValueError):
        hub.check_cache(name, "--tokenizer")
        _check_hub_has(name, revision)
        return _load(name, **choice)


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
