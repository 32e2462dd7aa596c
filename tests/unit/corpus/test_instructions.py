"""Rows of every shape become ids and labels, checked id by id."""

import functools
from collections import Counter

import pytest
from transformers import AutoTokenizer

from corpora import error_of
from corpus.instructions import ExampleEncoder, find_shape, separator
from corpus.tokenizer import load_tokenizer
from instruction_rows import CHAT, INSTRUCTED, PROMPTED, ROWS, encoded, write_rows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }} {{ eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)


@pytest.fixture(params=["sentencepiece", "byte level"])
def tokenizer(request, sample_tokenizer):
    return sample_tokenizer if request.param == "sentencepiece" else request.getfixturevalue("byte_level_tokenizer")


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

    @pytest.mark.parametrize("completion", ["</s>", "one </s> two", "one two </s>"])
    def test_a_completion_that_spells_eos_has_one_of_its_own(self, tokenizer, sample, completion):
        slow = AutoTokenizer.from_pretrained(sample / "tokenizer", use_fast=False)
        for other in (tokenizer, slow):
            (example,) = encoded(other, {"prompt": "Say", "completion": completion})
            ids = other("Say", add_special_tokens=False, split_special_tokens=True)["input_ids"]
            spelled = ExampleEncoder(other, PROMPTED, 9, False).encoder.tokenize(["Say", "Say " + completion])
            assert spelled[0] == ids
            assert example.ids.tolist() == [other.bos_token_id, *spelled[1], other.eos_token_id]
            assert example.labels[-1]

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
    def test_system_and_history_stand_before_the_prompt(self, sample_tokenizer):
        columns = {"system": "Be brief.", "history": [["One?", "1"], ["Two?\n", "2"]]}
        turns = "Instruction: One?\nOutput: 1\n\nInstruction: Two?\n\nOutput: 2\n\n"
        for row, shape, prompt in [
            ({"instruction": "Three?", "output": "3"}, INSTRUCTED, f"Be brief.\n\n{turns}Instruction: Three?\nOutput:"),
            ({"prompt": "Three?", "completion": "3"}, PROMPTED, "Be brief.\n\nOne? 1\n\nTwo?\n2\n\nThree?"),
        ]:
            (example,) = encoded(sample_tokenizer, {**row, **columns}, shape=shape)
            (same,) = encoded(sample_tokenizer, {"prompt": prompt, "completion": "3"})
            assert example.ids.tolist() == same.ids.tolist()
            assert example.labels.tolist() == same.labels.tolist()

    @pytest.mark.parametrize(
        ("columns", "reason"),
        [
            ({"system": 3}, "system not a string"),
            ({"history": [["a"]]}, "history not a list of pairs of strings"),
            ({"history": {"a": "b"}}, "history not a list of pairs of strings"),
            ({"history": [["\ud800", ""]]}, "history with unpaired surrogates"),
            ({"history": "a"}, "history a string that is not JSON"),
            ({"input": 0}, "input not a string"),
            ({"input": []}, "input not a string"),
        ],
    )
    def test_what_cannot_be_used(self, sample_tokenizer, columns, reason):
        assert encoded(sample_tokenizer, {"instruction": "a", "output": "b", **columns}, shape=INSTRUCTED) == [reason]

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

    def test_a_greeting_that_answers_nothing_is_given(self, chat_tokenizer):
        messages = [{"role": "assistant", "content": "welcome"}, *turns("what is 1 + 1", "it is 2")]
        (example,) = encoded(chat_tokenizer, {"messages": messages}, shape=CHAT)
        assert example.ids.tolist() == chat_tokenizer.apply_chat_template(messages)
        assert chat_tokenizer.decode(learned(example)).split() == ["it", "is", "2", "</s>"]

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            (None, "messages not a list of objects"),
            ([{"role": "user"}], "content missing or null"),
            (turns("hello"), "messages without an answer of the role assistant"),
            ([{"role": "assistant", "content": "welcome"}], "messages without an answer of the role assistant"),
            ([{"role": "critic", "content": "a"}, *turns("a", "b")], "messages that the chat template refuses"),
        ],
    )
    def test_what_cannot_be_used(self, chat_tokenizer, messages, reason):
        assert encoded(chat_tokenizer, {"messages": messages}, shape=CHAT) == [reason]

    def test_a_template_that_changes_what_it_wrote(self, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        reason = "messages that the chat template renders otherwise once another follows"
        assert encoded(chat_tokenizer, {"messages": turns("a", "b")}, shape=CHAT) == [reason]


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

    @pytest.mark.parametrize("empty", [{}, {"prompt": None, "completion": None}])
    def test_a_null_counts_as_absent(self, tmp_path, sample_tokenizer, empty):
        rows = [{**empty, "instruction": "a"}, {**empty, "instruction": "a", "output": "b"}]
        assert find_shape(write_rows(tmp_path / "rows.jsonl", rows), sample_tokenizer) == INSTRUCTED
        rows = [{"prompt": "a", "completion": None}]
        assert find_shape(write_rows(tmp_path / "null.jsonl", rows), sample_tokenizer) == PROMPTED

    def test_lists_the_columns_of_another_data_set(self, tmp_path, sample_tokenizer):
        source = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
        assert error_of(find_shape, source, sample_tokenizer) == (
            "--dataset: rows.jsonl has the columns question, answer, not 'prompt' and 'completion', "
            "or 'instruction' and 'output', or 'messages'; rename them"
        )

    def test_tells_what_to_rename_in_sharegpt(self, tmp_path, sample_tokenizer):
        talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        source = write_rows(tmp_path / "rows.jsonl", [{"id": "1", "conversations": talk}])
        line = error_of(find_shape, source, sample_tokenizer)
        assert line.startswith("--dataset: rows.jsonl has the columns id, conversations, not 'prompt' and 'completion'")
        assert line.endswith(
            "; rename 'conversations' to 'messages', in it the keys 'from' to 'role' and 'value' to 'content', "
            "and the roles 'human' to 'user' and 'gpt' to 'assistant'"
        )

    def test_a_chat_needs_a_template(self, tmp_path, sample_tokenizer):
        source = write_rows(tmp_path / "rows.jsonl", [{"messages": turns("a", "b")}])
        assert "--tokenizer: it has no chat template" in error_of(find_shape, source, sample_tokenizer)
