"""Flags, their short forms and their defaults."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import benchmark
import finetune
import pretrain
from engine.layout import Parallelism
from model_utils import load_config
from pretrain import parse_args
from runtime.console import InputError
from training.flags import job_of, settings, take


class TestFlags:
    # Flag, short form, default, as specified.
    @pytest.mark.parametrize(
        ("flag", "short", "default"),
        [
            ("config", "c", "7b"),
            ("plugin", "p", "gemini"),
            ("dataset", "d", "togethercomputer/RedPajama-Data-1T-Sample"),
            ("num_epochs", "e", 1),
            ("batch_size", "b", 2),
            ("lr", None, 3e-4),
            ("weight_decay", "w", 0.1),
            ("warmup_steps", "s", 2000),
            ("gradient_checkpoint", "g", False),
            ("max_length", "l", 4096),
            ("mixed_precision", "x", "fp16"),
            ("save_interval", "i", 1000),
            ("save_dir", "o", Path("checkpoint")),
            ("load", "f", None),
            ("gradient_clipping", None, 1.0),
            ("tensorboard_dir", "t", Path("tb_logs")),
            ("flash_attention", "a", False),
            ("tokenizer", None, "hf-internal-testing/llama-tokenizer"),
        ],
    )
    def test_names_short_forms_and_defaults(self, flag, short, default):
        assert getattr(parse_args([]), flag) == default
        if default is False:
            arguments, value = [], True
        else:
            value = {"plugin": "zero2", "mixed_precision": "bf16"}.get(flag, 7 if isinstance(default, int) else "1")
            arguments, value = [str(value)], type(default)(value) if default is not None else value
        for spelling in (f"--{flag}", f"-{short}") if short else (f"--{flag}",):
            assert getattr(parse_args([spelling, *arguments]), flag) == value

    def test_older_spellings_are_accepted_but_not_listed(self, capsys):
        args = parse_args(["--weigth_decay", "0.2", "--grad_checkpoint", "--grad_clip", "3"])
        assert (args.weight_decay, args.gradient_checkpoint, args.gradient_clipping) == (0.2, True, 3.0)
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        listed = capsys.readouterr().out
        assert "--weight_decay" in listed
        assert not any(old in listed for old in ("weigth_decay", "grad_checkpoint", "--grad_clip "))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--nonsense"], "unrecognized arguments: --nonsense (see --help)"),
            (["--batch", "4"], "unrecognized arguments: --batch 4 (see --help)"),
            (["--batchsize", "4"], "unrecognized arguments: --batchsize 4; did you mean --batch_size? (see --help)"),
            (["-b", "two"], "argument -b/--batch_size: invalid int value: 'two' (see --help)"),
            (["-p", "zero9"], "argument -p/--plugin: invalid choice: 'zero9'"),
        ],
    )
    def test_mistakes_are_input_errors(self, arguments, message):
        with pytest.raises(InputError) as caught:
            parse_args(arguments)
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("-p ddp", ["--plugin", "ddp", "hybrid_parallel"]),
            ("-x fp8", ["--mixed_precision", "fp8"]),
            ("-b many", ["--batch_size", "many"]),
            ("--learning_rate 1", ["--learning_rate"]),
            ("--max_step 1", ["--max_step ", "did you mean --max_steps?"]),  # prefixes of flags are not accepted
            ("--batchsize 2", ["--batchsize", "did you mean --batch_size?"]),
            ("--max_steps 1e3", ["--max_steps", "1e3"]),
            ("-d=", ["--dataset", "empty"]),  # as from an unset shell variable
            ("--save_dir=", ["--save_dir", "empty"]),
            ("--tensorboard_dir=", ["--tensorboard_dir", "empty"]),
            ("--cache_dir=", ["--cache_dir", "empty"]),
            ("--load=", ["--load", "empty"]),
            ("--config=", ["--config", "empty"]),
            (f"-o {'x' * 300}", ["--save_dir", "xxx", "File name too long"]),
            ("-o s3://bucket/run", ["--save_dir", "is a URL", "path on this machine"]),
            ("--init_from https://huggingface.co/a/b", ["--init_from", "is a URL"]),
            ("--slice_weights c4=1,c4=2", ["--slice_weights", "c4 has two weights"]),
            ("--slice_weights c4=0", ["--slice_weights", "above 0"]),
            ("--slice_weights c4=1,github=-1e-3", ["--slice_weights", "github=-1e-3"]),
            ("--slice_weights c4=nan", ["--slice_weights", "c4=nan"]),
            ("--slice_weights c4=1e400", ["--slice_weights", "c4=1e400"]),
            ("--slice_weights c4=1e308,github=1e308", ["--slice_weights", "lower them"]),
            ("--max_steps -1e3", ["--max_steps", "-1e3"]),
            ("-s -5.", ["--warmup_steps", "-5."]),
        ],
    )
    def test_mistakes_name_the_flag(self, flags, expected):
        with pytest.raises(InputError) as caught:
            parse_args(flags.split())
        (problem,) = caught.value.problems
        assert all(part in problem for part in expected), problem
        assert "\n" not in problem


def test_a_field_without_a_flag_is_an_error():
    """Unless some program is meant to lack it, as pretrain.py lacks --extra_dp."""

    @dataclass(frozen=True)
    class Misspelled:
        batch_sise: int = 2
        extra_dp: int | None = None

    args = parse_args([])
    assert take(Parallelism, args) == Parallelism()
    with pytest.raises(AttributeError, match="batch_sise"):
        take(Misspelled, args)


def test_home_folder_in_flags(monkeypatch, tmp_path):
    """A shell does not expand `~` after `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("dataset", "cache_dir", "save_dir", "tensorboard_dir", "load", "init_from")
    args = vars(parse_args([f"--{flag}=~/x" for flag in flags]))
    assert {str(args[flag]) for flag in flags} == {str(tmp_path / "x")}
    assert parse_args([]).cache_dir == tmp_path / ".cache" / "llama-training"


@pytest.mark.slow
@pytest.mark.parametrize("program", [pretrain, finetune, benchmark])
def test_recompute_and_gradient_checkpoint_together(program):
    model = ["--model_path", "model"] if program is finetune else []
    fractions = {"-g": 1.0, "-g --recompute 0.5": 0.5, "--recompute 0.5": 0.5, "--recompute 0": 0.0}
    for flags, recomputed in fractions.items():
        args = program.parse_args([*model, *flags.split()])
        assert job_of(args, load_config("test")).recomputed == recomputed
        assert settings(args)["gradient_checkpoint"] == (recomputed > 0)
    args = program.parse_args([*model, "-g", "--recompute", "0"])
    with pytest.raises(InputError, match=r"^--recompute: 0 recomputes nothing and -g all layers; leave one out$"):
        job_of(args, load_config("test"))
