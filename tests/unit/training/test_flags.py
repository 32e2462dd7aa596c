"""Flags, their short forms and their defaults."""

from pathlib import Path

import pytest

from pretrain import parse_args
from runtime.console import InputError


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
