"""Estimate how plugins scale from one host to many, with the same work on each GPU; needs no GPU.

    python benchmarks/weak_scaling.py
    python benchmarks/weak_scaling.py --network 100Gb

It prints the MFU that is estimated on 1, 2, 4 ... 128 hosts, of 8 H100s unless told, and the share of the step that
exchanges between GPUs add.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import process

process.prepare()

import benchmark
from engine.job import Job
from planning.machines import DryRun, Machines, card_problems, planned_card, planned_machines
from planning.memory import estimate_memory, settle_for, usable
from planning.step_time import estimate_step, estimated_mfu
from runtime.console import InputError, say
from training.flags import ArgumentParser, add_machine_args, take

HOSTS = (1, 2, 4, 8, 16, 32, 64, 128)
JOBS = (
    ("7b", "-p zero2 -b 2"),
    ("7b", "-p zero2 -b 4 -g"),
    ("7b", "-p gemini -b 2"),
    ("7b", "-p gemini -b 16 -g"),
    ("7b", "-p hybrid_parallel --tp 1 --pp 2 --zero 1 --microbatch_size 2 -b 32"),
    ("70b", "-p gemini -b 4 -g --keep_attention"),
    ("70b", "-p hybrid_parallel --tp 8 --pp 1 --zero 1 -b 8 -g"),
    ("70b", "-p hybrid_parallel --tp 8 --pp 4 --zero 1 --microbatch_size 2 -b 64 --recompute 0.25 --keep_attention"),
)


def job_on(gpus: int, model: str, flags: str) -> Job:
    """Return the job of a row on so many GPUs."""
    args = benchmark.parse_args(f"-c {model} {flags} -a --dry_run --gpus {gpus}".split())
    return benchmark.load_job(args)[0]


def cell(job: Job, machines: Machines, memory: float, peak_tflops: float) -> str:
    """Return the MFU and the share of the step that exchanges add, or why there is none."""
    if job.problems():
        return "-"
    if estimate_memory(job).peak.total > usable(memory):
        return "too large"
    job = settle_for(job, memory)
    step = estimate_step(job, machines)
    return f"{estimated_mfu(job, step, peak_tflops):.1%}, {step.exchange / step.total:.0%}"


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.set_defaults(dry_run=True, mfu=None)
    add_machine_args(parser)
    args: argparse.Namespace = parser.parse_args()
    plan = take(DryRun, args)
    if not (plan.gpu or plan.facts):
        plan = replace(plan, gpu="H100")
    if problems := card_problems(plan, fp8=False):
        raise InputError(*problems)
    card, machines = planned_card(plan), planned_machines(plan)
    if machines is None or not (card.memory_gb > 0 and card.peak_tflops > 0):
        raise InputError(f"--facts: memory and peak of {card.name} are unknown; measure a card of the data sheets")
    say("MFU, and the share of the step that exchanges add:")
    say(f"| model, flags | {' | '.join(f'{hosts * machines.per_host} GPUs' for hosts in HOSTS)} |")
    say("|---|" + "---|" * len(HOSTS))
    for model, flags in JOBS:
        jobs = (job_on(hosts * machines.per_host, model, flags) for hosts in HOSTS)
        cells = [cell(job, machines, card.memory_gb * 1e9, card.peak_tflops) for job in jobs]
        say(f"| {model} `{flags}` | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    process.run(main, Path(__file__).name)
