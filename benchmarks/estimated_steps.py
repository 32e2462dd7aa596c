"""Compare the step times that a dry run estimates with the measured ones in docs/results.md; needs no GPU.

python benchmarks/estimated_steps.py
python benchmarks/estimated_steps.py --facts FILE    only the rows of this file's GPU, by speeds measured on it
"""

import argparse
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import process

process.prepare()

import benchmark
import pretrain
from engine.job import Job
from planning.cards import find_card
from planning.facts import facts_of, read_facts
from planning.machines import GPUS_PER_HOST, NOMINAL_GBITS, DryRun, Machines, planned_card, planned_machines
from planning.memory import estimate_memory, settle_for
from planning.step_time import StepTime, estimate_step
from runtime.console import InputError, say
from training.flags import user_path

RESULTS = ROOT / "docs" / "results.md"
PUBLISHED = ROOT / "benchmarks" / "published.toml"


@dataclass(frozen=True)
class Row:
    """A measured row of the table: GPU model, job, its flags as written, tokens per second, and peak bytes."""

    gpu: str
    job: Job
    flags: str
    tokens_per_second: float
    peak_gb: float | None

    @property
    def seconds(self) -> float:
        """Measured seconds of a step."""
        return self.job.tokens_per_step / self.tokens_per_second


def measured_rows(text: str) -> Iterator[Row]:
    """Yield the rows of the first table in docs/results.md. Raises ValueError for one that does not parse."""
    table = text.partition("\n| GPU |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        gpus, _, gpu = cells[0].rpartition(" x ")
        model, _, layers = cells[1].partition(", ")
        flags = re.findall(r"`([^`]+)`", cells[2])[0]
        per_rank = int(cells[3].rpartition(" x ")[2])
        attention = "" if "without `-a`" in cells[2] else "-a"
        args = benchmark.parse_args(
            f"-c {model} -b {per_rank} --dry_run --gpus {gpus or 1} {attention} {flags}".split()
        )
        job, _ = benchmark.load_job(args, int(layers.partition(" ")[0]) if layers else None)
        card = find_card(gpu)
        assert card is not None
        peak = float(cells[6]) if cells[6] else None
        yield Row(card.name, settle_for(job, card.memory_gb * 1e9), flags, float(cells[4].replace(",", "")), peak)


def estimated(row: Row, facts: Path | None = None) -> StepTime:
    """Return the estimate of a row's step, by built-in facts or those in a file."""
    card = find_card(row.gpu)
    assert card is not None
    found = facts_of(card, facts)
    assert found is not None
    return estimate_step(row.job, Machines(found, GPUS_PER_HOST, network=1))


@dataclass(frozen=True)
class Published:
    """A training speed that others published; see published.toml."""

    source: str
    job: str
    gpu: str
    flags: str
    tokens: float
    per_host: int = GPUS_PER_HOST
    network: float = NOMINAL_GBITS
    bandwidth: float | None = None
    why: str = ""

    def estimated(self) -> float:
        """Return the tokens per second and GPU that are estimated for the flags."""
        args = pretrain.parse_args(f"{self.flags} -x bf16 -a --dry_run".split())
        job, _ = benchmark.load_job(args)
        if problems := job.problems():
            raise InputError(*problems)
        plan = DryRun(dry_run=True, gpu=self.gpu, gpus_per_node=self.per_host, network=self.network)
        card = planned_card(plan)
        machines, job = planned_machines(plan), settle_for(job, card.memory_gb * 1e9)
        assert machines is not None
        if self.bandwidth:
            memory = machines.facts.memory * self.bandwidth / card.bandwidth
            machines = replace(machines, facts=replace(machines.facts, memory=memory))
        return job.tokens_per_step / estimate_step(job, machines).total / job.layout.ranks


def compare_published() -> None:
    """Print the published speeds beside the estimated ones."""
    say("| source | job | published, tokens/s per GPU | estimated | estimated / published | why |")
    say("|---|---|---|---|---|---|")
    for run in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["run"]:
        row = Published(**run)
        tokens = row.estimated()
        say(f"| {row.source} | {row.job} | {row.tokens:,} | {tokens:,.0f} | {tokens / row.tokens:.2f} | {row.why} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=user_path, help="file of measured facts (default: the built-in ones)")
    parser.add_argument("--gpu", help="only the rows of this GPU (default: that of --facts, else all)")
    parser.add_argument("--published", action="store_true", help="compare with published.toml instead")
    args = parser.parse_args()
    if args.published:
        if args.facts or args.gpu:
            raise InputError(
                "--published: its GPUs and speeds are those of published.toml; leave --facts and --gpu out"
            )
        compare_published()
        return 0
    gpu = args.gpu or (read_facts(args.facts).card if args.facts else None)
    rows = [row for row in measured_rows(RESULTS.read_text(encoding="utf-8")) if row.gpu == (gpu or row.gpu)]
    if not rows:
        raise InputError(f"--{'gpu' if args.gpu else 'facts'}: {RESULTS.name} has no rows of {gpu}")
    in_float8 = any(row.job.compute.fp8 for row in rows)
    if args.facts and (problems := DryRun(gpu=gpu, facts=args.facts).facts_problems(in_float8)):
        raise InputError(*problems)
    say("| GPUs | layers | flags | sequences | measured, ms | estimated, ms | error | peak GB | estimated | tokens/s |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    errors = []
    for row in rows:
        job, step = row.job, estimated(row, args.facts)
        errors.append(step.total / row.seconds - 1)
        peak = f"{row.peak_gb:.1f}" if row.peak_gb else ""
        tokens, sequences = job.tokens_per_step / step.total, job.batch.sequences
        say(
            f"| {job.layout.ranks} x {row.gpu} | {job.config.num_hidden_layers} | `{row.flags}` | {sequences} | "
            f"{row.seconds * 1e3:,.1f} | {step.total * 1e3:,.1f} | {errors[-1]:+.1%} | {peak} | "
            f"{estimate_memory(job).peak.total / 1e9:.1f} | {tokens:,.0f} |"
        )
    sizes = sorted(map(abs, errors))
    say(f"{len(sizes)} rows: median error {statistics.median(sizes):.1%}, largest {sizes[-1]:.1%}")
    return 0


if __name__ == "__main__":
    process.run(main, Path(__file__).name)
