"""End-to-end runs of finetune.py: learning, parity with a plain loop, resuming, adapters and refused input."""

import functools
import io
import itertools
import json
import keyword
import math
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import finetune as program
from checkpointing.adapters import Lora
from corpora import error_of
from corpus.examples import prepare_examples
from corpus.instructions import ExampleEncoder
from corpus.sources import resolve_source
from data_utils import InstructionDataset
from hub_server import Branches, HubServer
from launching import optimizer_states, start_finetune
from model_utils import ParameterSpec, initial_weight, load_config, plain_name
from runs import SEED
from runtime.console import InputError
from runtime.process import USAGE_ERROR
from scripts import export_hf, generate
from training import session
from training.flags import take

EXAMPLES = 24
GLOBAL_BATCH = 8
EPOCHS = 2
STEPS = EPOCHS * EXAMPLES // GLOBAL_BATCH
LR = 3e-3
TIMES = {  # metrics that vary between runs
    *("tokens_per_second", "tflops", "mfu", "data_wait", "memory_gb", "hours", "goodput"),
    *("slowest_rank", "rank_spread", "waiting"),
}


def rows() -> list[dict[str, str]]:
    """Return questions of similar length, with answers of one to three words."""
    words = keyword.kwlist[: EXAMPLES + 3]
    return [
        {"prompt": f"Which keyword comes after {word}?", "completion": " ".join(words[n + 1 : n + 2 + n % 3])}
        for n, word in enumerate(words[:EXAMPLES])
    ]


@pytest.fixture(scope="session")
def instructions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("instructions") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="session")
def model_folder(pretrain) -> Path:
    """Pretrain a model briefly, and add the files that such folders have on the hub."""
    folder = pretrain("-p", "zero2", "-x", "bf16", "-b", 8, "--lr", "3e-3", "--max_steps", 200).save_dir / "final"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "do_sample": True}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="session")
def finetune(tmp_path_factory, model_folder, instructions, cache_dir):
    """Return a function that runs finetune.py to its successful end."""
    numbers, root = itertools.count(), tmp_path_factory.mktemp("finetuned")

    def finetune(*args, **kwargs):
        flags = ["--model_path", model_folder, "-d", instructions, "--cache_dir", cache_dir, "-e", EPOCHS, "--lr", LR]
        with start_finetune(*flags, *args, folder=root / str(next(numbers)), **kwargs) as run:
            run.wait()
            assert run.returncode == 0, run.output()
            return run

    return finetune


