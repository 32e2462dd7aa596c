"""Reads a tokenizer's vocabulary: the special tokens that text would make, and a proof that SentencePiece is equal."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from transformers import LlamaTokenizer, PreTrainedTokenizerBase
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

Piece = ModelProto.SentencePiece
FOUND_IN_TEXT = (Piece.NORMAL, Piece.USER_DEFINED, Piece.UNUSED)
RESERVED = (Piece.CONTROL, Piece.UNKNOWN)
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
HIDDEN = "\ufffe" * 32  # noncharacters, which no text has
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def tables_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a fast tokenizer's tokenizer.json, without truncation and padding."""
    ids = tokenizer.get_vocab()
    with _silent_stdout() if max(ids.values()) >= len(ids) else contextlib.nullcontext():
        text = tokenizer.backend_tokenizer.to_str()
    return json.loads(text) | {"truncation": None, "padding": None}


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep `tokenizers` from printing every unused id."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def special_tokens_of_text(tables: dict[str, Any]) -> set[str]:
    """Return the special tokens that the model itself makes from text."""
    model, special = tables["model"], _special_words(tables)
    if model["type"] != "BPE" or model["ignore_merges"]:
        return special
    inner = len(model["continuing_subword_prefix"] or "")
    merged = {left + right[inner:] for left, right in model["merges"]}
    return {token for token in special if token in merged or len(token) == 1}


def letters(tables: dict[str, Any]) -> set[str]:
    """Return the special tokens that text needs as characters: those of a model without bytes for other characters."""
    if tables["model"].get("byte_fallback"):
        return set()
    return {token for token in _special_words(tables) if len(token) == 1}


def dropped_characters(tables: dict[str, Any]) -> str:
    """Return the characters that a tokenizer leaves out of texts without a trace, in words; empty if there are none.

    A byte-pair model without unknown token has nothing for characters that are no tokens.
    """
    model = tables["model"]
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return ""
    if model["byte_fallback"]:  # ASCII may have tokens of its own
        letters_of = {byte: f"<0x{byte:02X}>" for byte in range(0x80, 0x100)}
    elif '"ByteLevel"' in json.dumps([tables["normalizer"], tables["pre_tokenizer"]]):
        letters_of = bytes_to_unicode()
    else:
        return "characters that are no tokens"
    used = letters_of.keys() - {0xC0, 0xC1, *range(0xF5, 0x100)}  # by UTF-8
    missing = [byte for byte in used if letters_of[byte] not in model["vocab"]]
    return f"{len(missing)} of the {len(used)} bytes of UTF-8's characters" if missing else ""


def _special_words(tables: dict[str, Any]) -> set[str]:
    """Return the special tokens in the model's vocabulary."""
    words = dict(tables["model"]["vocab"])
    return {token["content"] for token in tables["added_tokens"] if token["special"]} & words.keys()


def hide(tables: dict[str, Any], hidden: Container[str]) -> dict[str, Any]:
    """Return tables with the same ids and scores in which the tokens `hidden` have names that no text has."""

    def name(token: str | None) -> str | None:
        return token + HIDDEN if token is not None and token in hidden else token

    model = dict(tables["model"])
    words = model["vocab"]
    if isinstance(words, dict):
        model["vocab"] = {name(word): id_ for word, id_ in words.items()}
    else:
        model["vocab"] = [[name(word), score] for word, score in words]
    if "merges" in model:
        model["merges"] = _visible_merges(model, hidden)
    if "unk_token" in model:
        model["unk_token"] = name(model["unk_token"])
    added = [{**token, "content": name(token["content"])} for token in tables["added_tokens"]]
    return {**tables, "model": model, "added_tokens": added, "post_processor": None}


def _visible_merges(model: dict[str, Any], hidden: Container[str]) -> list[tuple[str, str]]:
    inner = len(model["continuing_subword_prefix"] or "")
    merges = ((left, right, left + right[inner:]) for left, right in model["merges"])
    return [parts[:2] for parts in merges if not any(part in hidden for part in parts)]


def plain_spec(rules: ModelProto) -> bool:
    """Return True if SentencePiece changes nothing in a text but for adding a space in front."""
    spec = rules.normalizer_spec
    return not spec.precompiled_charsmap and not spec.remove_extra_whitespaces and spec.escape_whitespaces


def neighbours(rules: ModelProto) -> set[str]:
    """Return all pairs of characters that are adjacent in some token."""
    return {pair for piece in rules.pieces for pair in map("".join, itertools.pairwise(piece.piece))}


