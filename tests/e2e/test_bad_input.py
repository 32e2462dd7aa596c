"""Input that cannot be used: a line that names the flag, exit status 2, and nothing written."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import benchmark
import finetune
import pretrain as program
from launching import ROOT, Run, start_pretrain
from model_utils import load_config
from runtime import requirements
from runtime.console import InputError
from runtime.process import KEYBOARD_INTERRUPT, USAGE_ERROR
from training.checks import validate_args

TEXT = {"text": "Some words of an ordinary document, enough of them to make tokens. " * 20}


@pytest.fixture
def objections(monkeypatch, tmp_path, become_rank_0) -> Callable[..., list[str]]:
    """Returns the problems that a program's main() finds before it launches, given flags and a number of ranks."""

    def objections(program: ModuleType, flags: list, ranks: int = 1) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        monkeypatch.setattr(program, "launch", lambda seed: pytest.fail("nothing was objected to"))
        if ranks > 1:
            become_rank_0(ranks)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as raised:
            program.main()
        assert sorted(tmp_path.rglob("*")) == before
        assert all("\n" not in problem for problem in raised.value.problems)
        return list(raised.value.problems)

    return objections


@pytest.fixture
def problems(objections, tmp_path, sample_flags, sample_dataset) -> Callable[..., list[str]]:
    """Returns the problems that pretrain.py finds."""

    def problems(*args, ranks: int = 1) -> list[str]:
        folders = ["-o", tmp_path / "checkpoint", "-t", tmp_path / "tb_logs"]
        return objections(program, [*sample_flags, "-p", "zero2", *folders, *args], ranks)

    return problems


