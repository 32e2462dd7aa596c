"""Rows of prompts and completions become ids, some of them to be learned.

A row holds `prompt` and `completion`, or `instruction`, `output` and perhaps `input`, or a chat's `messages`. It
becomes segments of text, of which the model is to learn some. Segments are joined so that a token never spans two: the
ids of a prompt in training are those of the same prompt alone, as the model will be asked.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from console import InputError
from dataset_files import read_rows
from dataset_sources import Source
from tokenization import TextEncoder

SHAPES = (("prompt", "completion"), ("instruction", "output"), ("messages",))  # columns that a row may come in

Segment = tuple[str, bool]  # text, and whether it is to be learned


class Encoded(NamedTuple):
    """An example: ids and whether each is to be learned, [length]; whether tokens were cut off."""

    ids: np.ndarray
    labels: np.ndarray
    cut: bool


class Unusable(Exception):
    """Why a row cannot be used, in a few words."""


def separator(prompt: str, completion: str) -> str:
    """What stands between them: nothing where either brings white space, else a space."""
    return "" if not prompt or prompt[-1].isspace() or completion[0].isspace() else " "


def row_segments(row: dict, shape: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a row of the columns `shape`. Raises Unusable."""
    if shape == ("messages",):
        return _chat_segments(row.get("messages"), tokenizer)
    prompt, completion = _text(row, shape[0], shape[0] == "prompt"), _text(row, shape[1])
    if shape[0] == "instruction":
        given = f"\nInput: {_text(row, 'input')}" if row.get("input") else ""
        prompt = f"Instruction: {prompt}{given}\nOutput:"
    return [(prompt, False), (separator(prompt, completion) + completion, True)]


def _text(row: dict, column: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise Unusable(f"{column} missing or null")
    if not isinstance(value, str):
        raise Unusable(f"{column} not a string")
    if not value and not may_be_empty:
        raise Unusable(f"{column} empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{column} with unpaired surrogates") from error
    return value


def _chat_segments(messages: object, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """A chat as its template renders it, the answers of the role `assistant` to be learned.

    An answer that opens the chat, a greeting, answers nothing and is not: no template renders what to put before it.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unusable("messages not a list of objects")
    for message in messages:
        _text(message, "role")
        _text(message, "content", may_be_empty=True)
    answers = [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]
    if not answers:
        raise Unusable("messages without an answer of the role assistant")
    segments, rendered = [], ""
    for number in answers:
        try:
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        except TemplateError as error:
            raise Unusable("messages that the chat template refuses") from error
        if not (before.startswith(rendered) and after.startswith(before)):
            raise Unusable("messages that the chat template renders otherwise once another follows")
        segments += [(before[len(rendered) :], False), (after[len(before) :], True)]
        rendered = after
    return segments


class ExampleEncoder:
    """Turns rows into ids and labels: BOS, the segments' tokens, EOS, at most `max_length` of them.

    Args:
        train_on_prompt: everything is to be learned, not the completion alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, shape: Sequence[str], max_length: int, train_on_prompt: bool
    ):
        self.tokenizer = tokenizer
        self.shape = tuple(shape)
        self.max_length = max_length
        self.train_on_prompt = train_on_prompt
        self.encoder = TextEncoder(tokenizer)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that ids and labels depend on."""
        template = self.tokenizer.chat_template if self.shape == ("messages",) else None
        rules = [self.encoder.fingerprint, self.shape, template, self.max_length, self.train_on_prompt]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def encode(self, rows: Sequence[dict]) -> Iterator[Encoded | str]:
        """An example for each row, or the reason why there is none."""
        usable, reasons = [], {}
        for number, row in enumerate(rows):
            try:
                usable.append(row_segments(row, self.shape, self.tokenizer))
            except Unusable as reason:
                reasons[number] = str(reason)
        examples = iter(self._joined(usable))
        for number in range(len(rows)):
            yield reasons[number] if number in reasons else self._framed(*next(examples))

    def _framed(self, ids: list[int], labels: list[bool]) -> Encoded | str:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if ids[:1] != [bos]:  # which a chat template may write itself
            ids, labels = [bos, *ids], [False, *labels]
        last_given = max((number for number, learned in enumerate(labels) if not learned), default=-1)
        if eos not in ids[last_given + 1 :]:
            ids, labels = [*ids, eos], [*labels, True]
        kept = np.array(labels[: self.max_length]) | self.train_on_prompt
        kept[0] = False  # nothing precedes it from which it could be predicted
        if not kept.any():
            return f"no token of the completion within --max_length {self.max_length}"
        return Encoded(np.array(ids[: self.max_length]), kept, len(ids) > self.max_length)

    def _joined(self, examples: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of the segments in one, and whether each is to be learned."""
        texts, ids = [""] * len(examples), [[] for _ in examples]
        labels: list[list[bool]] = [[] for _ in examples]
        for depth in range(max(map(len, examples), default=0)):
            active = [number for number, segments in enumerate(examples) if len(segments) > depth]
            for number in active:
                texts[number] += examples[number][depth][0]
            joined = self._tokenize([texts[number] for number in active])
            for number, whole in zip(active, joined, strict=True):
                text, learned = examples[number][depth]
                done = len(ids[number])
                new = whole[done:] if whole[:done] == ids[number] else self._continuation(text)
                ids[number] += new
                labels[number] += [learned] * len(new)
        return list(zip(ids, labels, strict=True))

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on from a token border: without the space that some tokenizers put before a text."""
        for anchor in ("\n", "0", "|"):
            before, both = self._tokenize([anchor, anchor + text])
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._tokenize([text])[0]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Special tokens spelled out are text, but in a chat, whose template writes them."""
        if self.shape == ("messages",):
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return self.encoder.tokenize(texts)


def find_shape(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """In which columns the rows come, by the first of them.

    Raises:
        InputError: the first row has the columns of no shape, or is a chat and the tokenizer has no template for it.
    """
    file = source.files[0]
    columns = next((row.columns.keys() for row in read_rows(file.fetch(), ())), ())
    for shape in SHAPES:
        if set(shape) <= set(columns):
            if shape == ("messages",) and not tokenizer.chat_template:
                raise InputError(
                    "--tokenizer: it has no chat template, which rows of 'messages' need; give one that has"
                )
            return shape
    wanted = ", or ".join(" and ".join(f"'{column}'" for column in shape) for shape in SHAPES)
    raise InputError(
        f"--dataset: {file.path} has the columns {', '.join(columns) or '(none)'}, not {wanted}; rename them"
    )
