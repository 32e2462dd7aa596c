"""Unusable flags: main() reports each in one line before it launches, and writes nothing."""

import json
import sys
from pathlib import Path

import pytest

import benchmark
import finetune
import pretrain as program
from model_utils import load_config
from runtime.console import InputError
from training.checks import run_problems
from training.flags import job_of
from training.run import Run

HYBRID = "-p hybrid_parallel"


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("-c 8b", 1, ["--config", "8b", "7b, 13b, 30b, 65b, 70b, llama3-8b", "tiny, test"]),
        ("--tokenizer=", 1, ["--tokenizer", "empty"]),
        ("--init_from ./none", 1, ["--init_from", "not a folder on this machine"]),
        ("--tokenizer https://huggingface.co/a/b", 1, ["--tokenizer", "is a URL; give the hub name a/b"]),
        ("--tokenizer a/b/", 1, ["--tokenizer", "give a/b without a slash"]),
        ("--eval_fraction 0.9999", 1, ["--max_length", "--eval_fraction"]),
        ("-d no/such/folder", 1, ["--dataset", "no/such/folder"]),
        ("--tokenizer ./no/such/folder", 1, ["--tokenizer", "no/such/folder"]),
        ("-b 4000", 1, ["--dataset", "4000"]),
        ("-b 1000 --accumulation_steps 2", 2, ["--dataset", "4000"]),
        ("-f no/such/folder", 1, ["--load", "no/such/folder"]),
        ("--lr -1e-3", 1, ["--lr", "-0.001 is not a positive number"]),
        ("--adam_betas 0.9 1", 1, ["--adam_betas", "not 0.9 1.0"]),
        ("--adam_eps 0", 1, ["--adam_eps", "0.0 is not a positive number"]),
        ("--min_lr_ratio 2", 1, ["--min_lr_ratio", "from 0 to 1, not 2.0"]),
        ("--lr_schedule constant --min_lr_ratio 0.1", 1, ["--min_lr_ratio", "no effect with --lr_schedule constant"]),
        ("--decay_steps 5", 1, ["--decay_steps", "only with --lr_schedule wsd, not with cosine"]),
        ("--decay_shape 1-sqrt --lr_schedule linear", 1, ["--decay_shape", "only with --lr_schedule wsd"]),
        ("--lr_schedule wsd --decay_steps 0", 1, ["--decay_steps", "at least 1"]),
        ("--lr_schedule wsd -s 4 --max_steps 8 --decay_steps 5", 1, ["--decay_steps", "do not fit", "8 steps"]),
        ("--reduce_dtype bf16 -x fp16", 1, ["--reduce_dtype", "fp32 or the --mixed_precision fp16", "not bf16"]),
        ("--fp8_recipe rowwise", 1, ["--fp8_recipe", "only with --fp8"]),
        ("-p zero2 --fp8 -x fp32", 1, ["--fp8", "needs --mixed_precision bf16 or fp16, not fp32"]),
        ("--fp8 --fp8_recipe rowwise -x fp16", 1, ["--fp8_recipe", "rowwise needs --mixed_precision bf16"]),
        ("--fp8 --no-compile", 1, ["--fp8", "not compiled", "leave --no-compile or --fp8 out"]),
        ("--fp8 --dry_run --gpu A100", 1, ["--fp8", "A100 has no float8"]),
        (f"{HYBRID} --tp 2 --pp 1 --fp8", 2, ["--fp8", "FFN size of a rank is 88", "divisible by 16"]),
        ("-p zero2 --exchange step", 1, ["--exchange", "--accumulation_steps"]),
        ("-p gemini_auto --exchange step --accumulation_steps 2", 1, ["--exchange", "gemini_auto keeps gradients in"]),
        (f"{HYBRID} --tp 2 --pp 2", 6, ["--tp/--pp/--sp", "4", "6 ranks"]),
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
        ("--json no/such/file.json", 1, ["--json", "does not exist"]),
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
    """Only the default is refused: an explicit -s may exceed the length of the run."""
    data = ["-d", sample / "data", "--tokenizer", sample / "tokenizer", "--cache_dir", cache_dir, "-l", 64]
    flags = ["-c", "test", "-p", "zero2", *data, "--max_steps", 20]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*flags, "--dry_run"])])
    with pytest.raises(InputError, match=r"--warmup_steps: the default of 2000 .* 20 steps; .* -s 1"):
        program.main()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*flags, "-s", 2000, "--dry_run"])])
    assert program.main() == 0


def test_a_prepared_data_set_is_no_stream(problems, sample_dataset):
    (problem,) = problems("-d", sample_dataset.folder, "--streaming", "--max_steps", 1)
    assert problem == f"--streaming: {sample_dataset.folder} is already prepared; leave the flag out"


def test_number_flags_refuse_nonsense(monkeypatch, sample_flags, tmp_path):
    """Every numeric flag either accepts a value or refuses it in a line that names the flag."""
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
    assert {"lr", "batch_size", "shuffle_buffer"} <= set(names)
    names += [
        "skip_spikes",
        "max_steps",
        "recompute",
        "keep_checkpoints",
        "keep_every",
        "gpus",
        "gpu_memory",
        "gpus_per_node",
        "network",
        "mfu",
        "eval_fraction",
        "eval_tasks_interval",
        "tp",
    ]
    for name in names:
        for value in ("-1", "-1e-3", "nan", "-nan", "inf", "-inf", "1e400", "-1e400"):
            monkeypatch.setattr(sys, "argv", ["pretrain.py", *given, f"--{name}", value])
            with pytest.raises(InputError, match=f"--{name}") as raised:
                program.main()
            assert "\n" not in str(raised.value)
            assert "expected one argument" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------- the folders


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
        assert problem == (f"--{flag}: {tmp_path / 'link'} is a broken link to gone; make that folder, or give another")


def test_folders_of_a_run_may_not_lie_in_its_data(objections, sample_flags, tmp_path, monkeypatch):
    """This happens to users who start a run in the folder of their data."""
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "task").mkdir()
    monkeypatch.chdir(tmp_path)
    assert objections(program, [*sample_flags, "-p", "zero2", "-d", "."]) == [
        f"--{flag}: {folder} lies in --dataset {tmp_path}, so its files would be read as data; give a folder outside"
        for flag, folder in (("save_dir", "checkpoint"), ("tensorboard_dir", "tb_logs"))
    ]
    (problem,) = objections(program, [*sample_flags, "-p", "zero2", "-d", tmp_path, "-o", "/elsewhere", "-t", "."])
    assert problem.startswith("--tensorboard_dir: . lies in --dataset")

    job = job_of(program.parse_args(["-c", "test", "-l", "128", "-p", "zero2"]), load_config("test"))
    assert run_problems(Run("test", job), Path("task"), Path("cache")) == []
    (tmp_path / "manifest.json").touch()  # a prepared folder: only the files in its manifest are read
    assert run_problems(Run("test", job), Path("."), Path("cache")) == []


def test_no_permission_to_write(problems, locked_folder):
    allowed = locked_folder.with_name("open")
    (problem,) = problems("--save_dir", locked_folder / "checkpoint", "--tensorboard_dir", allowed)
    assert problem == f"--save_dir: no permission to write in {locked_folder}; give another folder"