def config_file(folder: Path, **changes) -> Path:
    """A config.json of the model `test` with something changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**load_config("test").to_dict(), **changes}))
    return path


# ----------------------------------------------------------------------------------------------------------- the flags

HYBRID = "-p hybrid_parallel"


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("-c 8b", 1, ["--config", "8b", "7b, 13b, 30b, 65b, 70b, tiny, test"]),
        ("-p ddp", 1, ["--plugin", "ddp", "hybrid_parallel"]),
        ("-x fp8", 1, ["--mixed_precision", "fp8"]),
        ("-b many", 1, ["--batch_size", "many"]),
        ("--learning_rate 1", 1, ["--learning_rate"]),
        ("--max_step 1", 1, ["--max_step ", "did you mean --max_steps?"]),  # no guessing from the beginning of a flag
        ("--batchsize 2", 1, ["--batchsize", "did you mean --batch_size?"]),
        ("--max_steps 1e3", 1, ["--max_steps", "1e3"]),
        ("-d=", 1, ["--dataset", "empty"]),  # as a shell's variable without a value leaves it
        ("--tokenizer=", 1, ["--tokenizer", "empty"]),
        ("--save_dir=", 1, ["--save_dir", "empty"]),
        ("--tensorboard_dir=", 1, ["--tensorboard_dir", "empty"]),
        ("--cache_dir=", 1, ["--cache_dir", "empty"]),
        ("--load=", 1, ["--load", "empty"]),
        ("--config=", 1, ["--config", "empty"]),
        (f"-o {'x' * 300}", 1, ["--save_dir", "xxx", "File name too long"]),
        ("-o s3://bucket/run", 1, ["--save_dir", "is a URL", "path on this machine"]),
        ("--init_from https://huggingface.co/a/b", 1, ["--init_from", "is a URL"]),
        ("--init_from ./none", 1, ["--init_from", "no folder on this machine"]),
        ("--tokenizer https://huggingface.co/a/b", 1, ["--tokenizer", "is a URL; give the hub name a/b"]),
        ("--tokenizer a/b/", 1, ["--tokenizer", "give a/b without a slash"]),
        ("--slice_weights c4=1,c4=2", 1, ["--slice_weights", "c4 has two weights"]),
        ("--slice_weights c4=0", 1, ["--slice_weights", "above 0"]),
        ("--slice_weights c4=1,github=-1e-3", 1, ["--slice_weights", "github=-1e-3"]),
        ("--slice_weights c4=nan", 1, ["--slice_weights", "c4=nan"]),
        ("--slice_weights c4=1e400", 1, ["--slice_weights", "c4=1e400"]),
        ("--slice_weights c4=1e308,github=1e308", 1, ["--slice_weights", "lower them"]),
        ("--keep_attention -a", 1, ["--keep_attention", "nothing is recomputed", "-g"]),
        ("--keep_attention -a --recompute 0.1", 1, ["--keep_attention", "nothing is recomputed"]),  # of 4 layers
        ("--keep_attention -g", 1, ["--keep_attention", "give -a"]),
        ("--eval_fraction 0.9999", 1, ["--max_length", "--eval_fraction"]),
        ("-d no/such/folder", 1, ["--dataset", "no/such/folder"]),
        ("--tokenizer ./no/such/folder", 1, ["--tokenizer", "no/such/folder"]),
        ("-l 256", 1, ["--max_length", "256", "128"]),
        ("-b 0", 1, ["--batch_size", "0"]),
        ("-b -2", 1, ["--batch_size", "-2"]),
        ("-e 0", 1, ["--num_epochs", "0"]),
        ("-l 1", 1, ["--max_length", "1"]),
        ("-i 0", 1, ["--save_interval", "0"]),
        ("-s -1", 1, ["--warmup_steps", "-1"]),
        ("--accumulation_steps 0", 1, ["--accumulation_steps", "0"]),
        ("--max_steps 0", 1, ["--max_steps", "0"]),
        ("--seed -1", 1, ["--seed", "-1"]),
        ("--num_workers -1", 1, ["--num_workers", "-1"]),
        ("--log_interval 0", 1, ["--log_interval", "0"]),
        ("--lr 0", 1, ["--lr", "0"]),
        ("--lr nan", 1, ["--lr", "nan"]),
        ("--lr -0.1", 1, ["--lr", "-0.1"]),
        ("--lr -1e-3", 1, ["--lr", "-0.001 is not a positive number"]),
        ("--lr -inf", 1, ["--lr", "-inf is not a positive number"]),
        ("--lr -.5E2", 1, ["--lr", "-50.0"]),
        ("--lr 1e400", 1, ["--lr", "inf"]),
        ("--max_steps -1e3", 1, ["--max_steps", "-1e3"]),
        ("-w -1e-3", 1, ["--weight_decay", "-0.001"]),
        ("-s -5.", 1, ["--warmup_steps", "-5."]),
        ("-w -0.1", 1, ["--weight_decay", "-0.1"]),
        ("--gradient_clipping -1", 1, ["--gradient_clipping", "-1"]),
        ("-p gemini -x fp32", 1, ["--mixed_precision", "gemini", "zero2"]),
        ("--tp 2", 2, ["--tp", "hybrid_parallel"]),
        ("-b 4000", 1, ["--dataset", "4000"]),
        ("-b 1000 --accumulation_steps 2", 2, ["--dataset", "4000"]),
        (f"{HYBRID} --tp 8", 8, ["--tp", "8", "4 heads", "2 key-value heads"]),
        (f"{HYBRID} --tp 1 --pp 3 -b 4", 3, ["--pp", "3", "4 layers"]),
        (f"{HYBRID} --tp 2 --pp 2", 6, ["--tp/--pp/--sp", "4", "6 ranks"]),
        (f"{HYBRID} --tp 0", 1, ["--tp", "0"]),
        (f"{HYBRID} --pp -1", 1, ["--pp", "-1"]),
        (f"{HYBRID} --microbatch_size 0", 1, ["--microbatch_size", "0"]),
        (f"{HYBRID} --tp 1 --pp 2 -b 4 --microbatch_size 3", 2, ["--microbatch_size", "3", "4"]),
        (f"{HYBRID} --tp 1 --pp 2 -b 1", 2, ["--pp", "2", "1"]),
        (f"{HYBRID} --tp 1 --pp 2 --zero 2", 2, ["--zero", "2", "--pp"]),
        (f"{HYBRID} --tp 1 --pp 2 --sp 2 -b 4", 4, ["--sp", "--pp"]),
        (f"{HYBRID} --tp 1 --pp 1 --sp 2 -l 63", 2, ["--sp", "2", "63"]),
        (f"{HYBRID} --tp 1 --pp 1 --zero 1 -x fp32", 2, ["--zero", "1", "fp32"]),
        ("-f no/such/folder", 1, ["--load", "no/such/folder"]),
    ],
)
def test_flags(problems, flags, ranks, expected):
    (problem,) = problems(*flags.split(), ranks=ranks)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model_path {model} -c test", ["unrecognized arguments: -c test"]),
        ("--model_path {model} --warmup_steps 5", ["unrecognized arguments: --warmup_steps 5"]),
        ("-b 2", ["required", "--model_path"]),
        ("--model_path=", ["--model_path", "empty"]),
        ("--model_path {run}", ["--model_path", "has no config.json", "`final`"]),
        ("--model_path {run}/epoch0-step2", ["--model_path", "has no config.json", "`model`"]),
        ("--model_path {run}/epoch0-step2/model", ["--tokenizer", "holds neither", "give a folder"]),
        ("--model_path ./none", ["--model_path", "./none", "give a model folder or a hub name"]),
        ("--model_path {rows}", ["--model_path", "is a file; give the folder"]),
        ("--model_path {data}", ["--model_path", "config.json"]),
        ("--model_path {adapter}", ["--model_path", "an adapter for OWNER/BASE; merge them", "OWNER/BASE"]),
        ("--model_path {pointer}", ["--model_path", "config.json is a Git LFS pointer", "git lfs pull"]),
        ("--model_path {model} --tokenizer {pointer}", ["--tokenizer", "tokenizer.model is a Git LFS pointer"]),
        ("--model_path https://huggingface.co/a/b", ["--model_path", "is a URL; give the hub name a/b"]),
        ("--model_path a/b/", ["--model_path", "give a/b without a slash"]),
        ("--model_path {model} --lr -1e-3", ["--lr", "-0.001"]),
        ("--model_path {model} --lora_rank 4 --lora_alpha -1e-3", ["--lora_alpha", "-0.001"]),
        ("--model_path {model} -p 3d", ["--plugin", "3d", "hybrid_parallel"]),
        ("--model_path {model} -l 129", ["--max_length", "129", "128"]),
        ("--model_path {model} -e 0", ["--num_epochs", "0"]),
        ("--model_path {model} --eval_interval 0", ["--eval_interval", "0"]),
        ("--model_path {model} --lr inf", ["--lr", "inf"]),
        ("--model_path {model} -d ./none", ["--dataset", "./none"]),
        ("--model_path {model} -d {data}", ["columns", "'prompt' and 'completion'"]),
        ("--model_path {model} --tokenizer ./none", ["--tokenizer", "./none"]),
        ("--model_path {model} -f {model}", ["--load", "--model_path"]),
        ("--model_path {model} -b 4000", ["--dataset", "4000", "lower --batch_size"]),
        ("--model_path {model} --lora_rank 0", ["--lora_rank", "0", "1"]),
        ("--model_path {model} --lora_rank 4 -p gemini", ["--lora_rank", "gemini", "use -p zero2"]),
        ("--model_path {model} --lora_rank 4 --lora_modules attn", ["--lora_modules", "'attn'", "q_proj"]),
        ("--model_path {model} --lora_rank 4 --lora_alpha 0", ["--lora_alpha", "0", "positive"]),
        ("--model_path {model} --lora_alpha 4", ["--lora_alpha", "--lora_rank"]),
        ("--model_path {model} --gpus 8", ["--gpus", "--dry_run"]),
    ],
)
def test_flags_of_finetune(objections, finished_run, sample, cache_dir, tmp_path, flags, expected):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What?", "completion": "That."}) + "\n")
    for name in ("adapter", "pointer"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "OWNER/BASE"}')
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "pointer" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    places = {
        "adapter": tmp_path / "adapter",
        "pointer": tmp_path / "pointer",
        "run": finished_run.save_dir,
        "model": finished_run.save_dir / "final",
        "data": sample / "data",
        "rows": rows,
    }
    data = ["-d", rows, "--cache_dir", cache_dir, "-p", "zero2", "-x", "bf16"]
    folders = ["-o", tmp_path / "checkpoint", "-t", tmp_path / "tb_logs"]
    (problem,) = objections(finetune, [*data, *folders, *(flag.format(**places) for flag in flags.split())])
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("-c 8b", 1, ["--config", "8b", "7b, 13b"]),
        ("-p ddp", 1, ["--plugin", "ddp", "fsdp"]),
        ("-b 0", 1, ["--batch_size", "0"]),
        ("-l 129", 1, ["--max_length", "129", "128"]),
        ("-s 0 -i 0", 1, ["--num_steps", "0", "--ignore_steps 0"]),
        ("-s 2", 1, ["--num_steps", "2", "--ignore_steps 2"]),
        ("-i -1", 1, ["--ignore_steps", "-1"]),
        ("-m 0", 1, ["--memory_limit", "0"]),
        ("-m all", 1, ["--memory_limit", "'all'"]),
        ("--json no/such/file.json", 1, ["--json", "no folder"]),
        ("--profile {file}", 1, ["--profile", "is a file; give a folder"]),
        ("--shard_param_frac 2", 1, ["--shard_param_frac", "2.0", "between 0 and 1"]),
        ("--offload_optim_frac -1", 1, ["--offload_optim_frac", "-1.0"]),
        ("--offload_param_frac nan", 1, ["--offload_param_frac", "nan"]),
        ("-w 1.5", 1, ["--warmup_ratio", "1.5"]),
        ("-p gemini --mixed_precision fp32", 1, ["--mixed_precision", "gemini", "-p zero2"]),
        ("-p fsdp --extra_dp 2", 2, ["--extra_dp", "-p gemini"]),
        ("-p gemini --tp 2 -g -a --keep_attention", 2, ["--keep_attention", "gemini", "--tp"]),
        ("-p gemini --extra_dp 2", 3, ["--tp/--extra_dp", "2", "3 ranks"]),
        ("-p 3d --tp 3", 3, ["--tp", "3", "4 heads"]),
        ("-p 3d --tp 2 --pp 2", 6, ["--tp/--pp/--sp", "4", "6 ranks"]),
        ("-p 3d --zero 3", 1, ["--zero", "3"]),
        ("-p 3d --pp 2 --mbs 3 -b 4", 2, ["--microbatch_size", "3", "4"]),
        ("--dry_run --gpu X", 1, ["--gpu", "'X'", "H100"]),
        ("--dry_run --gpu_memory -1", 1, ["--gpu_memory", "-1"]),
        ("--dry_run --mfu 1.5", 1, ["--mfu", "1.5"]),
        ("--dry_run --gpus 0", 1, ["--gpus", "0"]),
        ("-d data", 1, ["unrecognized arguments: -d data"]),
    ],
)
def test_flags_of_benchmark(objections, tmp_path, flags, ranks, expected):
    (tmp_path / "file").touch()
    given = [flag.format(file=tmp_path / "file") for flag in flags.split()]
    (problem,) = objections(benchmark, ["-c", "test", "-l", 64, *given], ranks)
    assert all(part in problem for part in expected), problem


def test_every_problem_is_named_at_once(problems):
    found = problems("-b", 0, "--lr", 0, "-l", 999)
    assert [problem.partition(":")[0] for problem in found] == ["--batch_size", "--lr", "--max_length"]


def test_default_warmup_longer_than_the_run(problems, sample, cache_dir, sample_dataset, monkeypatch, tmp_path):
    """Without -s; whoever gives one may make it longer than the run."""
    data = ["-d", sample / "data", "--tokenizer", sample / "tokenizer", "--cache_dir", cache_dir, "-l", 64]
    flags = ["-c", "test", "-p", "zero2", *data, "--max_steps", 20]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*flags, "--dry_run"])])
    with pytest.raises(InputError, match=r"--warmup_steps: the default of 2000 .* 20 steps; .* -s 1"):
        program.main()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*flags, "-s", 2000, "--dry_run"])])
    assert program.main() == 0


def test_a_prepared_data_set_is_no_stream(problems, sample_dataset):
    (problem,) = problems("-d", sample_dataset.folder, "--streaming", "--max_steps", 1)
    assert problem == f"--streaming: {sample_dataset.folder} is prepared, and is read without it; leave the flag out"


def test_vocabulary_larger_than_the_models(problems, tmp_path):
    (problem,) = problems("-c", config_file(tmp_path, vocab_size=1000))
    assert all(part in problem for part in ("--tokenizer", "1024", "1000"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "config.json"),
        ("{", "config.json"),
        ("[1]", "list"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}', "100"),
    ],
)
def test_config_file(problems, tmp_path, content, expected):
    (tmp_path / "config.json").write_text(content)
    (problem,) = problems("-c", tmp_path)
    assert problem.startswith("--config: ")
    assert expected in problem


@pytest.mark.parametrize("flag", ["save_dir", "tensorboard_dir"])
def test_folder_is_a_file(problems, tmp_path, flag):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        (problem,) = problems(f"--{flag}", folder)
        assert problem.startswith(f"--{flag}: {tmp_path / 'file'}")


@pytest.mark.parametrize("flag", ["save_dir", "tensorboard_dir", "cache_dir"])
def test_folder_is_a_link_to_nothing(problems, tmp_path, flag):
    (tmp_path / "link").symlink_to("gone")
    for folder in (tmp_path / "link", tmp_path / "link" / "below"):
        (problem,) = problems(f"--{flag}", folder)
        assert problem == (
            f"--{flag}: {tmp_path / 'link'} is a link to gone, which is not there; make that, or give a folder"
        )


def test_number_flags_take_no_nonsense(monkeypatch, sample_flags, tmp_path):
    """Every flag with a number: a value is used, or refused by a line that names the flag."""
    given = [
        *map(str, sample_flags),
        "-p",
        "zero2",
        "--dry_run",
        "-o",
        str(tmp_path / "run"),
        "-t",
        str(tmp_path / "tb"),
    ]
    names = [name for name, value in vars(program.parse_args(given)).items() if type(value) in (int, float)]
    assert {"lr", "batch_size", "mfu", "shuffle_buffer"} <= set(names)
    names += ["max_steps", "recompute", "keep_checkpoints", "keep_every", "gpus", "gpu_memory", "eval_fraction", "tp"]
    for name in names:
        for value in ("-1", "-1e-3", "nan", "-nan", "inf", "-inf", "1e400", "-1e400"):
            monkeypatch.setattr(sys, "argv", ["pretrain.py", *given, f"--{name}", value])
            with pytest.raises(InputError, match=f"--{name}") as raised:
                program.main()
            assert "\n" not in str(raised.value)
            assert "expected one argument" not in str(raised.value)


def test_folders_of_a_run_are_not_among_its_data(objections, sample_flags, tmp_path, monkeypatch):
    """As where someone goes to the data and starts there."""
    (tmp_path / "rows.jsonl").write_bytes(ROW)
    (tmp_path / "task").mkdir()
    monkeypatch.chdir(tmp_path)
    assert objections(program, [*sample_flags, "-p", "zero2", "-d", "."]) == [
        f"--{flag}: {folder} lies in --dataset {tmp_path}, whose files are read as data; give a folder elsewhere"
        for flag, folder in (("save_dir", "checkpoint"), ("tensorboard_dir", "tb_logs"))
    ]
    (problem,) = objections(program, [*sample_flags, "-p", "zero2", "-d", tmp_path, "-o", "/elsewhere", "-t", "."])
    assert problem.startswith("--tensorboard_dir: . lies in --dataset")

    config, model = load_config("test"), ["--model_path", "model", "-l", "128", "-p", "zero2"]
    validate_args(finetune.parse_args([*model, "-d", ".", "--task_name", "task"]), config)
    (tmp_path / "manifest.json").touch()  # as in a prepared folder, of which nothing else is read
    validate_args(program.parse_args(["-d", ".", "-l", "128", "-p", "zero2"]), config)


def test_no_permission_to_write(problems, locked_folder):
    allowed = locked_folder.with_name("open")
    (problem,) = problems("--save_dir", locked_folder / "checkpoint", "--tensorboard_dir", allowed)
    assert problem == f"--save_dir: no permission to write in {locked_folder}; give another folder"


# ------------------------------------------------------------------------------------------------------------ the data

ROW = json.dumps(TEXT).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "empty"),
        ("blank.jsonl", b"\n\n", "it has no row"),
        ("text.jsonl", b"Once upon a time\n", "line 1"),
        ("cut.jsonl", ROW + ROW[:40], "line 2"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("column.jsonl", b'{"content": "words"}\n', "no column 'text'"),
        ("null.jsonl", b'{"text": null}\n' * 3, "3 with text missing or null"),
        ("numbers.jsonl", b'{"text": 3}\n' * 2, "2 with text not a string"),
        ("latin.jsonl", '{"text": "café"}\n'.encode("latin-1"), "UTF-8"),
        ("cut.jsonl.gz", gzip.compress(ROW * 99)[:-20], "cannot be read"),
        ("not.jsonl.gz", ROW, "cannot be read"),
        ("not.parquet", ROW, "cannot be read"),
        ("words.txt", b"Once upon a time\n", "known kind"),
        ("notes.txt", b"Once upon a time\n", """jq -Rsc 'split("\\n\\n")[] | {text: .}' FILE"""),
        ("indented.json", b'{\n "text": "words"\n}\n', "jq -c . FILE"),
        ("short.jsonl", b'{"text": "short"}\n', "lower --max_length or give more data"),
    ],
)
def test_data(problems, tmp_path, cache_dir, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = problems("-d", path)
    assert expected in problem
    assert problem.startswith("--max_length: " if name == "short.jsonl" else "--dataset: ")
    assert not list(cache_dir.glob("*.partial"))


def test_damaged_tokenizer(problems, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nothing like a model")
    (problem,) = problems("--tokenizer", tmp_path)
    assert problem.startswith(f"--tokenizer: cannot load {tmp_path} ")


# ----------------------------------------------------------------------------------------------------- the checkpoints


@pytest.fixture
def checkpoint(finished_run, few_data, tmp_path) -> tuple[Path, list]:
    """A copy of a checkpoint, and the flags with which it could be resumed."""
    folder = tmp_path / "saved" / "epoch0-step2"
    shutil.copytree(finished_run.save_dir / "epoch0-step2", folder)
    return folder, ["-d", few_data, "-x", "bf16", "-b", 8, "-s", 1, "-f", folder]


def test_hugging_face_folder_is_no_checkpoint(problems, checkpoint, finished_run):
    folder, flags = checkpoint
    for model in (folder / "model", finished_run.save_dir / "final"):
        (problem,) = problems(*flags, "-f", model)
        assert problem.startswith(f"--load: {model} ")
        assert "--init_from" in problem


def test_checkpoints_are_looked_for_before_data_are_prepared(problems, objections, finished_run, tmp_path):
    """`objections` sees that nothing is written, to the cache either."""
    taken, cache = finished_run.save_dir, ["--cache_dir", tmp_path / "cache"]
    cases = {
        "--load: no/such/folder does not exist": ["-f", "no/such/folder"],
        f"--save_dir: {taken} holds the checkpoints of a run": ["-o", taken],
        f"--load: {taken / 'epoch0-step2'} is at step 2, and": ["-o", taken, "-f", taken / "epoch0-step2"],
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What?", "completion": "That."}) + "\n")
    tuning = ["--model_path", taken / "final", "-d", rows, "-p", "zero2", "-x", "bf16"]
    for expected, flags in cases.items():
        for found in (problems(*cache, *flags), objections(finetune, [*tuning, *cache, *flags])):
            assert found[0].startswith(expected)


@pytest.mark.parametrize("damage", ["manifest", "weights", "truncated"])
def test_incomplete_checkpoint(problems, checkpoint, damage):
    folder, flags = checkpoint
    weights = sorted((folder / "optimizer").iterdir())[0]
    if damage == "truncated":
        os.truncate(weights, 1000)
    else:
        (folder / "manifest.json" if damage == "manifest" else weights).unlink()
    (problem,) = problems(*flags)
    assert problem.startswith(f"--load: {folder} is an incomplete checkpoint")
    (problem,) = problems(*flags, "-f", "latest", "-o", folder.parent)
    assert problem.startswith("--load latest: no complete checkpoint")


def test_initial_weights_and_a_checkpoint(problems, checkpoint, monkeypatch, capsys):
    """`latest` goes with initial weights, which a job begins from and does not look at when it goes on."""
    folder, flags = checkpoint
    flags += ["--init_from", folder / "model"]
    assert problems(*flags)[0].startswith("--init_from: begins a new run from a model's weights, --load resumes")
    for save_dir, line in ((folder.parent, "length: 3 "), (folder / "none", "a new run begins")):
        with pytest.raises(pytest.fail.Exception, match="nothing was objected to"):
            problems(*flags, "-f", "latest", "-o", save_dir)
        assert line in capsys.readouterr().out


def test_some_folder_is_no_checkpoint(problems, checkpoint, tmp_path):
    _, flags = checkpoint
    (problem,) = problems(*flags, "-f", tmp_path)
    assert problem.startswith(f"--load: {tmp_path} is not a checkpoint")


def test_checkpoint_of_another_run(problems, checkpoint, sample, tmp_path):
    _, flags = checkpoint
    cases = {
        "num_hidden_layers 4 (not 2)": ["-c", config_file(tmp_path, num_hidden_layers=2)],
        "--seed was 42 in the checkpoint and is 43 now": ["--seed", 43],
        "--max_length was 64 in the checkpoint and is 32 now": ["-l", 32],
        "the data was ": ["-d", sample / "data"],
        "--lr was 0.0003 in the checkpoint and is 0.1 now": ["--lr", 0.1],
        "at step 2 and the run ends at step 1": ["--max_steps", 1],
    }
    for expected, changed in cases.items():
        found = problems(*flags, *changed)
        assert all(problem.startswith("--load: ") for problem in found)
        assert any(expected in problem for problem in found)


def test_init_from(problems, finished_run, checkpoint, tmp_path):
    folder, flags = checkpoint
    model = finished_run.save_dir / "final"
    cases = {
        "is not a Hugging Face model folder": ["--init_from", folder],
        "num_key_value_heads 2 (not 4)": ["--init_from", model, "-c", config_file(tmp_path, num_key_value_heads=4)],
        "give one of them": ["--init_from", model, *flags],
    }
    for expected, changed in cases.items():
        (problem,) = problems(*changed)
        assert problem.startswith("--init_from: ")
        assert expected in problem


# -------------------------------------------------------------------------------------------------- in real processes


def assert_refused(run: Run, expected: str) -> None:
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("pretrain.py: "))
    assert line.startswith(f"pretrain.py: error: {expected}")
    assert run.stdout == ""
    assert not run.save_dir.exists()
    assert not (run.folder / "tb_logs").exists()


def test_exit_status_and_output(tmp_path):
    """Without --tokenizer and offline: what someone meets who has not read the README."""
    with start_pretrain("-d", tmp_path / "data", folder=tmp_path / "run") as run:
        assert run.wait() == USAGE_ERROR
    assert_refused(run, "--tokenizer: hf-internal-testing/llama-tokenizer ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "flags", "expected"),
    [
        ("finetune.py", ["--model_path", "./none"], "--model_path: ./none does not exist"),
        ("benchmark.py", ["-c", "8b"], "--config: '8b' is neither"),
    ],
)
def test_exit_status_of_the_other_programs(tmp_path, program, flags, expected):
    run = Run([sys.executable, ROOT / program, *flags], tmp_path / "run", cwd=tmp_path)
    with run:
        assert run.wait() == USAGE_ERROR
    assert run.stderr.startswith(f"{program}: error: {expected}")
    assert (run.stdout, run.stderr.count("\n")) == ("", 1)
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "stdout", "stderr"}


HIDDEN = """\
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(
    ("program", "package", "version", "expected"),
    [
        ("pretrain.py", "transformers", "5.2.0", "transformers 5.2.0 is installed, not ==4.51.3; "),
        ("finetune.py", "torch", "2.5.1", "torch 2.5.1 is installed, not <2.14,>=2.11; "),
        (
            "benchmark.py",
            "colossalai",
            "0.4.6",
            "colossalai 0.4.6 is installed, not ==0.5.0; ",
        ),
        ("scripts/prepare_dataset.py", "transformers", "4.57.1", "transformers 4.57.1 is installed, not ==4.51.3; "),
        ("pretrain.py", "peft", None, "a package cannot be imported (No module named 'peft'); "),
        ("benchmark.py", "bitsandbytes", None, "a package cannot be imported (No module named 'bitsandbytes'); "),
        ("scripts/plot_run.py", "matplotlib", None, "a package cannot be imported (No module named 'matplotlib'); "),
        ("scripts/generate.py", "packaging", None, "a package cannot be imported (No module named 'packaging'); "),
    ],
)
def test_packages_of_other_versions_or_missing(tmp_path, program, package, version, expected):
    """Found before those that are installed: the description of another version, or none of the package."""
    site = tmp_path / "site"
    site.mkdir()
    if version:
        (site / f"{package}-{version}.dist-info").mkdir()
        (site / f"{package}-{version}.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    else:
        (site / "sitecustomize.py").write_text(HIDDEN.format(package=package))
    environment = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(tmp_path.rglob("*"))
    with Run([sys.executable, ROOT / program], tmp_path / "run", environment, cwd=tmp_path) as run:
        assert run.wait() == USAGE_ERROR
    assert run.stderr.startswith(f"{Path(program).name}: error: {expected}")
    assert (run.stdout, run.stderr.count("\n")) == ("", 1)
    assert sorted(set(tmp_path.rglob("*")) - {run.folder, *run.folder.iterdir()}) == before


def test_interrupt_during_the_imports_is_no_missing_package(tmp_path):
    """An import that a Ctrl-C has cut off may come as an ImportError."""
    (tmp_path / "peft.py").write_text(
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError from e"
    )
    with Run([sys.executable, ROOT / "pretrain.py"], tmp_path / "run", {"PYTHONPATH": str(tmp_path)}) as run:
        assert run.wait() == KEYBOARD_INTERRUPT
    assert run.stdout + run.stderr == ""


def test_remedy_is_the_environment_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    assert requirements._remedy("requirements.txt") == "pip install -r requirements.txt"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert requirements._remedy("requirements.txt").startswith(f"start it with {tmp_path}/.venv/bin/python, or: pip ")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert requirements._remedy("requirements.txt") == "pip install -r requirements.txt"


def test_older_python(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "MINIMUM_PYTHON", (99, 0))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=str(USAGE_ERROR)):
        requirements.require()
    assert "99.0 or later is needed" in capsys.readouterr().err


