"""scripts/plan.py, and benchmarks by the same estimates, as users start them: tables, commands, and mistakes."""

import json
import re
from dataclasses import asdict, replace

import pytest

from launching import ROOT, ForkedRun
from model_utils import load_config
from planning.facts import BUILT_IN

PLAN = ROOT / "scripts" / "plan.py"


def plan(folder, *flags) -> ForkedRun:
    with ForkedRun([PLAN, *flags], folder) as run:
        run.wait()
    return run


def test_rows_and_commands(tmp_path):
    run = plan(
        tmp_path, "-c", "70b", "--gpus", 256, "--gpus_per_node", 8, "--gpu", "H100", "--network", "400Gb", "--fp8"
    )
    assert run.returncode == 0, run.output()
    lines = run.stdout.splitlines()
    assert lines[0].startswith("70b on 256 x H100 (with speeds of an H100; 32 hosts, 42.5 GB/s per GPU between them), ")
    rows = [line for line in lines if re.match(r"\d+ +\w", line) and "pretrain.py" not in line]
    commands = [line for line in lines if "pretrain.py" in line]
    assert len(rows) == len(commands) == 10
    speeds = [int(re.search(r"(?:bf16|float8) +([\d,]+)", row)[1].replace(",", "")) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert all(row.split()[-1] in ("compute", "link", "bubble", "memory") for row in rows)
    start = "python scripts/run_on_hosts.py --hostfile hosts.txt --nproc_per_node 8 pretrain.py -c 70b -p "
    assert all(start in command for command in commands)
    assert re.search(r"^row \d+ is the simplest of those within 5% of the fastest", run.stdout, re.MULTILINE)


def test_by_measured_speeds(tmp_path):
    """A card of half the speed takes twice as long, and a measured network needs no --network."""
    slow = replace(
        BUILT_IN["H100"],
        products=tuple((size, speed / 10) for size, speed in BUILT_IN["H100"].products),
        network=10.0,
        origin="measured somewhere",
    )
    (tmp_path / "facts.json").write_text(json.dumps(asdict(slow)))
    run = plan(tmp_path, "-c", "7b", "--gpus", 16, "--facts", tmp_path / "facts.json", "-n", 2)
    assert run.returncode == 0, run.output()
    assert (
        f"7b on 16 x H100 (with speeds in {tmp_path}/facts.json; 2 hosts, 10.0 GB/s per GPU between them)" in run.stdout
    )
    assert float(re.search(r"([\d.]+)%", run.stdout)[1]) < 10


def test_a_card_without_data_sheet_and_a_short_context(tmp_path):
    """Neither is a reason to refuse: the card's peak is not needed, and the context is the length that counts."""
    facts = asdict(replace(BUILT_IN["H100"], card="a new card"))
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    flags = ["-c", "30b", "--gpus", 32, "--facts", tmp_path / "facts.json", "--gpu_memory", 80, "-n", 1]
    run = plan(tmp_path, *flags)
    assert run.returncode == 0, run.output()
    assert "2,048 sequences of 2,048 tokens per step" in run.stdout
    assert re.search(r"bf16 +[\d,]+ +- +[\d.]+", run.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 12", "--gpus: 12 is not divisible by --gpus_per_node 8; take whole hosts"),
        (
            "--gpus 7",
            "--gpus: 7 fit no layout, since 1,024 sequences of a step do not divide among them; take a power of two, "
            "or --batch_tokens 4186112",
        ),
        ("--gpus 0", "--gpus: must be at least 1, not 0"),
        ("", "the following arguments are required: --gpus"),
        ("--gpus 8 --gpu V100", "--gpu: 'V100' is not one of B200"),
        (
            "--gpus 8 -l 3000",
            "--batch_tokens: 4,194,304 is not a number of whole sequences of --max_length 3000; give 4200000",
        ),
        ("--gpus 8 -l 1", "--max_length: must be at least 2, not 1"),
        ("--gpus 8 -l 0", "--max_length: must be at least 2, not 0"),
        ("--gpus 8 -l 8192", "--max_length: 8192 is above the model's context of 4096 tokens"),
        ("--gpus 8 --network fast", "argument --network: 'fast' is not a number of Gbit/s"),
        ("--gpus 8 --network -1", "--network: must be a positive number of Gbit/s, not -1.0"),
        ("--gpus 8 --gpus_per_node 0", "--gpus_per_node: must be at least 1, not 0"),
        ("--gpus 8 --gpu A100 --fp8", "--fp8: A100 has no float8"),
        ("--gpus 8 --facts missing.json", "--facts: missing.json cannot be read as JSON"),
        ("--gpus 8 --tokens -5", "--tokens: must be a positive number, not -5.0"),
        ("-c 70b --gpus 1", "--gpus: 1 x H100 do not hold the model: -p zero2_cpu -b 1 "),
        ("-c 70b --gpus 8 --gpu A10G", "--gpus: 8 x A10G do not hold the model"),
        ("-c nothing --gpus 8", "--config: 'nothing' is neither a known model"),
    ],
)
def test_mistakes(flags, message, tmp_path):
    run = plan(tmp_path, *flags.split())
    assert run.returncode == 2, run.output()
    assert run.stderr.startswith("plan.py: error: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


def test_the_command_of_a_model_whose_folder_has_a_space(tmp_path):
    config = load_config("tiny")
    config.save_pretrained(tmp_path / "my model")
    run = plan(tmp_path, "-c", tmp_path / "my model", "--gpus", 1, "-l", 128, "-n", 1)
    assert run.returncode == 0, run.output()
    assert f"pretrain.py -c '{tmp_path}/my model' -p " in run.stdout


def test_a_context_of_one_token_is_refused(tmp_path):
    config = load_config("tiny")
    config.max_position_embeddings = 1
    config.save_pretrained(tmp_path)
    run = plan(tmp_path, "-c", tmp_path, "--gpus", 1)
    assert run.returncode == 2, run.output()
    assert "--max_length: must be at least 2, not 1" in run.stderr


def test_weak_scaling_of_the_hosts_that_are_given(tmp_path):
    with ForkedRun(
        [ROOT / "benchmarks" / "weak_scaling.py", "--gpus_per_node", 4, "--gpu_memory", 10], tmp_path
    ) as run:
        assert run.wait() == 0, run.output()
    lines = run.stdout.splitlines()
    assert lines[1].startswith("| model, flags | 4 GPUs | 8 GPUs | 16 GPUs | ")
    assert not any("%" in line for line in lines if line.startswith("| 70b"))


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("weak_scaling.py", "--gpu V100", "--gpu: 'V100' is not one of B200"),
        ("weak_scaling.py", "--network -5", "--network: must be a positive number of Gbit/s, not -5.0"),
        (
            "estimated_steps.py",
            "--published --gpu H100",
            "--published: its GPUs and speeds are those of published.toml",
        ),
        ("estimated_steps.py", "--gpu A100", "--gpu: results.md has no rows of A100"),
        ("estimated_steps.py", "--facts {}/facts.json --gpu H200", "has the speeds of H100, not of H200"),
    ],
)
def test_mistakes_of_benchmarks(program, flags, message, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(asdict(BUILT_IN["H100"])))
    with ForkedRun([ROOT / "benchmarks" / program, *flags.format(tmp_path).split()], tmp_path) as run:
        assert run.wait() == 2, run.output()
    assert run.stdout == ""
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
