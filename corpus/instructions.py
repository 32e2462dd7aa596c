"""Turns rows of fine-tuning into token ids and labels.

A row has `prompt` and `completion`, or `instruction`, `output` and perhaps `input`, or a chat's `messages`. It becomes
segments of text, some of which the model learns. No token spans two segments, so a prompt has the same ids in training
as alone at inference. A null counts as absent, since Arrow and Parquet do not distinguish them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpus.chat_template import TOOLS, ChatTemplate, Unusable, check_template, continuation
from corpus.encoder import TextEncoder
from corpus.rows import is_unicode, read_rows, unusable
from corpus.sources import Source
from runtime.console import InputError

SHAPES = (("prompt", "completion"), ("instruction", "output"), ("messages",))  # the columns of a row
CHAT = SHAPES[2]
USED_COLUMNS = {
    SHAPES[0]: {"prompt", "completion", "system", "history"},
    SHAPES[1]: {"instruction", "input", "output", "system", "history"},
    CHAT: {"messages", "system"},
}
FRAME = "Instruction: {}{}\nOutput:"
TURN_END = "\n\n"  # after `system` and each turn of `history`
LEARNED = ("weight", "train")  # keys of a message by which OpenAI and axolotl mark it as learned or not
SHAREGPT = (
    "rename 'conversations' to 'messages', in it the keys 'from' to 'role' and 'value' to 'content', "
    "and the roles 'human' to 'user' and 'gpt' to 'assistant'"
)
SHAPE_ROWS = 1000  # rows in which find_shape looks for the columns
Segment = tuple[str, bool]  # text; True if the model learns it


class Encoded(NamedTuple):
    """A tokenized example."""

    ids: np.ndarray  # [length]
    labels: np.ndarray  # True where the model learns the token, [length]
    cut: bool  # True if tokens were cut off


def separator(prompt: str, completion: str) -> str:
    """Return the text between them: a space, or nothing if either has white space there."""
    return "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else " "


def row_segments(row: dict, shape: Sequence[str]) -> list[Segment]:
    """Return the segments of a row with prompt and completion, or instruction and output. Raises Unusable."""
    framed = shape[0] == "instruction"
    prompt, completion = _text(row, shape[0], not framed), _text(row, shape[1])
    given = f"\nInput: {_text(row, 'input')}" if framed and row.get("input") not in (None, "") else ""
    before = system + TURN_END if (system := _system(row)) else ""
    for question, answer in _history(row):
        question = FRAME.format(question, "") if framed else question
        before += question + separator(question, answer) + answer + TURN_END
    prompt = before + (FRAME.format(prompt, given) if framed else prompt)
    return [(prompt, False), (separator(prompt, completion) + completion, True)]


def chat_segments(row: dict, template: ChatTemplate) -> list[Segment]:
    """Return a chat's segments as its template writes them; the model learns the assistant's messages.

    A greeting of the assistant that opens the chat is not learned: no template writes a prompt for it.

    Raises:
        Unusable: the messages are no usable chat, or the template refuses them.
    """
    messages, learned = _messages(row)
    tools = _objects(row, "tools")
    if system := _system(row):
        if messages[:1] and messages[0]["role"] == "system":
            raise Unusable("a system message beside a column system")
        messages, learned = [{"role": "system", "content": system}, *messages], [False, *learned]
    answers = [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]
    if not answers:
        raise Unusable("messages without an answer of the role assistant")
    if not any(learned[number] for number in answers):
        raise Unusable("messages without an answer that is to be learned")
    _check_null_contents(messages[: answers[-1] + 1], tools, template)
    segments, written = [], ""
    for number in answers:
        before = template.write(messages[:number], tools, ask=True)
        after = template.write(messages[: number + 1], tools)
        if not (before.startswith(written) and after.startswith(before)):
            raise Unusable("messages that the chat template renders otherwise once another follows")
        segments += [(before[len(written) :], False), (after[len(before) :], learned[number])]
        written = after
        if not is_unicode(after):
            raise Unusable("messages with unpaired surrogates")
    return segments


def _messages(row: dict) -> tuple[list[dict], list[bool]]:
    """Return the messages without the keys LEARNED, and True or False for each: is it to be learned?"""
    if row.get("messages") is None:
        raise Unusable("messages not a list of objects")
    messages, learned = [], []
    for message in _objects(row, "messages"):
        _text(message, "role")
        if "tool_calls" in message:
            message["tool_calls"] = _objects(message, "tool_calls")
        if message.get("tool_calls") or "function_call" in message:
            message.setdefault("content", None)
        if message.get("content", "") is not None:
            _text(message, "content", may_be_empty=True)
        settings = {key: message.pop(key) for key in LEARNED if key in message}
        for key, value in settings.items():
            if value not in (0, 1):
                raise Unusable(f"{key} of a message neither true (1) nor false (0)")
        if message["role"] != "assistant" and settings.get("train"):
            raise Unusable("train true on a message of another role than assistant")
        messages.append(message)
        learned.append(all(settings.values()))
    return messages, learned


def _check_null_contents(messages: list[dict], tools: list[dict], template: ChatTemplate) -> None:
    """Raise Unusable if the template writes a null content, as tool calls have, as the word None."""
    if any(message["content"] is None for message in messages):
        filled = [message | {"content": message["content"] or ""} for message in messages]
        if template.write(messages, tools).count("None") > template.write(filled, tools).count("None"):
            raise Unusable("content null, of which the chat template makes the word None")


def _text(row: dict, column: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if (reason := unusable(value, column)) and not (value == "" and may_be_empty):
        raise Unusable(reason)
    return str(value)


def _system(row: dict) -> str:
    return "" if row.get("system") is None else _text(row, "system", may_be_empty=True)


def _history(row: dict) -> list[list[str]]:
    turns = _parsed(row, "history")
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns
    ):
        raise Unusable("history not a list of pairs of strings")
    if not all(map(is_unicode, itertools.chain.from_iterable(turns))):
        raise Unusable("history with unpaired surrogates")
    return turns


def _objects(row: dict, column: str) -> list[dict]:
    objects = _parsed(row, column)
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise Unusable(f"{column} not a list of objects")
    return _without_nulls(objects)


def _without_nulls(value: Any) -> Any:
    """Return the value without the null fields of its objects: Arrow adds a field that one row has to all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(row: dict, column: str) -> Any:
    """Return a value that may be stored as a JSON string, as is usual in Parquet; an empty list if there is none."""
    value = row.get(column)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"{column} a string that is not JSON") from error
    return value or []


