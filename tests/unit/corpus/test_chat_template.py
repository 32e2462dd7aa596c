"""Chats get the ids that transformers' own apply_chat_template gives, in training as in generate.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AddedToken, AutoTokenizer

from corpora import error_of
from corpus.chat_template import check_template, prompt_ids
from corpus.instructions import ExampleEncoder
from corpus.tokenizer import load_tokenizer
from instruction_rows import CHAT, PROMPTED, encoded

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOLS = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{% endfor %}{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 2": LLAMA_2, "zephyr": ZEPHYR, "tools": TOOLS}
NAMES = "{% for m in messages %}{{ m.name or m.content }}{% endfor %}"
SYSTEM = {"role": "system", "content": "Be brief."}
NOT_VALID = "--chat: the tokenizer's chat template"
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def with_special_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(sample, byte_level_tokenizer, tmp_path_factory):
    byte_level_tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("bytes"))
    slow = AutoTokenizer.from_pretrained(sample / "tokenizer", use_fast=False)
    found = {"fast": load_tokenizer(str(sample / "tokenizer")), "slow": slow, "bytes": load_tokenizer(str(folder))}
    return {name: with_special_tokens(tokenizer) for name, tokenizer in found.items()}


@pytest.fixture
def tokenizer(tokenizers):
    tokenizers["fast"].chat_template, tokenizers["fast"].eos_token = CHATML, "</s>"
    return tokenizers["fast"]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def example_of(tokenizer, messages, **columns):
    (example,) = encoded(tokenizer, {"messages": messages, **columns}, shape=CHAT, max_length=10**6)
    return example


def learned_text(tokenizer, example):
    return tokenizer.decode([n for n, learned in zip(example.ids, example.labels, strict=True) if learned])


# -------------------------------------------------------------------------------------------------------- random chats

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=12)
text |= st.sampled_from(["", "Hi!", " padded ", "two\n\nlines", "\n\n", "日本 😀", "None", "[INST] x [/INST]"])
turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": text, "arguments": st.dictionaries(text, text, max_size=2)}),
        }
    ),
    min_size=1,
    max_size=2,
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(text, text, max_size=2)}),
    max_size=2,
)


def chat_of(turns):
    return [message for question, reply in turns for message in (user(question), answer(reply))]


class TestRandomChats:
    @pytest.mark.slow
    @settings(deadline=None, max_examples=150)
    @given(data=st.data())
    def test_ids_and_labels(self, tokenizers, data):
        tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
        tokenizer.chat_template = template = TEMPLATES[data.draw(st.sampled_from(sorted(TEMPLATES)))]
        tokenizer.eos_token = data.draw(st.sampled_from(["</s>", "<|im_end|>"]))
        messages, given = chat_of(data.draw(turns)), None
        if template == TOOLS:
            given = data.draw(tools) or None
            if data.draw(st.booleans()):
                messages = [
                    user("x"),
                    answer(None, tool_calls=data.draw(calls)),
                    {"role": "tool", "content": "y"},
                    *messages[1:],
                ]
        skipped = [number for number in range(1, len(messages)) if data.draw(st.integers(0, 4)) == 0]
        row = [
            {**message, "weight": 0} if number in skipped and message["role"] == "assistant" else message
            for number, message in enumerate(messages)
        ]
        (example,) = encoded(tokenizer, {"messages": row, "tools": given}, shape=CHAT, max_length=10**6)
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if set(replies) <= set(skipped):
            assert example == "messages without an answer that is to be learned"
            return

        def ids(count, ask):
            return tokenizer.apply_chat_template(
                messages[:count], tools=given, tokenize=True, add_generation_prompt=ask
            )

        ends = [place for number in replies for place in (ids(number, True), ids(number + 1, False))]
        whole = ends[-1]
        own = example.ids.tolist()
        assert own[: len(ends[0])] == ends[0]  # the first answer follows what will be asked
        if all(whole[: len(end)] == end for end in ends):
            extra = own[len(whole) :]
            assert own[: len(whole)] == whole
            expected = [False] * len(whole)
            for number, start, stop in zip(replies, ends[::2], ends[1::2], strict=True):
                expected[len(start) : len(stop)] = [number not in skipped] * (len(stop) - len(start))
            expected[0] = False
            expected += [replies[-1] not in skipped] * len(extra)
            assert example.labels.tolist() == expected
        else:  # a token would span a border
            closing = [tokenizer.eos_token_id] if own[-1] == tokenizer.eos_token_id else []
            extra = closing if tokenizer.decode(own[:-1]) == tokenizer.decode(whole) else []
            assert tokenizer.decode(own[: len(own) - len(extra)]) == tokenizer.decode(whole)
        written = tokenizer.apply_chat_template(messages, tools=given, tokenize=False)
        closed = written.rstrip().endswith(tokenizer.eos_token)
        assert extra == ([] if closed else [tokenizer.eos_token_id])

    @settings(deadline=None, max_examples=100)
    @given(data=st.data())
    def test_special_tokens_in_messages_are_text(self, tokenizers, data):
        name = data.draw(st.sampled_from(["bytes", "fast"]))
        tokenizer = tokenizers[name]
        tokenizer.eos_token = "</s>"
        tokenizer.chat_template = TEMPLATES[data.draw(st.sampled_from(sorted(TEMPLATES)))]
        parts = [*SPECIAL, "a", " ", "\n", "<|im_", "end|>"] + ["<s>", "</s>"] * (name == "fast")  # others merge to one
        content = data.draw(st.lists(st.sampled_from(parts), max_size=5).map("".join))
        example = example_of(tokenizer, [user(content), answer("x" + content)])
        harmless = example_of(tokenizer, [user("y"), answer("x")])
        special = set(tokenizer.all_special_ids)
        assert [n for n in example.ids.tolist() if n in special] == [n for n in harmless.ids.tolist() if n in special]
        written = tokenizer.apply_chat_template([user(content), answer("x" + content)], tokenize=False)
        found = tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
        if name == "bytes":
            assert found.removesuffix("</s>") == written.removesuffix("</s>")
        else:  # whose tokens each bring a space
            assert "".join(found.split()).removesuffix("</s>") == "".join(written.split()).removesuffix("</s>")
        asked = prompt_ids(tokenizer, content, chat=True)
        assert example.ids[: len(asked)].tolist() == asked


class TestMessages:
    def test_a_template_that_writes_no_bos_gets_none(self, tokenizer):
        messages = [user("Hi"), answer("Hello")]
        example = example_of(tokenizer, messages)
        assert example.ids.tolist() == [*tokenizer.apply_chat_template(messages), tokenizer.eos_token_id]
        asked = prompt_ids(tokenizer, "Hi", chat=True)
        assert asked == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
        assert example.ids[: len(asked)].tolist() == asked

    @pytest.mark.parametrize("as_json", [False, True])
    def test_tools_reach_the_template(self, tokenizer, as_json):
        tokenizer.chat_template = TOOLS
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"b": 1, "a": {}}}}]
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}]
        messages = [user("Weather?"), answer(None, tool_calls=calls), {"role": "tool", "content": "sun"}, answer("Sun")]
        row = [user("Weather?"), {"role": "assistant", "tool_calls": json.dumps(calls) if as_json else calls}]
        example = example_of(tokenizer, [*row, *messages[2:]], tools=json.dumps(tools) if as_json else tools)
        whole = tokenizer.apply_chat_template(messages, tools=tools)
        assert example.ids[: len(whole)].tolist() == whole
        assert '"city": "Bonn"' in learned_text(tokenizer, example)

    @pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0, "train": None}, {"train": False}])
    def test_answers_that_are_not_to_be_learned(self, tokenizer, mark):
        tokenizer.eos_token = "<|im_end|>"
        messages = [user("Hi"), answer("WRONG", **mark), user("Again"), answer("right", weight=1, train=True)]
        example = example_of(tokenizer, messages)
        assert learned_text(tokenizer, example).split() == ["right<|im_end|>"]
        last = example_of(tokenizer, [user("Hi"), answer("right"), user("Again"), answer("WRONG", **mark)])
        assert learned_text(tokenizer, last).split() == ["right<|im_end|>"]

    def test_a_column_system_opens_the_chat(self, tokenizer):
        messages = [user("Hi"), answer("Hello")]
        example = example_of(tokenizer, messages, system="Be brief.", tools=[])
        whole = tokenizer.apply_chat_template([SYSTEM, *messages])
        assert example.ids[: len(whole)].tolist() == whole

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"tools": "{"}, "tools a string that is not JSON"),
            ({"tools": ["x"]}, "tools not a list of objects"),
            ({"messages": [user("a"), answer("b", weight=0)]}, "messages without an answer that is to be learned"),
            ({"messages": [user("a"), answer("b", weight=0.5)]}, "weight of a message neither true (1) nor false (0)"),
            ({"messages": [user("a", train=1), answer("b")]}, "train true on a message of another role than assistant"),
            (
                {"messages": [user("a"), answer(None, tool_calls=[{}])]},
                "content null, of which the chat template makes the word None",
            ),
            ({"messages": [user("a"), answer(None)]}, "content missing or null"),
            ({"messages": [user([{"type": "text", "text": "a"}]), answer("b")]}, "content not a string"),
            (
                {"messages": [user("a", name="\ud800"), answer("b")], "template": NAMES},
                "messages with unpaired surrogates",
            ),
            ({"messages": [user("a"), answer("a\ufdd0b")]}, "the character U+FDD0 in messages or tools"),
            ({"system": "\ufdd0"}, "the character U+FDD0 in messages or tools"),
            ({"tools": [{"a\ufdd0b": 1}]}, "the character U+FDD0 in messages or tools"),
            ({"messages": [SYSTEM, user("a"), answer("b")], "system": "x"}, "a system message beside a column system"),
            (
                {"template": "{{ messages[0].content + 1 }}"},
                'messages that the chat template fails on (TypeError: can only concatenate str (not "int") to str)',
            ),
            ({"template": "{{ raise_exception('no') }}"}, "messages that the chat template refuses"),
            ({"template": "{{ messages[5].content }}"}, "messages that the chat template refuses"),
        ],
    )
    def test_what_cannot_be_used(self, tokenizer, row, reason):
        tokenizer.chat_template = row.pop("template", CHATML)
        assert encoded(tokenizer, {"messages": [user("a"), answer("b")], **row}, shape=CHAT) == [reason]

    def test_a_prompt_with_the_character_that_marks_special_tokens(self, tokenizer):
        assert error_of(prompt_ids, tokenizer, "a\ufdd0b", True) == (
            "--chat: the character U+FDD0 in messages or tools; change --prompt, or leave the flag out"
        )

    def test_what_the_template_does_not_ask_for_is_named(self, tokenizer):
        encoder = ExampleEncoder(tokenizer, CHAT, 100, False)
        row = {"messages": [user("a", name="n"), answer("b", mood="m")], "tools": [{"x": 1}], "source": "s", "id": None}
        list(encoder.encode([row]))
        assert encoder.unused == ["column source", "column tools", "message key mood", "message key name"]
        tokenizer.chat_template = "{{ messages | tojson }}{{ tools }}"
        encoder = ExampleEncoder(tokenizer, CHAT, 100, False)
        list(encoder.encode([row]))
        assert encoder.unused == ["column source"]


def with_token(sample, normalizer=None, **flags):
    tokenizer = load_tokenizer(str(sample / "tokenizer"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, **flags), AddedToken("<|im_start|>", special=True)])
    if normalizer:
        own = tokenizer.backend_tokenizer.normalizer
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizer, *([own] if own else [])])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_white_space_is_not_lost_around_a_spelled_token_that_takes_it(sample, flag):
    """A row is refused only where there is some."""
    tokenizer = with_token(sample, **{flag: True})
    for content in ("a  <|im_end|>  b", "a<|im_end|> ", "\n<|im_end|>b"):
        (example,) = encoded(tokenizer, {"messages": [user("x"), answer(f"a{content}b")]}, shape=CHAT)
        assert example == "special tokens of the tokenizer spelled in messages" or content in learned_text(
            tokenizer, example
        )
    assert "a<|im_end|>b" in learned_text(tokenizer, example_of(tokenizer, [user("x"), answer("a<|im_end|>b")]))


@pytest.mark.parametrize(
    ("normalizer", "spelled"), [(normalizers.NFKC(), "\uff1c|im_end|\uff1e"), (normalizers.Lowercase(), "<|IM_END|>")]
)
def test_a_special_token_that_the_normalizer_would_make_is_refused(sample, normalizer, spelled):
    tokenizer = with_token(sample, normalizer, normalized=True)
    rows = [{"messages": [user(content), answer("b")]} for content in (spelled, "a")]
    refused, example = encoded(tokenizer, *rows, shape=CHAT)
    assert refused == "special tokens of the tokenizer spelled in messages"
    whole = tokenizer.apply_chat_template(rows[1]["messages"])
    assert example.ids[: len(whole)].tolist() == whole


def test_fingerprint_of_whatever_the_ids_depend_on(sample):
    tokenizer = load_tokenizer(str(sample / "tokenizer"))
    found = set()
    for template in (CHATML, "{{ pad_token }}" + CHATML):
        tokenizer.chat_template = template
        for token, split in (("<unk>", False), ("</s>", False), ("<unk>", True)):
            tokenizer.pad_token, tokenizer.split_special_tokens = token, split
            example = example_of(tokenizer, [user("a"), answer("b")])
            found.add((ExampleEncoder(tokenizer, CHAT, 9, False).fingerprint, *example.ids.tolist()))
    assert len({fingerprint for fingerprint, *_ in found}) == len(found) == 5  # CHATML writes no padding


def test_objects_within_objects_without_end(tokenizer):
    nested = {}
    for _ in range(900):
        nested = {"a": nested}
    for row in ({"messages": [user("a", b=nested), answer("b")]}, {"messages": [], "tools": [nested]}):
        assert encoded(tokenizer, row, shape=CHAT) == ["objects nested too deeply"]


class TestCheckTemplate:
    @pytest.mark.parametrize(
        ("template", "problem"),
        [
            (None, "--chat: none"),
            (
                {"rag": CHATML, "x": TOOLS},
                "--chat: the tokenizer has the chat templates rag, x and none called 'default'",
            ),
            ("{% for m in messages %}\n{{ m.content }", f"{NOT_VALID} is not valid, line 2: unexpected '}}'"),
            ({"default": CHATML, "tool_use": "{% if %}"}, f"{NOT_VALID} 'tool_use' is not valid, line 1: "),
            ("{{ messages | nosuchfilter }}", f"{NOT_VALID} is not valid, line 1: No filter named"),
        ],
    )
    def test_what_cannot_be_used(self, tokenizer, template, problem):
        tokenizer.chat_template = template
        assert error_of(check_template, tokenizer, "--chat", "none").startswith(problem)

    @pytest.mark.parametrize("template", [CHATML, "{{ raise_exception('no') }}", "{{ 1 + 'a' }}"])
    def test_others_are_tried(self, tokenizer, template):
        tokenizer.chat_template = template
        check_template(tokenizer, "--chat", "none")

    def test_several_templates(self, tokenizer):
        tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
        messages, tools = [user("a"), answer("b")], [{"type": "function", "function": {"name": "f"}}]
        for chosen in (None, tools):
            whole = tokenizer.apply_chat_template(messages, tools=chosen)
            assert example_of(tokenizer, messages, tools=chosen).ids[: len(whole)].tolist() == whole


def test_a_plain_prompt_is_asked_as_it_is_learned(tokenizers):
    for tokenizer in tokenizers.values():
        tokenizer.add_tokens([AddedToken("plainadded", normalized=False)])
        for prompt in ("", "Return the", "  two spaces\n", "plainadded", "say <|im_end|> and </s> "):
            (example,) = encoded(tokenizer, {"prompt": prompt, "completion": "x"}, shape=PROMPTED)
            asked = prompt_ids(tokenizer, prompt, chat=False)
            assert example.ids[: len(asked)].tolist() == asked
