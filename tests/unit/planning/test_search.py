"""The search for fast layouts: against an exhaustive one, and the README's table and commands, which are its advice."""

import re
import shlex
from dataclasses import replace

import pytest

import pretrain
from launching import ROOT
from model_utils import load_config
from planning.cards import find_card
from planning.machines import DryRun, planned_machines
from planning.memory import estimate_memory, settle_for, usable
from planning.search import RECOMPUTED, Found, Wish, _jobs, describe_split, fastest, flags_of, simplest
from planning.step_time import estimate_step
from training.flags import job_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
LENGTHS = {"30b": 2048, "65b": 2048, "llama3-8b": 8192, "llama3-70b": 8192, "llama3.2-1b": 8192}
NAMES = {"7B": "7b", "13B": "13b", "30B": "30b", "65B": "65b", "70B": "70b"}


def wish(model: str, gpus: int, gpu: str = "H100", fp8: bool = False, **changes) -> Wish:
    machines, card = planned_machines(DryRun(dry_run=True, gpu=gpu)), find_card(gpu)
    assert machines
    assert card
    asked = Wish(load_config(model), machines, gpus, card.memory_gb * 1e9, LENGTHS.get(model, 4096), 4_194_304, fp8)
    return replace(asked, **changes)


def advice(model: str, gpus: int) -> Found | None:
    found = fastest(wish(model, gpus))
    return found[simplest(found)] if found else None


@pytest.mark.parametrize(("model", "gpus", "fp8"), [("7b", 8, False), ("13b", 16, True), ("7b", 1, True)])
def test_equals_an_exhaustive_search(model, gpus, fp8):
    """Without bounds: every job with every share of recomputation, of which the first that fits counts."""
    asked = wish(model, gpus, "H200", fp8=fp8, tokens=4096 * 64)
    best: dict[object, float] = {}
    for job in _jobs(asked):
        for fraction, keep_attention in RECOMPUTED:
            compute = replace(job.compute, recompute=fraction, keep_attention=keep_attention)
            settled = settle_for(replace(job, compute=compute), asked.memory)
            if estimate_memory(settled).peak.total <= usable(asked.memory):
                layout = job.layout
                key = layout.plugin, layout.tp, layout.pp, layout.sp, fp8 and job.compute.fp8
                seconds = estimate_step(settled, asked.machines).total
                best[key] = min(seconds, best.get(key, seconds))
                break
    found = fastest(asked, count=10)
    assert [each.step.total for each in found] == pytest.approx(sorted(best.values())[:10])


@pytest.mark.parametrize(("model", "gpus", "fp8"), [("7b", 8, True), ("70b", 64, False), ("llama3-8b", 32, False)])
def test_flags_give_the_job_that_was_estimated(model, gpus, fp8):
    asked = wish(model, gpus, fp8=fp8)
    for found in fastest(asked):
        args = pretrain.parse_args(shlex.split(f"-c {model} {flags_of(found.job)} --dry_run --gpus {gpus}"))
        job = settle_for(job_of(args, found.job.config), asked.memory)
        assert job.problems() == []
        assert job.layout == found.job.layout
        assert estimate_step(job, asked.machines) == found.step
        assert estimate_memory(job).peak.total == found.peak <= usable(asked.memory)
        layout, batch = job.layout, job.batch
        assert batch.sequences * batch.max_length * layout.dp == 4_194_304
        assert layout.ranks == gpus


def test_says_what_bounds_a_layout():
    slow = replace(wish("7b", 32), machines=replace(wish("7b", 32).machines, network=0.5))
    assert {found.bound for found in fastest(slow)} >= {"link"}
    assert fastest(wish("7b", 8))[0].bound == "compute"
    full = wish("30b", 8)
    assert {found.bound for found in fastest(full)} == {"memory"}
    few = [found for found in fastest(wish("13b", 8, tokens=4096 * 8)) if found.job.layout.pp == 8]
    assert all(found.bound == "bubble" for found in few)


def test_more_memory_never_makes_the_fastest_slower():
    speeds = [fastest(replace(wish("13b", 8), memory=size * 1e9))[0].tokens_per_second for size in (60, 80, 141)]
    assert speeds == sorted(speeds)


def test_the_readme_table_is_its_advice():
    header, _, *rows = re.search(r"\| model \| 8 GPUs .*?\n\n", README, re.DOTALL)[0].strip().splitlines()
    counts = [int(re.search(r"\d+", cell)[0]) for cell in header.strip("|").split("|")[1:]]
    assert len(rows) == 7
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        model = NAMES.get(name) or name.lower().replace(" ", "", 1).replace(" ", "-")
        found = [advice(model, gpus) for gpus in counts]
        peak = find_card("H100").peak_tflops
        said = ["too large" if each is None else f"{describe_split(each.job)}: {each.mfu(peak):.0%}" for each in found]
        assert cells == said, row


RECIPE = re.findall(r"pretrain\.py -c (\S+) (?:--lr 1.5e-4 )?(.*) \$RUN # (\d+) GPUs", README)


@pytest.mark.parametrize(("model", "flags", "gpus"), RECIPE)
def test_the_commands_of_the_recipe_are_its_advice(model, flags, gpus):
    assert len(RECIPE) == 11
    found = advice(model, int(gpus))
    assert found is not None
    assert flags == flags_of(found.job).replace(" -x bf16 -a", "")
