"""Dry runs: their report, the changes that they suggest, and mistakes in the flags of GPUs."""

import re

import pytest

import benchmark
import pretrain
from model_utils import load_config
from planning.facts import BUILT_IN, write_facts
from planning.machines import DryRun
from planning.report import memory_remedies
from runtime.console import InputError
from training.flags import job_of, take


def checked(flags: str) -> None:
    args = benchmark.parse_args(f"-c tiny -l 128 {flags}".split())
    benchmark.check(args, job_of(args, load_config(args.config)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 0", "--gpus: must be at least 1, not 0"),
        ("--gpu V100", "--gpu: 'V100' is not one of B200"),
        (
            "--gpu A100-40GB",
            "--gpu: 'A100-40GB' would be taken for A100 with 80 GB; give A100-SXM4-40GB or A100-PCIE-40GB or "
            "--gpu_memory 40",
        ),
        ("--gpu H100-96GB", "--gpu: 'H100-96GB' would be taken for H100 with 80 GB; give --gpu_memory 96"),
        ("--gpu_memory -1", "--gpu_memory: must be a positive number of GB, not -1.0"),
        ("--facts missing.json", "--facts: missing.json cannot be read as JSON"),
        ("--mfu 1.5", "--mfu: must be above 0 and at most 1, not 1.5"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        checked(f"--dry_run {flags}")


def test_facts_of_another_card_are_one_line(tmp_path):
    write_facts(tmp_path / "facts.json", BUILT_IN["A100"])
    for flags, line in (("--gpu H100", "has the speeds of A100, not of H100"), ("--fp8", "A100 has no float8")):
        with pytest.raises(InputError) as raised:
            checked(f"--dry_run --facts {tmp_path}/facts.json {flags}")
        assert [line in problem for problem in raised.value.problems].count(True) == 1
        assert len(raised.value.problems) == len(set(raised.value.problems))


@pytest.mark.parametrize("card", ["A100-SXM4-80GB", "L40S-48GB", "A100-PCIE-40GB", "A100-40GB --gpu_memory 40"])
def test_sizes_that_cards_have(card):
    checked(f"--dry_run --gpu {card}")


def test_gpus_without_dry_run():
    with pytest.raises(InputError, match="--gpus: takes effect only with --dry_run"):
        checked("--gpus 8")


def dry_run(monkeypatch, flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *flags.split()])
    assert benchmark.main() == 0


def test_report(capsys, monkeypatch):
    dry_run(monkeypatch, "-c 7b -p zero2 -b 4 -g -a --dry_run --gpus 32 --gpu A100 --mfu 0.4")
    out = capsys.readouterr().out
    assert re.search(r"\nfits: \d+\.\d GB at the peak, on A100 with 80 GB\n", out)
    assert re.search(r"  the loss +13\.48 +0\.00 +2\.53 ", out)  # 2 and 12 / 32 bytes per parameter
    # 1.2e12 tokens at 40% of 32 x 312 TFLOPS, 46.1 GFLOPs per token
    assert "2,288,819 steps of 524,288 tokens, 1,200,000,000,000 in all" in out
    flops_per_token = 6 * (6_738_415_616 - 32000 * 4096) + 12 * 32 * 4096 * 4096
    days = 1.2e12 * flops_per_token / (32 * 312e12 * 0.4) / 86400
    assert f"{days:,.1f} days on 32 x A100, " in out
    assert out.endswith(" tokens/s, 40.0% MFU\n")


def test_a_small_model_is_reported_in_mb(capsys, monkeypatch):
    dry_run(monkeypatch, "-c test -l 64 -p zero2 --dry_run")
    out = capsys.readouterr().out
    assert "estimated memory per GPU in MB (GPUs: 1):" in out
    assert re.search(r"\nfits: [1-9]\d*\.\d MB at the peak, on H100 with 80 GB\n", out)


def test_memory_limit_counts(capsys, monkeypatch):
    dry_run(monkeypatch, "-c 7b -p zero2 -b 4 -g -a --dry_run --gpus 32 -m 20000")
    assert "does NOT fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "remedies"),
    [
        (
            "-c 70b -p zero2 -b 4 -g -a --gpus 64",
            "-p gemini, -p gemini_auto",
        ),  # a smaller -b or twice the GPUs do not suffice
        ("-c 7b -p zero2 -b 4 -g -a --gpus 1", "-p zero2_cpu, -p gemini_auto, 2 GPUs"),
        ("-c 7b -p zero2 -b 16 --gpus 8", "-a -g"),
        ("-c 7b -p zero2 -b 16 -a --gpus 8", "-g, -b 2"),
        (
            "-c 7b -p zero2 -b 8 -a --recompute 0.5 --gpus 1",
            "--recompute 1 with -p zero2_cpu or -p gemini_auto or 2 GPUs",
        ),
        (
            "-c 7b -p zero2 -b 16 -g -a --keep_attention --gpus 1 --gpu H200 --gpu_memory 138",
            "-b 8, no --keep_attention, -p zero2_cpu, -p gemini_auto, 2 GPUs",
        ),
        ("-c 7b -p zero2 -b 4 -g -a --gpus 32 -m 20000", "-b 2, -p gemini, -p gemini_auto, a larger --memory_limit"),
        ("-c 70b -p zero2 -g -a --gpus 1", "more GPUs, or larger ones"),
    ],
)
def test_suggested_changes(flags, remedies, capsys, monkeypatch):
    dry_run(monkeypatch, f"{flags} --dry_run")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("does NOT fit: "))
    assert line.partition("; what helps: ")[2] == remedies


def test_gradients_that_are_exchanged_sooner_take_less():
    flags = "-c 13b -p zero2 -x bf16 -a -g --accumulation_steps 8 --exchange step --dry_run --gpus 8 --gpu H100"
    args = pretrain.parse_args(flags.split())
    remedies = memory_remedies(job_of(args, load_config(args.config)), take(DryRun, args)).split(", ")
    assert {"--exchange micro_batch", "-p gemini"} <= set(remedies)


def test_the_plugin_in_use_is_no_remedy():
    flags = "-c 13b -p gemini -x bf16 -a -g --accumulation_steps 8 --exchange step --dry_run --gpus 8 --gpu H100"
    args = pretrain.parse_args(flags.split())
    remedies = memory_remedies(job_of(args, load_config(args.config)), take(DryRun, args)).split(", ")
    assert "--exchange micro_batch" in remedies
    assert "-p gemini" not in remedies
