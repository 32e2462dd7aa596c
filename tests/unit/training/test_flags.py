"""Flags, their defaults and their validation."""

from pathlib import Path

import pytest

from model_utils import load_config
from pretrain import parse_args
from runtime.console import InputError
from training.checks import validate_args


class TestFlags:
    # The table of the specification: flag, short form, default.
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

    def test_older_spellings_are_accepted_and_unlisted(self, capsys):
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


def problems_of(flags, model="test"):
    try:
        validate_args(parse_args(["-l", "128", *flags.split()]), load_config(model))
    except InputError as error:
        return list(error.problems)
    return []


class TestValidate:
    def test_defaults_are_valid(self):
        validate_args(parse_args([]), load_config("7b"))

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            ("-e 0", "--num_epochs: 0 is below the least possible, 1"),
            ("-b 0", "--batch_size: 0 is below the least possible, 1"),
            ("--accumulation_steps -1", "--accumulation_steps: -1 is below the least possible, 1"),
            ("-l 1", "--max_length: 1 is below the least possible, 2"),
            ("-l 129", "--max_length: 129 is above the model's context of 128 tokens"),
            ("--max_steps 0", "--max_steps: 0 is below the least possible, 1"),
            ("-i 0", "--save_interval: 0 is below the least possible, 1"),
            ("--log_interval 0", "--log_interval: 0 is below the least possible, 1"),
            ("-s -1", "--warmup_steps: -1 is below the least possible, 0"),
            ("--num_workers -1", "--num_workers: -1 is below the least possible, 0"),
            ("--seed -1", "--seed: -1 is below the least possible, 0"),
            ("--lr 0", "--lr: 0.0 is not a positive number"),
            ("--lr nan", "--lr: nan is not a positive number"),
            ("--lr inf", "--lr: inf is not a positive number"),
            ("-w -0.1", "--weight_decay: -0.1 is not a non-negative number"),
            ("--gradient_clipping nan", "--gradient_clipping: nan is not a non-negative number"),
            ("--eval_interval 0", "--eval_interval: 0 is below the least possible, 1"),
            ("--eval_fraction 1", "--eval_fraction: 1.0 is not at least 0 and below 1"),
            ("--shuffle_buffer 0", "--shuffle_buffer: 0 is below the least possible, 1"),
            ("--streaming", "--streaming: a stream has no end; give --max_steps"),
            (
                "--streaming --max_steps 9 -e 2",
                "--num_epochs: a stream has no end, so it has no epochs; leave the flag out",
            ),
            (
                "--streaming --max_steps 9 --eval_interval 1000",
                "--eval_interval: documents are held out when a data set is prepared, not from a stream",
            ),
            (
                "--shuffle_buffer 2048",
                "--shuffle_buffer: takes effect with --streaming alone; give that too, or leave it out",
            ),
            (
                "--keep_every 4",
                "--keep_every: takes effect with --keep_checkpoints alone; give that too, or leave it out",
            ),
            ("--allow_changes", "--allow_changes: takes effect with --load alone; give that too, or leave it out"),
            ("--mfu 0.4", "--mfu: goes with --dry_run alone; a launcher sets what a run has"),
            (
                "--streaming --max_steps 9 --eval_fraction 0.1",
                "--eval_fraction: documents are held out when a data set is prepared, not from a stream",
            ),
            ("-p zero2 --tp 2", "--tp: takes effect with -p hybrid_parallel alone, not with -p zero2"),
        ],
    )
    def test_each_problem(self, flags, problem):
        assert problems_of(flags) == [problem]

    @pytest.mark.parametrize("flags", ["-s 0", "-w 0 --gradient_clipping 0", "--no-compile", "-l 2"])
    def test_least_values_are_allowed(self, flags):
        assert problems_of(flags) == []

    def test_all_problems_at_once(self):
        flags = "-e 0 -b 0 --lr -1 -l 4096 -o /dev/null -t /dev/null/logs"
        names = [problem.split(":")[0] for problem in problems_of(flags)]
        assert names == [
            "--num_epochs",
            "--batch_size",
            "--lr",
            "--max_length",
            "--save_dir",
            "--tensorboard_dir",
        ]

    def test_folders_are_checked_and_not_made(self, tmp_path):
        assert problems_of(f"-o {tmp_path}/a/b -t {tmp_path}/c") == []
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        assert problems_of(f"-o {tmp_path}/file/b") == [f"--save_dir: {tmp_path}/file is a file; give a folder"]

    def test_folder_without_permission(self, locked_folder):
        allowed = locked_folder.with_name("open")
        (problem,) = problems_of(f"-o {locked_folder}/a -t {allowed}/a")
        assert problem == f"--save_dir: no permission to write in {locked_folder}; give another folder"
        assert problems_of(f"-o {allowed}/a -t {allowed}/b") == []