def test_a_pretrained_model_learns_the_completions_and_where_they_end(finetune):
    run = finetune("-p", "zero2", "-x", "bf16", "-b", 8, "-e", 60, "--lr", "1e-2")
    assert "data: 24 examples" in run.stdout
    model = AutoModelForCausalLM.from_pretrained(run.save_dir / "final")
    tokenizer = AutoTokenizer.from_pretrained(run.save_dir / "final")
    for row in rows():
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert output[0, -1] == tokenizer.eos_token_id
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] : -1])
        assert answer.strip() == row["completion"]
    assert (model.generation_config.eos_token_id, model.generation_config.do_sample) == ([2, 7], True)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_the_default_data_set_and_its_tasks_on_the_hub(model_folder, tmp_path):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), out)
    tasks = ("self_instruct", "super_natural_instructions")
    converted = {f"{task}/train/0000.parquet": out.getvalue() for task in tasks}
    branches = {"main": {"self_instruct.py": b"import datasets"}, "refs/convert/parquet": converted}
    with HubServer({"yizhongw/self_instruct": Branches(branches)}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        flags = ["--model_path", model_folder, "--cache_dir", tmp_path / "cache", "--dry_run"]
        requests = []
        for task, status, processes in ((["--task_name", "none"], USAGE_ERROR, 1), ([], 0, 1), ([], 0, 2)):
            seen = len(hub.requests)
            with start_finetune(*flags, *task, folder=tmp_path / "run", processes=processes, env=environment) as run:
                assert run.wait() == status, run.output()
            if status:
                assert f"has no configuration none; choose of {', '.join(tasks)}" in run.stderr
                continue
            assert "data: 24 examples" in run.stdout
            assert hub.downloads("/super_natural_instructions/train/0000.parquet") == [None]
            requests.append(sum("/api/" in path for _, path, _ in hub.requests[seen:]))
        assert requests[0] == requests[1]  # the second rank asks for nothing
        assert hub.downloads("/self_instruct/train/0000.parquet") == []


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="session")
def plain_training(model_folder, instructions, sample_tokenizer, cache_dir):
    """Return a plain loop over single, unpadded examples; a step's loss is the mean over its labels."""

    @functools.cache
    def train(dtype: torch.dtype, lora: bool = False, folder: Path = model_folder) -> list[float]:
        encoder = ExampleEncoder(sample_tokenizer, ("prompt", "completion"), 128, train_on_prompt=False)
        dataset = InstructionDataset(prepare_examples(resolve_source(str(instructions)), encoder, cache_dir))
        dataset.fix_order({}, GLOBAL_BATCH)
        order = dataset.order(SEED)
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    spec = ParameterSpec(plain_name(name), parameter.shape)
                    parameter.data = initial_weight(spec, load_config("test"), SEED, torch.device("cpu"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        masters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in trained]
        model.to(dtype)
        adamw = torch.optim.AdamW(masters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        losses = []
        for step in range(STEPS):
            examples = [dataset[order[step * GLOBAL_BATCH + number]] for number in range(GLOBAL_BATCH)]
            labels = sum(int((example["labels"][1:] != -100).sum()) for example in examples)
            loss = 0.0
            for example in examples:
                logits = model(example["input_ids"][None]).logits[0, :-1].float()
                part = F.cross_entropy(logits, example["labels"][1:], reduction="sum") / labels
                part.backward()
                loss += part.item()
            losses.append(loss)
            for parameter, master in zip(trained, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            warm = 1  # 3% of the steps, rounded up
            angle = math.pi * (step - warm) / (STEPS - warm)
            adamw.param_groups[0]["lr"] = LR if step < warm else 0.1 * LR + 0.45 * LR * (1 + math.cos(angle))
            adamw.step()
            for parameter, master in zip(trained, masters, strict=True):
                parameter.data.copy_(master)
        return losses

    return train


HYBRID = "-p hybrid_parallel"
FP32 = {
    "zero2": (1, "-p zero2 -b 8"),
    "zero2, 2 ranks, accumulating": (2, "-p zero2 -b 2 --accumulation_steps 2"),
    "tensor": (2, f"{HYBRID} --tp 2 --pp 1 -b 4 --accumulation_steps 2"),
    "pipeline": (2, f"{HYBRID} --tp 1 --pp 2 -b 4 --accumulation_steps 2 --microbatch_size 2"),
    "interleaved": (2, f"{HYBRID} --tp 1 --pp 2 --pp_style interleaved -b 4 --accumulation_steps 2"),
    "sequence": (2, f"{HYBRID} --tp 1 --pp 1 --sp 2 -b 8"),
}
BF16 = {
    "gemini": (2, "-p gemini -b 2 --accumulation_steps 2"),
    "gemini_auto": (1, "-p gemini_auto -b 8 -a -g"),
    "zero2_cpu": (1, "-p zero2_cpu -b 4 --accumulation_steps 2 -g"),
    "float8": (2, "-p zero2 -b 1 --accumulation_steps 4 --fp8"),  # tokens of a micro-batch are not divisible by 16
}


@pytest.mark.parametrize("layout", FP32.values(), ids=FP32)
def test_fp32(finetune, plain_training, layout):
    processes, flags = layout
    run = finetune("-x", "fp32", *flags.split(), processes=processes)
    assert run.column("loss") == pytest.approx(plain_training(torch.float32), rel=2e-5)
    assert all(0 <= padding < 0.5 for padding in run.column("padding"))


@pytest.mark.parametrize("layout", BF16.values(), ids=BF16)
def test_bf16(finetune, plain_training, layout):
    processes, flags = layout
    run = finetune("-x", "bf16", *flags.split(), processes=processes)
    assert run.column("loss") == pytest.approx(plain_training(torch.bfloat16), rel=2e-2)
    assert ("linear layers in float8 (tensorwise)" in run.stdout) == ("--fp8" in flags)


# Fields of config.json in which models on the hub differ. The context is 128 tokens, and examples have about 30.
ROPE = {"original_max_position_embeddings": 16, "factor": 8.0}
SHAPES: dict[str, dict] = {
    "linear, biases": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "dynamic, wide heads": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 32},
    "yarn, narrow heads, biases": {
        "rope_scaling": {"rope_type": "yarn", **ROPE},
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "Llama 3.2": {
        "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}
LAYOUTS = {
    "zero2": (2, "-x fp32 -p zero2 -b 2 --accumulation_steps 2"),
    "gemini": (2, "-x bf16 -p gemini -b 4 -a"),
    "tensor": (2, f"-x fp32 {HYBRID} --tp 2 --pp 1 -b 8"),
    "pipeline": (2, f"-x fp32 {HYBRID} --tp 1 --pp 2 -b 8 --microbatch_size 2"),
    "interleaved": (2, f"-x fp32 {HYBRID} --tp 1 --pp 2 --pp_style interleaved -b 8 --microbatch_size 4"),
    "sequence": (2, f"-x fp32 {HYBRID} --tp 1 --pp 1 --sp 2 -b 8"),
    "tensor x pipeline": (4, f"-x fp32 {HYBRID} --tp 2 --pp 2 -b 8 --microbatch_size 4"),
}


@pytest.fixture(scope="session")
def shaped_folder(tmp_path_factory, sample_tokenizer):
    """Return a function that makes a model's folder: random weights, biases and norms too, so that each has effect."""

    @functools.cache
    def make(shape: str) -> Path:
        folder = tmp_path_factory.mktemp("shape")
        model = LlamaForCausalLM(LlamaConfig.from_dict(load_config("test").to_dict() | SHAPES[shape]))
        chance = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=chance)
        model.save_pretrained(folder)
        sample_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_from_the_hub_train_as_transformers_does_or_are_refused(
    shape, layout, shaped_folder, finetune, plain_training, tmp_path, instructions
):
    """Observed: 3e-7 in fp32, 1e-3 in bf16; with the default rotary embedding the losses differ by 1e-2."""
    processes, flags = LAYOUTS[layout]
    folder = shaped_folder(shape)
    if SHAPES[shape].get("tie_word_embeddings") and "--pp 2" in flags:
        command = ["--model_path", folder, "-d", instructions, *flags.split()]
        with start_finetune(*command, folder=tmp_path, processes=processes) as run:
            assert run.wait() == USAGE_ERROR
        assert "error: --pp: the model ties its embeddings, which cannot be split over stages; use --pp 1" in run.stderr
        return
    run = finetune("--model_path", folder, *flags.split(), processes=processes)
    dtype, tolerance = (torch.bfloat16, 5e-3) if "bf16" in flags else (torch.float32, 3e-6)
    assert run.column("loss") == pytest.approx(plain_training(dtype, folder=folder), rel=tolerance)


def test_evaluation_on_the_split_test(finetune, instructions, tmp_path):
    """With a negligible learning rate, evaluation and training on the same rows have the same loss."""
    for split in ("train", "test"):
        shutil.copy(instructions, tmp_path / f"{split}.jsonl")
    flags = ["-d", tmp_path, "-x", "fp32", "-e", 1, "--lr", "1e-12"]
    for processes, layout in ((1, "-p zero2 -b 24"), (2, f"{HYBRID} --tp 1 --pp 2 -b 10 --microbatch_size 5")):
        run = finetune(*flags, *layout.split(), processes=processes)
        (*_, last) = run.metrics
        assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
        if processes == 1:
            expected = last["loss"]
        assert last["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_packed_examples_have_the_same_loss_per_token(finetune):
    """Take one step per epoch over all examples: unpacked in one run, packed in the other two."""
    unpacked = finetune("-x", "fp32", "-p", "zero2", "-b", EXAMPLES)
    dry = finetune("-x", "fp32", "--pack", "-b", 1, "--dry_run", "-p", "zero2")
    packs = int(dry.stdout.partition("examples in ")[2].split()[0])
    assert packs < EXAMPLES / 3
    for processes, flags in ((1, "-p zero2"), (2, f"{HYBRID} --tp 1 --pp 2 -a")):
        run = finetune("-x", "fp32", "--pack", "-b", packs, *flags.split(), processes=processes)
        assert run.column("loss") == pytest.approx(unpacked.column("loss"), rel=2e-5)
        assert run.column("tokens") == unpacked.column("tokens")
    adapters = finetune("-x", "fp32", "--pack", "-b", packs, "-e", 1, "-p", "zero2", "--lora_rank", 4)
    # New adapters change nothing.
    assert adapters.column("loss") == pytest.approx(unpacked.column("loss")[:1], rel=2e-5)


# ---------------------------------------------------------------------------------------------------------- resume


def test_resume_is_the_run_that_never_ended(finetune):
    whole = finetune("-x", "fp32", "-p", "zero2", "-b", 8, "-i", 2)
    for processes, batch in ((1, 8), (2, 4)):
        folder = whole.save_dir / "epoch0-step2"
        run = finetune("-x", "fp32", "-p", "zero2", "-b", batch, "-f", folder, processes=processes)
        for row, expected in zip(run.metrics, whole.metrics[2:], strict=True):
            exact = {key: value for key, value in row.items() if key not in (*TIMES, "loss", "grad_norm", "padding")}
            assert exact == {key: expected[key] for key in exact}
            assert row["loss"] == (expected["loss"] if processes == 1 else pytest.approx(expected["loss"], rel=2e-5))
        states, expected = (optimizer_states(each.save_dir / f"epoch1-step{STEPS}") for each in (run, whole))
        for name, value in states.items():
            if processes == 1:
                assert torch.equal(value, expected[name])
            else:
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- adapters

LORA = ["-x", "fp32", "--lora_rank", 4, "--lora_modules", "q_proj,up_proj"]
ADAPTED = {
    "zero2": (1, "-p zero2 -b 8 -i 2"),
    "zero2_cpu, 2 ranks": (2, "-p zero2_cpu -b 4"),
    "hybrid, 2 ranks": (2, f"{HYBRID} -b 2 --accumulation_steps 2"),
}


@pytest.fixture(scope="module")
def adapted(finetune):
    """Return a function that runs a layout with adapters, once."""
    return functools.cache(lambda layout: finetune(*LORA, *ADAPTED[layout][1].split(), processes=ADAPTED[layout][0]))


@pytest.mark.parametrize("layout", ADAPTED)
def test_adapters_train_as_in_a_plain_loop(adapted, plain_training, layout):
    assert adapted(layout).column("loss") == pytest.approx(plain_training(torch.float32, lora=True), rel=2e-5)


def test_adapters_write_what_the_merged_model_does(adapted, monkeypatch, capsys):
    """The adapters name their base model, so --base_model is not needed.

    Only a few tokens are compared: merging rounds the adapters to bf16, so greedy texts diverge sooner or later.
    """
    run = adapted("zero2")
    texts = []
    for model in (run.save_dir / "final", run.save_dir / f"epoch1-step{STEPS}"):
        flags = ["--model", model, "--prompt", rows()[0]["prompt"], "--temperature", 0, "--max_new_tokens", 4]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        assert generate.main() == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(rows()[0]["prompt"])


def test_checkpoints_hold_only_adapters_for_peft_and_final_the_merged_model(adapted, model_folder):
    run = adapted("zero2")
    folder = run.save_dir / f"epoch1-step{STEPS}" / "model"
    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "up_proj"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_folder)
    assert not list(folder.glob("model*"))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32)
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, folder)(ids).logits
        final = AutoModelForCausalLM.from_pretrained(run.save_dir / "final")
        merged = final(ids).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-4)
    assert final.generation_config.eos_token_id == [2, 7]


@pytest.fixture
def export(monkeypatch, sample, tmp_path):
    """Return a function that exports a checkpoint with export_hf.py and returns the folder."""

    def export(checkpoint: Path, *flags) -> Path:
        command = [
            "--checkpoint",
            checkpoint,
            "--tokenizer",
            sample / "tokenizer",
            "--output",
            tmp_path / "out",
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, command)])
        assert export_hf.main() == 0
        return tmp_path / "out"

    return export


