"""Rows of every shape become ids and labels, checked id by id; folders of them; packs, padding and order by length."""

import functools
import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import instruction_data
from console import InputError
from data_order import ShardedSampler
from data_utils import IGNORE_INDEX, MANIFEST_NAME, load_tokenizer
from dataset_sources import resolve_source
from instruction_data import (
    ExampleEncoder,
    InstructionDataset,
    LengthGroupedOrder,
    find_shape,
    pack,
    prepare_examples,
    separator,
)

PROMPTED, INSTRUCTED, CHAT = instruction_data.SHAPES
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }} {{ eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
ROWS = [
    {"prompt": "Name a colour.\n\nAnswer:", "completion": "green"},
    {"prompt": "Count to three: ", "completion": "1 2 3"},
    {"prompt": "def add(a, b):\n", "completion": "    return a + b"},
    {"prompt": "un", "completion": " breakable </s>"},
    {"prompt": "", "completion": "nothing was asked"},
    {"prompt": "日本語 é", "completion": "\n\n😀"},
]


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Like Llama 3's: no space before a text, and tokens of two line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in ROWS for text in row.values()] + ["Answer:green", "\n\n", "\n\n1 2 3", "0|"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=["sentencepiece", "byte level"])
def tokenizer(request, sample_tokenizer):
    return sample_tokenizer if request.param == "sentencepiece" else request.getfixturevalue("byte_level_tokenizer")


def encoded(tokenizer, *rows, shape=PROMPTED, max_length=200, train_on_prompt=False):
    return list(ExampleEncoder(tokenizer, shape, max_length, train_on_prompt).encode(rows))


def learned(example):
    return [int(token) for token, label in zip(example.ids, example.labels, strict=True) if label]


class TestPromptAndCompletion:
    def test_id_by_id(self, sample_tokenizer):
        ids = functools.partial(sample_tokenizer.encode, add_special_tokens=False)
        (example,) = encoded(sample_tokenizer, {"prompt": "Name a colour: ", "completion": "the green"})
        prompt, answer = ids("Name a colour: "), ids("\nthe green")[len(ids("\n")) :]
        assert example.ids.tolist() == [1, *prompt, *answer, 2]
        assert example.labels.tolist() == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)

    @pytest.mark.parametrize("row", ROWS)
    def test_the_prompt_is_tokenized_as_it_will_be_asked_and_the_text_is_whole(self, tokenizer, row):
        (example,) = encoded(tokenizer, row)
        prompt = tokenizer(row["prompt"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        given = 1 + len(prompt)
        assert example.ids[:given].tolist() == [tokenizer.bos_token_id, *prompt]
        assert example.labels.tolist() == [False] * given + [True] * (len(example.ids) - given)
        assert example.ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(example.ids[1:-1], clean_up_tokenization_spaces=False)
        assert text.removeprefix(" ") == row["prompt"] + separator(**row) + row["completion"]

    @pytest.mark.parametrize(
        ("prompt", "completion", "between"),
        [("a", "b", " "), ("a ", "b", ""), ("a\n", "b", ""), ("a", " b", ""), ("a", "\tb", ""), ("", "b", "")],
    )
    def test_separator(self, prompt, completion, between):
        assert separator(prompt, completion) == between

    def test_where_the_joined_text_has_a_token_border_its_ids_are_taken(self, tokenizer):
        row = ROWS[0]
        whole = tokenizer(row["prompt"] + " green", add_special_tokens=False)["input_ids"]
        (example,) = encoded(tokenizer, row)
        assert example.ids[1:-1].tolist() == whole

    def test_a_token_that_would_span_the_border_is_not_used(self, byte_level_tokenizer):
        spanning = {"prompt": "Answer:\n", "completion": "\n1 2 3"}
        prompt = byte_level_tokenizer.encode("Answer:\n", add_special_tokens=False)
        whole = byte_level_tokenizer.encode("Answer:\n\n1 2 3", add_special_tokens=False)
        assert whole[: len(prompt)] != prompt  # the tokenizer would join the two line ends
        (example,) = encoded(byte_level_tokenizer, spanning)
        assert example.ids[1 : 1 + len(prompt)].tolist() == prompt
        assert byte_level_tokenizer.decode(example.ids[1:-1]) == "Answer:\n\n1 2 3"

    def test_spelled_out_special_tokens_are_text(self, tokenizer):
        (example,) = encoded(tokenizer, ROWS[3])
        assert Counter(example.ids.tolist())[tokenizer.eos_token_id] == 1

    def test_train_on_prompt(self, tokenizer):
        (example,) = encoded(tokenizer, ROWS[0], train_on_prompt=True)
        assert example.labels.tolist() == [False] + [True] * (len(example.ids) - 1)

    def test_cut_to_max_length_as_long_as_a_label_is_left(self, sample_tokenizer):
        (whole,) = encoded(sample_tokenizer, ROWS[0])
        prompt = len(whole.ids) - whole.labels.sum()
        (cut,) = encoded(sample_tokenizer, ROWS[0], max_length=prompt + 1)
        assert not whole.cut
        assert cut.cut
        assert cut.ids.tolist() == whole.ids[: prompt + 1].tolist()
        assert learned(cut) == learned(whole)[:1]
        (reason,) = encoded(sample_tokenizer, ROWS[0], max_length=prompt)
        assert reason == f"no token of the completion within --max_length {prompt}"

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "a"}, "completion missing or null"),
            ({"prompt": "a", "completion": None}, "completion missing or null"),
            ({"prompt": "a", "completion": ""}, "completion empty"),
            ({"prompt": ["a"], "completion": "b"}, "prompt not a string"),
            ({"prompt": "\ud800", "completion": "b"}, "prompt with unpaired surrogates"),
        ],
    )
    def test_what_cannot_be_used(self, sample_tokenizer, row, reason):
        assert encoded(sample_tokenizer, ROWS[0], row, ROWS[1])[1] == reason


