"""Text that a trained model generates."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from launching import ROOT
from model_utils import load_config
from runtime.console import InputError
from runtime.process import USAGE_ERROR
from scripts import generate

PROMPT = "def main(argument):"


@pytest.fixture
def final(finished_run):
    return finished_run.save_dir / "final"


@pytest.fixture
def write(monkeypatch, capsys, final):
    """Return a function that runs generate.py and returns its output."""

    def write(*flags, model=final, prompt=PROMPT) -> str:
        command = ["generate.py", "--model", model, "--prompt", prompt, "--max_new_tokens", 12, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        assert generate.main() == 0
        return capsys.readouterr().out

    return write


@pytest.fixture
def problem(write):
    """Return a function that runs generate.py and returns its one error line."""

    def problem(*flags, **kwargs) -> str:
        with pytest.raises(InputError) as raised:
            write(*flags, **kwargs)
        (line,) = raised.value.problems
        return line

    return problem


def test_most_probable_tokens_are_those_of_transformers(write, final):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(final, torch_dtype="auto"),
        AutoTokenizer.from_pretrained(final),
    )
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(12):
        following = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, following), dim=1)
    assert write("--temperature", 0) == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"


def with_settings(final, folder, name="generation_config.json", **settings):
    """Copy the model to `folder` with these settings in its file `name`, and return the folder."""
    file = shutil.copytree(final, folder) / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("generation_config.json", {"repetition_penalty": 50.0}),
        ("generation_config.json", {"num_beams": 4}),
        ("generation_config.json", {"num_return_sequences": 2}),
        ("config.json", {"repetition_penalty": 50.0}),
        ("config.json", {"num_beams": 4}),
    ],
)
def test_only_the_flags_choose_the_tokens(write, final, tmp_path, name, settings):
    model = with_settings(final, tmp_path / "model", name, **settings)
    assert write("--temperature", 0, model=model) == write("--temperature", 0)
    sampled = ("--temperature", 1, "--top_p", 0.9)
    assert write(*sampled, model=model) == write(*sampled)


def test_text_ends_at_the_tokens_of_the_generation_config_too(write, final, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    third = model.generate(tokens, do_sample=False, max_new_tokens=12)[0, tokens.shape[1] + 2].item()
    folder = with_settings(final, tmp_path / "model", eos_token_id=[tokenizer.eos_token_id, third])
    (expected,) = AutoModelForCausalLM.from_pretrained(folder).generate(tokens, do_sample=False, max_new_tokens=12)
    assert len(expected) <= tokens.shape[1] + 3
    assert write("--temperature", 0, model=folder) == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    # The tokenizer's own EOS ends it even if the file names another.
    folder = with_settings(final, tmp_path / "another", eos_token_id=tokenizer.unk_token_id)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    tokenizer.save_pretrained(folder)
    assert len(write("--temperature", 0, model=folder)) < len(write("--temperature", 0))


def test_a_model_saved_by_transformers_5(final, tmp_path):
    """The pinned transformers, left to itself, ignores the rope_theta that version 5 saves."""
    shutil.copytree(final, tmp_path / "newer")
    file = tmp_path / "newer" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    older = LlamaConfig.from_dict(values | {"rope_theta": 100.0})
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    file.write_text(json.dumps(values), encoding="utf-8")
    model = generate.open_model(file.parent, load_config(str(file)), None)
    assert torch.equal(model.model.rotary_emb.inv_freq, LlamaRotaryEmbedding(older).inv_freq)
    assert model.config.use_cache


def test_samples_depend_only_on_the_seed(write):
    first, again, other = (write("--seed", seed, "--temperature", 1) for seed in (1, 1, 2))
    assert first == again != other
    first, other = (write("--seed", seed, "--temperature", 1, "--top_p", 1e-9) for seed in (1, 2))
    assert first == other


def test_checkpoint_with_the_tokenizer_of_the_final_folder_or_a_given_one(
    write, problem, finished_run, sample, tmp_path
):
    last = finished_run.save_dir / "epoch0-step3"
    assert write("--temperature", 0, model=last) == write("--temperature", 0)
    copied = shutil.copytree(last, tmp_path / last.name)
    assert problem(model=copied) == f"--tokenizer: not found in {tmp_path / 'final'}; give its folder or hub name"
    assert write("--temperature", 0, "--tokenizer", sample / "tokenizer", model=copied) == write("--temperature", 0)


def test_prompt_from_standard_input(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode()), "ascii"))
    assert write("--temperature", 0, prompt="-") == write("--temperature", 0)


def test_words_are_printed_as_they_are_generated(write, monkeypatch):
    pieces = []

    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    write("--max_new_tokens", 60)
    assert len([piece for piece in pieces if piece.strip()]) > 5


def test_a_chat_follows_the_template(write, problem, final, tmp_path):
    assert "--chat: the tokenizer has no chat template" in problem("--chat")
    folder = shutil.copytree(final, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(final)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"
    )
    tokenizer.save_pretrained(folder)

    def problem_with(tokenizer):
        tokenizer.save_pretrained(folder)
        return problem("--chat", model=folder)

    assert write("--chat", model=folder).startswith(f"[user] {PROMPT} ")
    tokenizer.chat_template = {"rag": "{{ 1 }}"}
    assert "has the chat templates rag and none called 'default'" in problem_with(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    assert "--chat: messages that the chat template fails on (TypeError: " in problem_with(tokenizer)


@pytest.mark.parametrize(
    "prompt", ["x = f ( a , b ) . g ! do n't", "  def f():\n    return </s> 1\n", "<s> a", "", "日本 é\t "]
)
def test_the_prompt_is_printed_unchanged(write, final, tmp_path, prompt):
    folder = shutil.copytree(final, tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"clean_up_tokenization_spaces": True}))
    assert write("--temperature", 0, model=folder, prompt=prompt).startswith(prompt)


def test_the_output_is_the_tokenizers_text(capsys, sample_tokenizer):
    """Leading spaces survive, and so do characters that take several tokens."""
    text = "if a:\n    return '日本 😀'\n\n  # two , three"
    prompt, *new = [sample_tokenizer.bos_token_id, *sample_tokenizer.encode(text, add_special_tokens=False)]
    printer = generate.Printer(sample_tokenizer, "")
    for number in (prompt, *new, sample_tokenizer.eos_token_id):
        printer.put(torch.tensor([number]))
    printer.end()
    assert capsys.readouterr().out == text + "\n"


def test_a_prompt_that_is_not_text(problem):
    assert problem(prompt="\udcff") == "--prompt: text is not utf-8; convert it, or set the locale to match"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_new_tokens", 0], "--max_new_tokens: must be at least 1, not 0"),
        (["--temperature", "nan"], "--temperature: must be 0 or a positive number, not nan"),
        (["--temperature", -1], "--temperature: must be 0 or a positive number, not -1.0"),
        (["--top_p", 0.9, "--temperature", 0], "--top_p: has an effect only with --temperature above 0"),
        (["--top_p", 0], "--top_p: must be above 0 and at most 1, not 0.0"),
        (["--top_p", 1.5], "--top_p: must be above 0 and at most 1, not 1.5"),
        (["--seed", -1], "--seed: must be at least 0 and below 2^63, not -1"),
        (
            ["--max_new_tokens", 125],
            "tokens of the prompt and 125 new ones exceed the model's context of 128; lower it",
        ),
        (["--base_model", "elsewhere"], "has no adapters, which this flag is for"),
        (["--tokenizer", "./none"], "--tokenizer: ./none does not exist"),
        (["--model", "./none"], "--model: ./none does not exist"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_flags(problem, flags, expected):
    assert expected in problem(*flags)


def test_folders_without_a_model(problem, finished_run, tmp_path):
    for folder in (tmp_path, finished_run.save_dir):
        assert problem(model=folder) == f"--model: {folder} holds no model; give `final` or a checkpoint epochE-stepS"
    checkpoint = shutil.copytree(finished_run.save_dir / "epoch0-step3", tmp_path / "epoch0-step3")
    (checkpoint / "manifest.json").unlink()
    assert problem(model=checkpoint) == f"--model: {checkpoint} is an incomplete checkpoint; choose another"
    bare = shutil.copytree(
        finished_run.save_dir / "final", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert f"--model: {bare} lacks model-00001-of-" in problem(model=bare)


def test_weights_that_are_not_finite(problem, final, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shutil.copytree(final, tmp_path / "final"))
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "final")
    line = f"--model: lm_head.weight in {tmp_path}/final contains NaN or infinity; give a model with finite weights"
    assert problem(model=tmp_path / "final") == line


def test_exit_status(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "generate.py", "--model", tmp_path, "--prompt", "A"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (USAGE_ERROR, "", 1)
    assert done.stderr.startswith("generate.py: error: --model: ")