class ExampleEncoder:
    """Turns rows into ids and labels: BOS, the segments' tokens, EOS, cut to `max_length`.

    In a chat only the template writes BOS, and EOS is added unless the template ends the last answer with it.

    Args:
        train_on_prompt: the model learns the prompt too.

    Attributes:
        columns: columns that had a value in some row so far.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, shape: Sequence[str], max_length: int, train_on_prompt: bool
    ):
        self.tokenizer = tokenizer
        self.shape = tuple(shape)
        self.max_length = max_length
        self.train_on_prompt = train_on_prompt
        self.encoder = TextEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer, self.encoder) if self.shape == CHAT else None
        self.columns: set[str] = set()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that ids and labels depend on."""
        template = self.tokenizer.chat_template if self.template else None
        rules = [self.encoder.fingerprint, self.shape, template, self.max_length, self.train_on_prompt]
        if template:
            tokens = sorted(self.tokenizer.special_tokens_map.items())
            known = ("bos_token", "eos_token")  # part of the encoder's fingerprint
            rules += [[name, token] for name, token in tokens if name not in known and name in str(template)]
            rules += ["split"] * bool(self.tokenizer.split_special_tokens)
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def encode(self, rows: Sequence[dict]) -> Iterator[Encoded | str]:
        """Yield an example for each row, or the reason why the row cannot be used."""
        usable, reasons = [], {}
        for number, row in enumerate(rows):
            self.columns.update(column for column, value in row.items() if value is not None)
            try:
                usable.append(self._segments(row))
            except Unusable as reason:
                reasons[number] = str(reason)
            except RecursionError:
                reasons[number] = "objects nested too deeply"
        examples = iter(self._joined(usable))
        for number in range(len(rows)):
            yield reasons[number] if number in reasons else self._framed(*next(examples))

    def _segments(self, row: dict) -> list[Segment]:
        if not self.template:
            return row_segments(row, self.shape)
        segments = chat_segments(row, self.template)
        for text in itertools.accumulate(text for text, _ in segments):
            if self.template.may_refuse(text):
                self.template.tokenize([text])  # raises Unusable here, for this row, rather than for the whole batch
        return segments

    def _framed(self, ids: list[int], labels: list[bool], last: int) -> Encoded | str:
        """Add BOS and EOS to a row's ids, whose last segment begins at `last`, and cut them."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not self.template:
            ids, labels = [bos, *ids, eos], [False, *labels, True]
        elif not self._is_closed(ids[last:]):
            ids, labels = [*ids, eos], [*labels, labels[-1]]
        kept = np.array(labels[: self.max_length]) | self.train_on_prompt
        kept[0] = False  # no token precedes it to predict it from
        if not kept.any():
            return f"no token of the completion within --max_length {self.max_length}"
        return Encoded(np.array(ids[: self.max_length]), kept, len(ids) > self.max_length)

    def _is_closed(self, answer: list[int]) -> bool:
        """Return True if the answer ends with EOS, perhaps followed by white space."""
        for number in reversed(answer):
            if number == self.tokenizer.eos_token_id or self.tokenizer.decode([number]).strip():
                return number == self.tokenizer.eos_token_id
        return False

    def _joined(self, examples: list[list[Segment]]) -> list[tuple[list[int], list[bool], int]]:
        """Return for each example the ids of all segments, their labels, and where the last segment begins."""
        texts, ids = [""] * len(examples), [[] for _ in examples]
        labels: list[list[bool]] = [[] for _ in examples]
        starts = [0] * len(examples)
        for depth in range(max(map(len, examples), default=0)):
            active = [number for number, segments in enumerate(examples) if len(segments) > depth]
            for number in active:
                texts[number] += examples[number][depth][0]
            joined = self._tokenize([texts[number] for number in active])
            for number, whole in zip(active, joined, strict=True):
                text, learned = examples[number][depth]
                done = starts[number] = len(ids[number])
                new = whole[done:] if whole[:done] == ids[number] else continuation(self._tokenize, text)
                ids[number] += new
                labels[number] += [learned] * len(new)
        return list(zip(ids, labels, starts, strict=True))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Special tokens are text, except those that a chat template writes."""
        return self.template.tokenize(texts) if self.template else self.encoder.tokenize(texts)

    @property
    def notes(self) -> tuple[set[str], ...]:
        """Columns that the rows had so far; for chats also the keys of messages, and those used. See `take_notes`."""
        return (self.columns, self.template.given, self.template.used) if self.template else (self.columns,)

    def take_notes(self, notes: tuple[set[str], ...]) -> None:
        """Add the `notes` of another process, which has encoded other rows."""
        for own, new in zip(self.notes, notes, strict=True):
            own |= new

    @property
    def unused(self) -> list[str]:
        """Columns and keys of messages that no example depends on."""
        columns, *keys = self.notes
        given, used = keys or (set(), set())
        columns = columns - USED_COLUMNS[self.shape] - ({"tools"} if TOOLS in used else set())
        given = given - used - {"role", "content"}
        return [f"column {name}" for name in sorted(columns)] + [f"message key {name}" for name in sorted(given)]


def find_shape(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the member of SHAPES that the rows have: that of the first row with a value in all its columns.

    Raises:
        InputError: the rows have none of the shapes, or are chats and the tokenizer has no chat template.
    """
    file = source.files[0]
    rows = [row.columns for row in itertools.islice(read_rows(file.fetch(), ()), SHAPE_ROWS)]
    filled = ([column for column, value in row.items() if value is not None] for row in rows)
    for columns in itertools.chain(filled, rows[:1]):
        for shape in SHAPES:
            if set(shape) <= set(columns):
                if shape == CHAT:
                    absent = "it has no chat template, which rows of 'messages' need; give one that has"
                    check_template(tokenizer, "--tokenizer", absent)
                return shape
    wanted = ", or ".join(" and ".join(f"'{column}'" for column in shape) for shape in SHAPES)
    found = ", ".join(rows[0] if rows else ()) or "(none)"
    remedy = SHAREGPT if rows and "conversations" in rows[0] else "rename them"
    raise InputError(f"--dataset: {file.path} has the columns {found}, not {wanted}; {remedy}")