def equal_sentencepiece(
    tokenizer: PreTrainedTokenizerBase, tables: dict[str, Any] | None, hidden: Container[str]
) -> tuple[SentencePieceProcessor | None, bool]:
    """Return SentencePiece if it is proven to give the ids of plain text, else None.

    Also return True if the tokenizer, unlike SentencePiece, puts no space before a text that begins with one.

    Args:
        tables: `tables_of` a fast tokenizer.
        hidden: `special_tokens_of_text`, which stay text.
    """
    vocab_file = getattr(tokenizer, "vocab_file", None)
    if not vocab_file or any(not token.special for token in tokenizer.added_tokens_decoder.values()):
        return None, False
    try:
        content = Path(vocab_file).read_bytes()
        rules = ModelProto.FromString(content)
        if type(tokenizer) is LlamaTokenizer and tokenizer.legacy:  # it calls SentencePiece itself
            return SentencePieceProcessor(model_proto=content), False
        prefix = _prefix(tokenizer, tables, hidden, rules)
        if prefix is None:
            return None, False
        space_first, bare = prefix
        return SentencePieceProcessor(model_proto=_as_it_stands(content, rules, space_first)), bare
    except (OSError, RuntimeError, DecodeError):
        return None, False


def _prefix(
    tokenizer: PreTrainedTokenizerBase, tables: dict[str, Any] | None, hidden: Container[str], rules: ModelProto
) -> tuple[bool, bool] | None:
    """Return None if nothing is proven. Else True if a space goes before a text, and True if not before a space."""
    if tables is None:
        if (
            type(tokenizer) is not LlamaTokenizer
            or not plain_spec(rules)
            or rules.trainer_spec.treat_whitespace_as_suffix
        ):
            return None
        # It puts its unknown token before a text that begins with a space, and removes that token's pieces.
        joined = f"{tokenizer.unk_token[-1:]}▁" in neighbours(rules)
        return None if joined else (tokenizer.add_prefix_space, False)
    if not _same_model(tables["model"], hidden, rules):
        return None
    normalizer, pre_tokenizer = tables["normalizer"] or {}, tables["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if not pre_tokenizer and steps in ([REPLACE], [PREPEND, REPLACE]):
        return len(steps) == 2, False
    scheme = pre_tokenizer.get("prepend_scheme")
    if steps or pre_tokenizer != {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
        return None
    # TextEncoder puts a line end before a text that begins with a space, and removes its ids.
    bare = scheme != "never"
    return None if bare and any("\n" in pair for pair in neighbours(rules)) else (bare, bare)


def _same_model(model: dict[str, Any], hidden: Container[str], rules: ModelProto) -> bool:
    """Return True if a fast tokenizer's model and SentencePiece give the same ids by byte-pair encoding.

    Both start from characters and repeatedly merge the pair that makes the best piece. SentencePiece takes the leftmost
    of equal pieces; a fast tokenizer takes the pair that comes first among its merges, then the leftmost. Both choose
    the same pair: no earlier merge has crossed a piece's borders, so the text of a piece alone decides which two
    symbols make it. The ids are therefore equal if the pieces have the same ids, if the merges hold every pair that
    makes a piece, in the order of the pieces' scores, and if no two pieces have the same score.
    """
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model[name] for name in settings) or not model["byte_fallback"]:
        return False
    if rules.trainer_spec.model_type != TrainerSpec.BPE or not rules.trainer_spec.byte_fallback:
        return False
    pieces = {kind: [piece for piece in rules.pieces if piece.type == kind] for kind in range(1, 7)}
    scores = {piece.piece: piece.score for piece in pieces[Piece.NORMAL]}
    others = {piece.piece for kind in (*RESERVED, Piece.BYTE) for piece in pieces[kind]}
    if (
        model["vocab"] != {piece.piece: id_ for id_, piece in enumerate(rules.pieces)}
        or len(scores) + len(others) != len(rules.pieces)
        or {piece.piece for piece in pieces[Piece.BYTE]} != BYTES
        or any(len(piece) == 1 for piece in others)
        or not set("".join(scores)) <= scores.keys()
    ):
        return False
    splits = ((piece[:at], piece[at:]) for piece in scores for at in range(1, len(piece)))
    expected = {(left, right) for left, right in splits if left in scores and right in scores}
    merges = _visible_merges(model, hidden)
    if len(merges) != len(expected) or set(merges) != expected:
        return False
    made = ["".join(merge) for merge in merges]
    in_order = all(scores[first] >= scores[second] for first, second in itertools.pairwise(made))
    return in_order and len({scores[piece] for piece in made}) == len(set(made))


def _as_it_stands(content: bytes, rules: ModelProto, space_first: bool) -> bytes:
    """Return the SentencePiece model without normalization; `content` itself if it has none."""
    wanted = {
        "add_dummy_prefix": space_first,
        "remove_extra_whitespaces": False,
        "escape_whitespaces": True,
        "precompiled_charsmap": b"",
    }
    other = {name: value for name, value in wanted.items() if getattr(rules.normalizer_spec, name) != value}
    if not other and not rules.trainer_spec.treat_whitespace_as_suffix:
        return content
    for name, value in other.items():
        setattr(rules.normalizer_spec, name, value)
    rules.trainer_spec.treat_whitespace_as_suffix = False
    rules.DiscardUnknownFields()  # such as its self-test, which is valid only for the original model
    return rules.SerializeToString()