def test_an_exported_checkpoint_of_adapters_is_merged(adapted, export, model_folder):
    folder = adapted("zero2").save_dir
    exported, final = export(folder / f"epoch1-step{STEPS}"), folder / "final"
    assert {path.name for path in exported.iterdir()} == {path.name for path in final.iterdir()}
    for path in exported.glob("*.safetensors"):
        tensors, expected = load_file(path), load_file(final / path.name)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r"--base_model: .* is not the model that the adapters were trained on"):
        export(folder / f"epoch1-step{STEPS}", "--output", f"{exported}2", "--base_model", final)
    assert not list(exported.parent.glob(".merged-*"))


def test_a_checkpoint_is_not_exported_with_a_larger_tokenizer(adapted, export, sample, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
    tokenizer.add_tokens([f"extra{n}" for n in range(8)])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(
        InputError,
        match="--tokenizer: its vocabulary of 1032 is larger than the model's of 1024",
    ):
        export(adapted("zero2").save_dir / "epoch0-step2", "--tokenizer", tmp_path / "larger")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_exported_with_another_tokenizer(adapted, export, byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.save_pretrained(tmp_path / "other")
    line = r"--tokenizer: its BOS and EOS have the ids \(0, 1\), and in the run they had \(1, 2\); give the run's"
    with pytest.raises(InputError, match=line):
        export(adapted("zero2").save_dir / "epoch0-step2", "--tokenizer", tmp_path / "other")


def test_adapters_name_their_model_by_an_absolute_path_or_hub_name(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    for given, named in ((model_folder.name, str(model_folder)), ("meta-llama/some", "meta-llama/some")):
        assert Lora(4).config(given).base_model_name_or_path == named


def test_adapters_resume(adapted, finetune):
    whole = adapted("zero2")
    same = ["--lora_alpha", 8, "--lora_modules", "up_proj,q_proj"]  # the same settings, written differently
    run = finetune(*LORA, *same, "-p", "zero2", "-b", 8, "-f", whole.save_dir / "epoch0-step2")
    assert run.column("loss") == whole.column("loss")[2:]
    states, expected = (optimizer_states(each.save_dir / f"epoch1-step{STEPS}") for each in (run, whole))
    assert all(torch.equal(value, expected[name]) for name, value in states.items())


def test_adapters_do_not_resume_with_other_base_weights(adapted, problem, model_folder, tmp_path):
    """Weights of the same sizes are told apart; the same weights split into other files are accepted."""
    flags = [*LORA, "-b", 8, "-e", EPOCHS, "--lr", LR, "-f", adapted("zero2").save_dir / "epoch0-step2"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype="auto")
    for name in ("copy", "other"):
        if name == "other":
            model.model.layers[2].mlp.up_proj.weight.data[5:] *= 1.01
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / name)
    line = problem(*flags, "-x", "fp32", model=tmp_path / "other")
    assert line.startswith("--load: the sampled fingerprint of --model_path's weights was ")
    with pytest.raises(pytest.fail.Exception, match="no problem was found"):
        problem(*flags, "-x", "fp32", model=tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_plans_for_the_longest_example_and_for_adapters(
    model_folder, instructions, cache_dir, monkeypatch, capsys
):
    def peak(*args) -> float:
        flags = ["--model_path", model_folder, "-d", instructions, "--cache_dir", cache_dir, "-p", "zero2", *args]
        monkeypatch.setattr(sys, "argv", ["finetune.py", "-b", "8", "--dry_run", *map(str, flags)])
        assert program.main() == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("<- peak")]
        return float(line.split()[-3])

    whole = peak("-l", 128)
    assert peak("-l", 64) == whole  # no example is longer than 64
    assert peak("-l", 128, "--pack", "-b", 1, "-e", 8) * 8 > whole
    assert peak("-l", 128, "--lora_rank", 4) < whole


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def problem(monkeypatch, tmp_path, model_folder, instructions):
    """Return a function that runs main() and returns its error line; main() must not get as far as launching."""

    def problem(*args, model: Path | None = model_folder, dataset: Path = instructions) -> str:
        folders = ["-o", tmp_path / "out", "-t", tmp_path / "logs", "--cache_dir", tmp_path / "cache"]
        flags = ["-p", "zero2", "-x", "bf16", "-d", dataset, *folders, *args]
        flags += ["--model_path", model] if model else []
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
        monkeypatch.setattr(session, "launch", lambda *args: pytest.fail("no problem was found"))
        with pytest.raises(InputError) as raised:
            program.main()
        (line,) = raised.value.problems
        assert "\n" not in line
        assert not (tmp_path / "out").exists()
        return line

    return problem


def write(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TestRefused:
    def test_no_model(self, problem, tmp_path):
        assert "--model_path" in problem(model=None)
        assert problem(model=tmp_path / "none").startswith(f"--model_path: {tmp_path / 'none'} does not exist")
        (tmp_path / "empty").mkdir()
        assert problem(model=tmp_path / "empty").startswith("--model_path: ")

    def test_folder_without_weights(self, problem, model_folder, tmp_path):
        bare = tmp_path / "bare"
        shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*safetensors*"))
        assert f"--model_path: {bare} holds no weights" in problem(model=bare)

    def test_tokenizer_of_a_larger_vocabulary(self, problem, model_folder, tmp_path):
        larger = AutoTokenizer.from_pretrained(model_folder)
        larger.add_tokens([f"<{number}>" for number in range(8)])
        larger.save_pretrained(tmp_path / "larger")
        line = problem("--tokenizer", tmp_path / "larger")
        assert "its vocabulary of 1032 is larger than the model's of 1024; give the model's own tokenizer" in line

    def test_columns(self, problem, tmp_path):
        line = problem(dataset=write(tmp_path / "rows.jsonl", {"text": "a"}))
        assert "rows.jsonl has the columns text, not 'prompt' and 'completion'" in line

    def test_no_row(self, problem, tmp_path):
        (tmp_path / "rows.jsonl").touch()
        assert "rows.jsonl is empty" in problem(dataset=tmp_path / "rows.jsonl")

    def test_all_too_long(self, problem, tmp_path):
        path = write(tmp_path / "rows.jsonl", *[{"prompt": "word " * 200, "completion": "b"}] * 3)
        assert "no usable row (skipped: 3 with no token of the completion within --max_length 128)" in problem(
            dataset=path
        )

    def test_rows_that_are_trained_on_are_not_evaluated_on(self, tmp_path):
        data = take(program.Data, program.parse_args(["--model_path", "model", "-d", str(tmp_path)]))
        for name, held_out in (("test.jsonl", False), ("valid.jsonl", False), ("train.jsonl", True)):
            write(tmp_path / name, *rows())
            train = program.find_source(data, "train")
            test = program.find_test_source(data, train)
            assert (test is not None) == held_out
        assert [file.path for source in (train, test) for file in source.files] == ["train.jsonl", "test.jsonl"]

    @pytest.mark.parametrize(
        ("name", "problem"),
        [("test.jsonl", "/test.jsonl is empty"), ("test.jsonl.xz", "of a kind that is not read (test.jsonl.xz)")],
    )
    def test_an_evaluation_split_that_cannot_be_read_is_refused(self, tmp_path, name, problem):
        write(tmp_path / "train.jsonl", *rows())
        (tmp_path / name).touch()
        data = take(program.Data, program.parse_args(["--model_path", "model", "-d", str(tmp_path)]))
        assert problem in error_of(program.find_test_source, data, program.find_source(data, "train"))

    def test_evaluation_split_without_a_usable_row(self, problem, tmp_path):
        write(tmp_path / "rows" / "train.jsonl", *rows())
        write(tmp_path / "rows" / "test.jsonl", {"instruction": "a", "output": ""})
        assert "test.jsonl of" in (line := problem(dataset=tmp_path / "rows"))
        assert "no usable row (skipped: 1 with output empty)" in line

    def test_task_that_is_not_there(self, problem, tmp_path):
        for task in ("first", "second"):
            (tmp_path / "tasks" / task).mkdir(parents=True)
            write(tmp_path / "tasks" / task / "rows.jsonl", *rows())
        line = problem("--task_name", "third", dataset=tmp_path / "tasks")
        assert line == f"--task_name: {tmp_path / 'tasks'} has no 'third'; choose of first, second"

    def test_adapters(self, problem):
        for flags, words in (
            ("--lora_rank 0", "--lora_rank: must be at least 1, not 0"),
            ("--lora_rank 4 --lora_modules q_proj,attn", "--lora_modules: 'attn' is not a linear module of a layer"),
            ("--lora_rank 4 -p gemini", "--lora_rank: gemini does not support LoRA; use -p zero2"),
            ("--lora_modules q_proj", "--lora_modules: takes effect only with --lora_rank"),
            ("--lora_alpha 4", "--lora_alpha: takes effect only with --lora_rank"),
        ):
            assert words in problem(*flags.split())

    def test_flags_that_only_pretraining_has(self, problem):
        assert "-c test" in problem("-c", "test")
        assert "--warmup_steps 5" in problem("--warmup_steps", 5)
        assert "above the model's context of 128 tokens" in problem("-l", 129)