def test_all_ranks_end_when_the_data_cannot_be_prepared(pretrain, tmp_path):
    """The second rank waits for what the first one prepares."""
    (tmp_path / "file.jsonl").write_text("{")
    run = pretrain("-p", "zero2", "-d", tmp_path / "file.jsonl", processes=2, check=False)
    assert run.returncode != 0
    assert_refused(run, "--dataset: ")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("export_hf.py", "--checkpoint {run}/epoch0-step2 --tokenizer {run}/final --output {locked}/model"),
        ("prepare_dataset.py", "-d {few} --tokenizer {run}/final --output {locked}/prepared"),
        ("prepare_dataset.py", "--verify --output {locked}/prepared"),
        ("plot_run.py", "{run}/../tb_logs --output {locked}/run.png"),
        ("make_sample_data.py", "--output_dir {locked}/sample --megabytes 0.1"),
        ("make_sample_instructions.py", "--output_dir {locked}/sample --examples 10"),
    ],
)
def test_scripts_without_a_place_to_write(finished_run, few_data, script, flags):
    """A folder that cannot be made, for whatever reason: one line, no traceback."""
    places = {"run": finished_run.save_dir, "few": few_data, "locked": "/proc/none"}
    command = [sys.executable, ROOT / "scripts" / script, *flags.format(**places).split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == USAGE_ERROR, done.stderr
    assert line.startswith(f"{script}: error: --output")
    assert "Traceback" not in done.stderr


def test_home_folder_in_flags(monkeypatch, tmp_path):
    """A shell leaves `~` behind `=` as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("dataset", "cache_dir", "save_dir", "tensorboard_dir", "load", "init_from")
    args = vars(program.parse_args([f"--{flag}=~/x" for flag in flags]))
    assert {str(args[flag]) for flag in flags} == {str(tmp_path / "x")}
    assert program.parse_args([]).cache_dir == tmp_path / ".cache" / "llama-training"
