"""Turns chats into text and ids with a tokenizer's chat template, in fine-tuning and in scripts/generate.py.

The ids are those of `tokenizer.apply_chat_template(messages, tools, tokenize=True)`, so BOS is there only if the
template writes it. One thing differs: a special token that a message spells out stays text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from corpus.encoder import TextEncoder, unknown_refused
from runtime.console import InputError, first_line

MARK = "\ufdd0"  # put around a special token that a message spells out; a noncharacter, for such uses (Unicode 23.7)
TOOLS = "column tools"  # stands for the tools in `ChatTemplate.used`
REASON_CHARACTERS = 80


class Unusable(Exception):
    """Raised with the reason, in a few words, why a row cannot be used."""


def check_template(tokenizer: PreTrainedTokenizerBase, flag: str, absent: str) -> None:
    """Check that the tokenizer has a usable chat template.

    Args:
        absent: message for a tokenizer without one.

    Raises:
        InputError: it has none, several but none called `default`, or one with a syntax error.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise InputError(f"{flag}: {absent}")
    if isinstance(templates, dict) and "default" not in templates:
        raise InputError(
            f"{flag}: the tokenizer has the chat templates {', '.join(sorted(templates))} and none called 'default'; "
            "rename the one to use in its tokenizer_config.json"
        )
    for name, template in templates.items() if isinstance(templates, dict) else [("", templates)]:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise InputError(
                f"{flag}: the tokenizer's chat template{f' {name!r}' * bool(name)} is not valid, line {error.lineno}: "
                f"{first_line(error)}; correct it, or give another tokenizer"
            ) from error
        except Exception:  # it may accept other messages
            continue


class ChatTemplate:
    """Writes chats as text and turns the text into ids.

    Attributes:
        given: keys of all messages so far.
        used: keys that the template has read so far, and TOOLS if it has read the tools.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.given: set[str] = set()
        self.used: set[str] = set()
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = ({token.content for token in added} | set(tokenizer.all_special_tokens)) - encoder.letters
        self._taking_space = {token.content for token in added if token.lstrip or token.rstrip}
        normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        self._normalizing = bool(normalizer) and any(token.normalized for token in added)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special = re.compile(f"{MARK}?(?:{longest_first}){MARK}?")

    def write(self, messages: Sequence[dict], tools: list[dict] | None = None, ask: bool = False) -> str:
        """Return the text of a chat, with MARK around special tokens that the messages spell out.

        Args:
            ask: append the opening of an answer.

        Raises:
            Unusable: the template fails, or refuses the messages, or they contain MARK.
        """
        self.given.update(*messages)
        watched = [_Watched(self._marked(message), self.used.add) for message in messages]
        if tools:
            tools = [_Watched(self._marked(tool), lambda _: self.used.add(TOOLS)) for tool in tools]
        try:
            return self.tokenizer.apply_chat_template(
                watched, tools=tools or None, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:
            raise Unusable("messages that the chat template refuses") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"[:REASON_CHARACTERS]
            raise Unusable(f"messages that the chat template fails on ({reason})") from error

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            if MARK in value:  # `tokenize` would remove it
                raise Unusable("the character U+FDD0 in messages or tools")
            return self._special.sub(lambda token: f"{MARK}{token[0]}{MARK}", value)
        if isinstance(value, dict):
            return {self._marked(key): self._marked(field) for key, field in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list) else value

    def may_refuse(self, text: str) -> bool:
        """Return True if `tokenize` may raise Unusable for the text."""
        return self._normalizing or MARK in text

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts from `write`. Raises Unusable, but only if `may_refuse` one of them."""
        if not texts:
            return []
        plain = [text.replace(MARK, "") for text in texts]
        with unknown_refused():
            rows = self.tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            self._spelled(text, ids) if self.may_refuse(text) else ids for text, ids in zip(texts, rows, strict=True)
        ]

    def _spelled(self, text: str, ids: list[int]) -> list[int]:
        """Return the ids with each special token within MARKs replaced by the ids of its letters."""
        matches = list(self._special.finditer(text))
        found = [match[0] for match in matches]
        surplus = sum(number in self._special_ids for number in ids) - len(found)
        if surplus > 0 or (MARK in text and (surplus or any(map(self._took_space, matches)))):
            raise Unusable("special tokens of the tokenizer spelled in messages")
        if MARK not in text:
            return ids
        tokens, spelled = iter(found), []
        for number in ids:
            token = next(tokens) if number in self._special_ids else ""
            letters = token.startswith(MARK) and token.endswith(MARK)
            spelled += continuation(self.encoder.tokenize, token.strip(MARK)) if letters else [number]
        if sum(number in self._special_ids for number in spelled) != sum(not token.startswith(MARK) for token in found):
            raise Unusable("special tokens of the tokenizer spelled in messages")  # its letters merged
        return spelled

    def _took_space(self, match: re.Match) -> bool:
        """Return True if a message spells out the token, and it absorbed white space next to it."""
        beside = match.string[match.start() - 1 : match.start()] + match.string[match.end() : match.end() + 1]
        spelled = match[0].startswith(MARK) and match[0].strip(MARK) in self._taking_space
        return spelled and any(map(str.isspace, beside))


def continuation(tokenize: Callable[[Sequence[str]], list[list[int]]], text: str) -> list[int]:
    """Return the ids of a text that follows other tokens: without the space that some tokenizers put before a text."""
    for anchor in ("\n", "0", "|"):
        before, both = tokenize([anchor, anchor + text])
        if both[: len(before)] == before:
            return both[len(before) :]
    return tokenize([text])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """Return the ids of a prompt, or of a user's message that opens a chat, as in fine-tuning.

    Raises:
        InputError: the chat template refuses the message.
    """
    encoder = TextEncoder(tokenizer)
    if not chat:
        return [tokenizer.bos_token_id, *encoder.tokenize([text])[0]]
    check_template(tokenizer, "--chat", "the tokenizer has no chat template; leave the flag out")
    template = ChatTemplate(tokenizer, encoder)
    try:
        return template.tokenize([template.write([{"role": "user", "content": text}], ask=True)])[0]
    except Unusable as reason:
        raise InputError(f"--chat: {reason}; change --prompt, or leave the flag out") from reason


class _Watched(dict):
    """A dict that reports each key that is read to `use`; templates cannot see attributes with an underscore."""

    def __init__(self, content: dict, use: Callable[[str], object]):
        super().__init__(content)
        self._use = use

    def __getitem__(self, key: str) -> Any:
        self._use(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._use(key)
            yield key

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    # Mapping's methods call __getitem__ and __iter__; dict's do not.
    get, keys, values, items = Mapping.get, Mapping.keys, Mapping.values, Mapping.items  # type: ignore[assignment]
    __contains__ = Mapping.__contains__  # type: ignore[assignment]
