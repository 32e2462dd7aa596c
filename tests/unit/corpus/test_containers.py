"""The same rows give the same documents and examples in every container."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from containers import LOCAL, as_hub, opened
from corpora import documents_in
from corpus.examples import prepare_examples
from corpus.instructions import SHAPES, ExampleEncoder, find_shape
from corpus.rows import read_documents, read_rows
from corpus.tokenizer import load_tokenizer
from data_utils import InstructionDataset

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}"
    "{% if 'name' in m %} {{ m.name }}{% endif %}] {% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.content or '' }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

CALL = pa.struct(
    {
        "type": pa.string(),
        "function": pa.struct({"name": pa.string(), "arguments": pa.struct({"x": pa.int64(), "city": pa.string()})}),
    }
)
MESSAGE = pa.struct(
    {"role": pa.string(), "content": pa.string(), "name": pa.string(), "tool_calls": pa.list_(CALL)}
    | {"weight": pa.int64(), "train": pa.bool_(), "mood": pa.string()}
)
TOOL = pa.struct(
    {"name": pa.string(), "description": pa.string(), "parameters": pa.struct({"a": pa.string(), "b": pa.string()})}
)
CHATS = pa.schema({"messages": pa.list_(MESSAGE), "tools": pa.list_(TOOL), "system": pa.string(), "id": pa.int64()})
TURNS = pa.list_(pa.list_(pa.string()))
PROMPTS = pa.schema({"prompt": pa.string(), "completion": pa.string(), "system": pa.string(), "history": TURNS})
META = pa.struct({"red_pajama_subset": pa.string(), "year": pa.int64()})
DOCUMENTS = pa.schema({"text": pa.string(), "meta": META, "red_pajama_subset": pa.string()})
DESCRIBED = pa.schema({"text": pa.string(), "meta": pa.string()})

chat_rows = [
    {
        "messages": [{"role": "user", "content": "hi", "name": "ann"}, {"role": "assistant", "content": "hello"}],
        "id": 1,
    },
    {
        "messages": [
            {"role": "user", "content": "weather? </s>"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "Bonn"}}}],
            },
            {"role": "tool", "content": "sun", "mood": "fine"},
            {"role": "assistant", "content": "It is\nsunny 😀"},
        ],
        "tools": [{"name": "w", "parameters": {"a": "string"}}, {"name": "v", "description": "d"}],
        "system": "Be brief.",
    },
    {
        "messages": [
            {"role": "user", "content": "2"},
            {"role": "assistant", "content": "wrong", "weight": 0},
            {"role": "user", "content": "2"},
            {"role": "assistant", "content": "wrong", "train": False},
            {"role": "user", "content": "2"},
            {"role": "assistant", "content": "right", "weight": 1, "train": True},
        ]
    },
    {"messages": None, "id": 3},
    {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
]
prompt_rows = [
    {"prompt": "And now?", "completion": "Now this.", "system": "S", "history": [["First?", "That."], ["", ""]]},
    {"prompt": "", "completion": " ünï </s>"},
    {"prompt": "x", "completion": None, "history": []},
]
document_rows = [
    {"text": "one", "meta": {"red_pajama_subset": "arxiv"}},
    {"text": "two", "meta": {"year": 3}},
    {"text": None, "meta": None},
    {"text": "three", "meta": {"red_pajama_subset": "book"}, "red_pajama_subset": "github"},
] * 2
described_rows = [
    {"text": "one", "meta": json.dumps({"red_pajama_subset": "arxiv"})},
    {"text": "two", "meta": "{'red_pajama_subset': no JSON"},
    {"text": "three", "meta": '"red_pajama_subset"'},
]


@pytest.fixture(scope="session")
def chat_tokenizer(sample):
    tokenizer = load_tokenizer(str(sample / "tokenizer"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def examples(encoder, rows):
    found = list(encoder.encode(rows))
    return [item if isinstance(item, str) else (item.ids.tolist(), item.labels.tolist()) for item in found]


def rows_of(source):
    return [row.columns for file in source.files for row in read_rows(file.fetch(), ())]


def texts_of(source):
    return [(document.text, document.slice) for document in documents_in(source)]


@pytest.mark.parametrize("container", [*LOCAL, as_hub])
class TestEveryContainer:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("rows", "schema", "slices"),
        [
            (document_rows, DOCUMENTS, ["arxiv", None, None, "github"] * 2),
            (described_rows, DESCRIBED, ["arxiv", None, None]),
        ],
        ids=["meta an object", "meta as JSON"],
    )
    def test_documents_and_their_slices(self, container, rows, schema, slices, tmp_path):
        with opened(container, rows, schema, tmp_path) as source:
            own = source.files[0].slice
            expected = [(row["text"], name or own) for row, name in zip(rows, slices, strict=True)]
            assert texts_of(source) == expected
            for start in (1, 3):  # as a resumed stream does
                (file, *more) = source.files
                rest = [document.text for document in read_documents(file.fetch(), file.slice, start_row=start)]
                assert more or rest == [row["text"] for row in rows[start:]]

    @pytest.mark.parametrize(
        ("rows", "schema", "shape"),
        [(prompt_rows, PROMPTS, SHAPES[0]), (chat_rows, CHATS, SHAPES[2])],
        ids=["prompts", "chats"],
    )
    def test_examples(self, container, rows, schema, shape, chat_tokenizer, tmp_path):
        reference = ExampleEncoder(chat_tokenizer, shape, 500, False)
        expected = examples(reference, rows)
        assert sum(isinstance(example, str) for example in expected) == {CHATS: 2, PROMPTS: 1}[schema]
        with opened(container, rows, schema, tmp_path) as source:
            assert find_shape(source, chat_tokenizer) == shape
            encoder = ExampleEncoder(chat_tokenizer, shape, 500, False)
            assert examples(encoder, rows_of(source)) == expected
            dataset = InstructionDataset(prepare_examples(source, encoder, tmp_path / "cache"))
        assert [item["input_ids"].tolist() for item in dataset] == [
            item[0] for item in expected if not isinstance(item, str)
        ]
        unused = ["column id", "message key mood"] if schema is CHATS else []
        assert encoder.unused == reference.unused == dataset.manifest["unused"] == unused


# ------------------------------------------------------------------------------------------------------- random rows

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["", " a\n", "</s>", "None"])


def objects(required, optional):
    """Draw objects whose optional fields may be absent or null, with the fields in Arrow's order."""
    found = st.fixed_dictionaries(required, optional={key: st.none() | value for key, value in optional.items()})
    return found.map(lambda row: {key: row[key] for key in (*required, *optional) if key in row})


