"""The report of a dry run: GPU memory by component, changes that make it fit, and the run's steps and days."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

from attn import select_attention
from engine.job import Job, reenters
from model_utils import model_flops_per_token
from planning.cards import DryRun, planned_card
from planning.memory import estimate_memory
from runtime.console import say


def memory_remedies(job: Job, plan: DryRun) -> str:
    """Return changes that make the job fit by the estimate: single ones, else combinations; the fastest first.

    If memory ran out although the estimate fits, only changes that lower the estimate count.
    """
    before, gpus = estimate_memory(job).peak.total, 2 * job.parallelism.ranks

    def fits(change: Change) -> bool:
        changed = change.of(job)
        if changed.problems() or (changed.compute.keep_attention and reenters(changed.layout)):
            return False
        limit = None if change.no_limit else plan.memory_limit
        needed, room = estimate_memory(changed).peak.total, planned_card(replace(plan, memory_limit=limit)).memory_gb
        return (needed < before or change.no_limit) and not needed > room * 1e9  # NaN: an unknown GPU

    compute, batch = job.compute, job.batch
    lean = {} if compute.flash_attention else {"-a": Change(compute=dict(flash_attention=True))}
    if job.recomputed < 1:
        lean["-g" if job.recomputed == 0 else "--recompute 1"] = Change(compute=dict(recompute=1.0))
    sizes = [batch.batch_size >> halvings for halvings in range(1, batch.batch_size.bit_length())]
    batches = [{f"-b {size}": Change(batch=dict(batch_size=size))} for size in sizes]
    plugins = ("zero2_cpu",) if job.adapters else ("gemini", "zero2_cpu", "gemini_auto")
    others = {"no --keep_attention": Change(compute=dict(keep_attention=False))} if compute.keep_attention else {}
    others |= {f"-p {plugin}": Change(parallelism=dict(plugin=plugin)) for plugin in plugins}
    if plan.memory_limit:
        others["a larger --memory_limit"] = Change(no_limit=True)
    others[f"{gpus} GPUs"] = Change(parallelism=dict(gpus=gpus))

    largest = next((smaller for smaller in batches if all(map(fits, smaller.values()))), {})
    if remedies := [name for name, change in (lean | largest | others).items() if fits(change)]:
        return ", ".join(remedies)
    for several in (lean, *(lean | smaller for smaller in batches)):
        flags, change = " ".join(several), sum(several.values(), Change())
        if fits(change):
            return flags
        if remedies := [name for name, more in others.items() if fits(change + more)]:
            return f"{flags} with {' or '.join(remedies)}"
    return "more GPUs, or larger ones"


@dataclass(frozen=True)
class Change:
    """New values of a job's fields, by the part of the job."""

    parallelism: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    no_limit: bool = False  # without --memory_limit

    def __add__(self, other: "Change") -> "Change":
        return Change(
            self.parallelism | other.parallelism,
            self.batch | other.batch,
            self.compute | other.compute,
            self.no_limit or other.no_limit,
        )

    def of(self, job: Job) -> Job:
        config, compute = copy.deepcopy(job.config), replace(job.compute, **self.compute)
        select_attention(config, compute.flash_attention, job.parallelism.sp > 1)
        return replace(
            job,
            config=config,
            parallelism=replace(job.parallelism, **self.parallelism),
            batch=replace(job.batch, **self.batch),
            compute=compute,
        )


def say_plan(job: Job, plan: DryRun, tokens_per_step: int, total_tokens: float) -> None:
    """Print the memory of a GPU by component, the verdict on whether it fits, and the time that training takes."""
    estimate, card, layout = estimate_memory(job), planned_card(plan), job.layout
    unit, bytes_of_unit = ("GB", 1e9) if estimate.peak.total > 1e9 else ("MB", 1e6)
    say(f"estimated memory per GPU in {unit} (GPUs: {layout.ranks}):")
    components = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    say(f"  {'':30}" + "".join(f"{name:>12}" for name in components))
    for phase in estimate.phases:
        figures = "".join(f"{getattr(phase, name) / bytes_of_unit:12.2f}" for name in components)
        say(f"  {phase.name:30}{figures}{'  <- peak' if phase is estimate.peak else ''}")
    if estimate.host:
        say(f"  and {estimate.host / 1e9:.1f} GB of host memory per GPU")
    peak, memory = estimate.peak.total, card.memory_gb
    if not math.isnan(memory):
        verdict, remedy = "fits", ""
        if peak > memory * 1e9:
            verdict, remedy = "does NOT fit", f"; what helps: {memory_remedies(job, plan)}"
        say(f"{verdict}: {peak / bytes_of_unit:.1f} {unit} at the peak, on {card.name} with {memory:g} GB{remedy}")

    flops = model_flops_per_token(job.config, job.batch.max_length, job.adapters is not None)
    if math.isnan(card.peak_tflops):
        say(f"time: the peak of {card.name} is unknown; name a known GPU with --gpu")
        return
    tokens_per_second = layout.ranks * card.peak_tflops * 1e12 * plan.mfu / flops
    steps = math.ceil(total_tokens / tokens_per_step)
    hours = total_tokens / tokens_per_second / 3600
    duration = f"{hours / 24:,.1f} days" if hours > 24 else f"{hours:,.2f} hours"
    say(
        f"time: {steps:,} steps of {tokens_per_step:,} tokens, {total_tokens:,.0f} in all: "
        f"{duration} on {layout.ranks} x {card.name} "
        f"at {plan.mfu:.0%} MFU, {tokens_per_second:,.0f} tokens/s"
    )