class TestInstructions:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Instruction: Add.\nInput: 1 2\nOutput:"),
            ({"instruction": "Add.", "input": "", "output": "3"}, "Instruction: Add.\nOutput:"),
            ({"instruction": "Add.", "output": "3"}, "Instruction: Add.\nOutput:"),
        ],
    )
    def test_are_prompts_in_a_frame(self, sample_tokenizer, row, prompt):
        (example,) = encoded(sample_tokenizer, row, shape=INSTRUCTED)
        (same,) = encoded(sample_tokenizer, {"prompt": prompt, "completion": "3"})
        assert example.ids.tolist() == same.ids.tolist()
        assert example.labels.tolist() == same.labels.tolist()


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


class TestChat:
    @pytest.fixture
    def chat_tokenizer(self, sample):
        tokenizer = load_tokenizer(str(sample / "tokenizer"))
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    def test_every_answer_is_learned_and_nothing_else(self, chat_tokenizer):
        messages = turns("what is 1 + 1", "it is 2", "and 2 + 2", "it is 4", "thanks")
        (example,) = encoded(chat_tokenizer, {"messages": messages}, shape=CHAT)
        assert example.ids.tolist() == chat_tokenizer.apply_chat_template(messages[:4])
        assert Counter(example.ids.tolist())[chat_tokenizer.bos_token_id] == 1
        answers = chat_tokenizer.decode(learned(example))
        assert answers.split() == ["it", "is", "2", "</s>", "it", "is", "4", "</s>"]
        asked = chat_tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)
        assert example.ids[: len(asked)].tolist() == asked  # what a chat program feeds before the second answer

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            (None, "messages not a list of objects"),
            ([{"role": "user"}], "content missing or null"),
            (turns("hello"), "messages without an answer of the role assistant"),
            ([{"role": "critic", "content": "a"}, *turns("a", "b")], "messages that the chat template refuses"),
        ],
    )
    def test_what_cannot_be_used(self, chat_tokenizer, messages, reason):
        assert encoded(chat_tokenizer, {"messages": messages}, shape=CHAT) == [reason]

    def test_a_template_that_changes_what_it_wrote(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        reason = "messages that the chat template renders otherwise once another follows"
        assert encoded(chat_tokenizer, {"messages": turns("a", "b")}, shape=CHAT) == [reason]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve_source(str(path))


def error_of(function, *arguments):
    """The single line of the InputError that a call ends in."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFindShape:
    @pytest.mark.parametrize(
        ("row", "shape"),
        [
            ({"prompt": "", "completion": "", "meta": 1}, PROMPTED),
            ({"instruction": "", "input": "", "output": ""}, INSTRUCTED),
        ],
    )
    def test_by_the_columns(self, tmp_path, sample_tokenizer, row, shape):
        assert find_shape(write_rows(tmp_path / "rows.jsonl", [row]), sample_tokenizer) == shape

    def test_lists_the_columns_of_another_data_set(self, tmp_path, sample_tokenizer):
        source = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
        assert error_of(find_shape, source, sample_tokenizer) == (
            "--dataset: rows.jsonl has the columns question, answer, not 'prompt' and 'completion', "
            "or 'instruction' and 'output', or 'messages'; rename them"
        )

    def test_a_chat_needs_a_template(self, tmp_path, sample_tokenizer):
        source = write_rows(tmp_path / "rows.jsonl", [{"messages": turns("a", "b")}])
        assert "--tokenizer: it has no chat template" in error_of(find_shape, source, sample_tokenizer)


@pytest.fixture
def prepare(tmp_path, sample_tokenizer):
    """Prepares rows and gives the folder."""

    def prepare(rows, max_length=64, train_on_prompt=False, tokenizer=sample_tokenizer):
        path = tmp_path / f"rows-{len(rows)}.jsonl"
        source = resolve_source(str(path)) if path.exists() else write_rows(path, rows)
        encoder = ExampleEncoder(tokenizer, PROMPTED, max_length, train_on_prompt)
        return prepare_examples(source, encoder, tmp_path / "cache")

    return prepare


class TestPreparedFolder:
    @pytest.mark.parametrize("parallel_bytes", [2**30, 0])
    def test_holds_every_example_and_counts_the_rest(self, prepare, sample_tokenizer, monkeypatch, parallel_bytes):
        monkeypatch.setattr(instruction_data, "PARALLEL_BYTES", parallel_bytes)
        rows = [*ROWS, {"prompt": "a"}, {"prompt": "word " * 100, "completion": "b"}] * 200  # several batches
        dataset = InstructionDataset(prepare(rows))
        expected = [
            example for example in encoded(sample_tokenizer, *rows, max_length=64) if not isinstance(example, str)
        ]
        assert len(dataset) == len(expected) == 6 * 200
        for item, example in zip(dataset, expected, strict=False):
            assert item["input_ids"].tolist() == example.ids.tolist()
            labels = np.where(example.labels, example.ids, IGNORE_INDEX)
            assert item["labels"].tolist() == labels.tolist()
        assert dataset.manifest["skipped"] == {
            "completion missing or null": 200,
            "no token of the completion within --max_length 64": 200,
        }
        assert "200 with completion missing or null" in dataset.description
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[7]["labels"], dataset[7]["labels"])

    def test_is_used_again_and_made_anew_for_whatever_changes_it(self, prepare, byte_level_tokenizer):
        first = prepare(ROWS)
        made = (first / "tokens.bin").stat().st_mtime_ns
        assert prepare(ROWS) == first
        assert (first / "tokens.bin").stat().st_mtime_ns == made
        folders = [prepare(ROWS, max_length=32), prepare(ROWS, train_on_prompt=True)]
        folders += [prepare(ROWS, tokenizer=byte_level_tokenizer), prepare(ROWS[:4])]
        assert len({first, *folders}) == 5
        fingerprints = {InstructionDataset(folder, packed).fingerprint for folder in folders for packed in (0, 1)}
        assert len(fingerprints) == 8

    def test_no_usable_row(self, prepare, tmp_path):
        long = [{"prompt": "word " * 100, "completion": "b"}] * 3
        message = error_of(prepare, long)
        assert "has no usable row (skipped: 3 with no token of the completion within --max_length 64)" in message
        assert list((tmp_path / "cache").glob("*/")) == []

    def test_damaged_folder(self, prepare):
        folder = prepare(ROWS)
        (folder / "labels.bin").write_bytes(b"")
        assert f"--dataset: {folder / 'labels.bin'} has 0 bytes instead of" in error_of(InstructionDataset, folder)

    def test_a_build_that_is_killed_leaves_nothing_that_looks_complete(self, prepare, monkeypatch):
        monkeypatch.setattr(instruction_data, "pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(ROWS)
        monkeypatch.undo()
        assert (prepare(ROWS) / MANIFEST_NAME).is_file()


class TestBatches:
    def test_are_padded_to_the_longest_rounded_up(self, prepare):
        dataset = InstructionDataset(prepare(ROWS))
        items = [dataset[0], dataset[4]]
        batch = dataset.collate(items)
        lengths = [len(item["labels"]) for item in items]
        assert batch["input_ids"].shape == batch["labels"].shape == (2, -(-max(lengths) // 8) * 8)
        assert batch["token_count"].tolist() == [sum(lengths)]
        for item, ids, labels in zip(items, batch["input_ids"], batch["labels"], strict=True):
            assert torch.equal(ids[: len(item["labels"])], item["input_ids"])
            assert torch.equal(labels[: len(item["labels"])], item["labels"])
            assert (labels[len(item["labels"]) :] == IGNORE_INDEX).all()

    def test_to_a_multiple_that_sequence_parallelism_divides(self, prepare):
        dataset = InstructionDataset(prepare(ROWS), multiple=3)
        assert dataset.collate([dataset[0]])["labels"].shape == (1, 24)

    def test_packs_hold_every_example_once_and_apart(self, prepare):
        folder = prepare(ROWS * 7)
        alone, packed = InstructionDataset(folder), InstructionDataset(folder, packed=True)
        seen = []
        for item in packed:
            assert len(item["input_ids"]) <= 64
            starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), len(item["labels"])]
            for first, last in itertools.pairwise(starts):
                assert item["position_ids"][first:last].tolist() == list(range(last - first))
                seen.append((item["input_ids"][first:last].tolist(), item["labels"][first:last].tolist()))
        expected = [(item["input_ids"].tolist(), item["labels"].tolist()) for item in alone]
        assert sorted(seen) == sorted(expected)
        assert len(packed) * 64 < 1.2 * alone.manifest["tokens"]
        batch = packed.collate([packed[0], packed[1]])
        assert batch["position_ids"].shape == batch["labels"].shape
        assert (batch["position_ids"] == 0).sum() >= (packed[0]["position_ids"] == 0).sum() * 2 - 1

    @settings(deadline=None, max_examples=50)
    @given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80))
    def test_packing(self, lengths):
        packs = pack(lengths, 30)
        assert sorted(example for members in packs for example in members) == list(range(len(lengths)))
        sizes = [sum(lengths[example] for example in members) for members in packs]
        assert max(sizes) <= 30
        assert sum(size <= 15 for size in sizes) <= 1  # else two of them would have become one


class LengthsOnly:
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, index):
        return self.lengths[index]


class TestLengthGroupedOrder:
    @settings(deadline=None, max_examples=30)
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
        seed=st.integers(0, 2**32),
        group=st.integers(1, 9),
    )
    def test_each_epoch_has_every_sequence_once_whatever_is_asked_first(self, lengths, seed, group):
        dataset, count = LengthsOnly(lengths), len(lengths)
        order = LengthGroupedOrder(dataset, seed, group)
        forward = [order[position] for position in range(3 * count)]
        backward = [LengthGroupedOrder(dataset, seed, group)[position] for position in reversed(range(3 * count))]
        assert forward == backward[::-1]
        for epoch in range(3):
            assert sorted(forward[epoch * count : (epoch + 1) * count]) == list(range(count))

    def test_groups_are_of_like_length_and_differ_from_epoch_to_epoch(self):
        generator = np.random.default_rng(0)
        lengths = generator.integers(10, 1000, 4096)
        order = LengthGroupedOrder(LengthsOnly(lengths), 42, 16)
        epochs = [[order[epoch * 4096 + position] for position in range(4096)] for epoch in range(2)]
        groups = [np.array(epoch).reshape(-1, 16) for epoch in epochs]
        padded = sum(lengths[group].max() * 16 for group in groups[0])
        assert padded < 1.02 * lengths.sum()  # 1.8 times in a plain order
        together = [{frozenset(group.tolist()) for group in epoch} for epoch in groups]
        assert len(together[0] & together[1]) == 0
        means = [lengths[group].mean() for group in groups[0]]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2  # not from short to long

    def test_ranks_share_it_and_a_resume_on_others_goes_on(self):
        dataset = LengthsOnly(list(range(100)))
        whole = [LengthGroupedOrder(dataset, 1, 8)[position] for position in range(150)]

        def read(ranks, start, stop):
            order = functools.partial(LengthGroupedOrder, dataset, group_size=8)
            shares = [
                list(ShardedSampler(dataset, ranks, rank, seed=1, start=start, stop=stop, order=order))
                for rank in range(ranks)
            ]
            return [index for step in zip(*shares, strict=True) for index in step]

        assert read(2, 0, 60) + read(3, 60, 150) == whole