calls = st.lists(
    objects(
        {
            "type": st.just("function"),
            "function": objects({"name": text}, {"arguments": objects({}, {"x": st.integers(0, 9), "city": text})}),
        },
        {},
    ),
    max_size=2,
)
said = st.one_of(text, text, text, text, st.none())
optional = {"name": text, "tool_calls": calls, "weight": st.integers(0, 1), "train": st.booleans(), "mood": text}
messages = objects({"role": st.sampled_from(["user", "assistant", "assistant", "tool"]), "content": said}, optional)
questions = objects({"role": st.just("user"), "content": text}, {"name": text, "mood": text})
answers = objects({"role": st.just("assistant"), "content": said}, optional)
talks = st.builds(
    lambda first, second, more: [first, second, *more], questions, answers, st.lists(messages, max_size=3)
)
tools = st.lists(
    objects({"name": text}, {"description": text, "parameters": objects({}, {"a": text, "b": text})}), max_size=2
)
chats = objects(
    {"messages": talks | st.lists(messages, max_size=2)}, {"tools": tools, "system": text, "id": st.integers(0, 9)}
)
prompts = objects(
    {"prompt": text, "completion": text},
    {"system": text, "history": st.lists(st.lists(text, min_size=2, max_size=2), max_size=2)},
)
documents = objects(
    {},
    {
        "text": text,
        "meta": objects({}, {"red_pajama_subset": text, "year": st.integers(0, 9)}),
        "red_pajama_subset": text,
    },
)


class TestRandomRows:
    @settings(deadline=None, max_examples=40)
    @given(st.lists(chats, min_size=1, max_size=6), st.lists(prompts, min_size=1, max_size=6), st.sampled_from(LOCAL))
    def test_examples(self, chat_tokenizer, chats, prompts, container):
        for rows, schema, shape in ((chats, CHATS, SHAPES[2]), (prompts, PROMPTS, SHAPES[0])):
            reference, encoder = (ExampleEncoder(chat_tokenizer, shape, 500, False) for _ in range(2))
            with tempfile.TemporaryDirectory() as folder, opened(container, rows, schema, Path(folder)) as source:
                assert examples(encoder, rows_of(source)) == examples(reference, rows)
            assert encoder.unused == reference.unused

    @settings(deadline=None, max_examples=40)
    @given(st.lists(documents, min_size=1, max_size=6), st.sampled_from(LOCAL))
    def test_documents(self, documents, container):
        documents = [{"text": "first"}, *documents]
        with tempfile.TemporaryDirectory() as folder, opened(container, documents, DOCUMENTS, Path(folder)) as source:
            own = source.files[0].slice
            expected = [
                (
                    row.get("text"),
                    row.get("red_pajama_subset") or (row.get("meta") or {}).get("red_pajama_subset") or own,
                )
                for row in documents
            ]
            assert texts_of(source) == expected
