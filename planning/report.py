"""The report of a dry run: GPU memory and a step's time by component, changes that make it fit, steps and days."""

import copy
import math
from collections import ChainMap
from dataclasses import fields, replace
from typing import Any

from attn import select_attention
from engine.job import AUTO, MICRO_BATCH, STEP, Job, reenters
from model_utils import model_flops_per_token
from planning.machines import DryRun, Machines, planned_card, planned_machines
from planning.memory import checkpoint_memory, estimate_memory
from planning.step_time import estimate_step
from runtime.console import say, size_text


def memory_remedies(job: Job, plan: DryRun) -> str:
    """Return changes that make the job fit by the estimate: single ones, else combinations; the fastest first.

    If memory ran out although the estimate fits, only changes that lower the estimate count.
    """
    before, gpus = estimate_memory(job).peak.total, 2 * job.parallelism.ranks

    def fits(change: dict[str, Any]) -> bool:
        changed = _changed(job, change)
        if changed.problems() or (changed.compute.keep_attention and reenters(changed.layout)):
            return False
        card = planned_card(replace(plan, memory_limit=change.get("memory_limit", plan.memory_limit)))
        needed = estimate_memory(changed).peak.total
        return (needed < before or "memory_limit" in change) and not needed > card.memory_gb * 1e9  # NaN: unknown GPU

    # New values of fields, by the flags that set them.
    compute, batch = job.compute, job.batch
    lean: dict[str, dict[str, Any]] = {} if compute.flash_attention else {"-a": {"flash_attention": True}}
    if job.recomputed < 1:
        lean["-g" if job.recomputed == 0 else "--recompute 1"] = {"recompute": 1.0}
    sizes = [batch.batch_size >> halvings for halvings in range(1, batch.batch_size.bit_length())]
    batches = [{f"-b {size}": {"batch_size": size}} for size in sizes]
    plugins = ["zero2_cpu"] if job.adapters else ["gemini", "zero2_cpu", "gemini_auto"]
    others: dict[str, dict[str, Any]] = {}
    if compute.keep_attention:
        others["no --keep_attention"] = {"keep_attention": False}
    if job.exchange.exchange == STEP:
        others["--exchange micro_batch"] = {"exchange": MICRO_BATCH}
    plugins = [plugin for plugin in plugins if plugin != job.parallelism.plugin]
    others |= {f"-p {plugin}": {"plugin": plugin, "exchange": AUTO} for plugin in plugins}
    if plan.memory_limit:
        others["a larger --memory_limit"] = {"memory_limit": None}
    others[f"{gpus} GPUs"] = {"gpus": gpus}

    largest = next((smaller for smaller in batches if all(map(fits, smaller.values()))), {})
    if remedies := [name for name, change in (lean | largest | others).items() if fits(change)]:
        return ", ".join(remedies)
    for several in (lean, *(lean | smaller for smaller in batches)):
        flags, change = " ".join(several), dict(ChainMap(*several.values()))
        if fits(change):
            return flags
        if remedies := [name for name, more in others.items() if fits(change | more)]:
            return f"{flags} with {' or '.join(remedies)}"
    return "more GPUs, or larger ones"


def _changed(job: Job, change: dict[str, Any]) -> Job:
    """Return the job with new values of fields of its parallelism, batch, compute and exchange."""
    parts: dict[str, Any] = {"config": copy.deepcopy(job.config)}
    for name in ("parallelism", "batch", "compute", "exchange"):
        part = getattr(job, name)
        parts[name] = replace(part, **{key: value for key, value in change.items() if key in vars(part)})
    select_attention(
        parts["config"],
        parts["compute"].flash_attention,
        job.parallelism.sp > 1,
        deterministic=parts["compute"].deterministic,
    )
    return replace(job, **parts)


def say_host_memory(job: Job) -> None:
    """Print the host memory that checkpoints take."""
    busiest, total, load = checkpoint_memory(job)
    say(
        f"host memory: checkpoints written in the background keep buffers of {size_text(busiest)} on one rank at most, "
        f"{size_text(total)} on all {job.layout.ranks}; resuming takes up to {size_text(load)} per rank"
    )


def say_plan(job: Job, plan: DryRun, tokens_per_step: int, total_tokens: float, loaders: int = 0) -> None:
    """Print the memory of a GPU by component, the verdict on whether it fits, and the time that training takes.

    Args:
        tokens_per_step: of all ranks, on average.
        loaders: see `estimate_step`.
    """
    say_memory(job, plan)
    say_time(job, plan, tokens_per_step, total_tokens, loaders)


def say_memory(job: Job, plan: DryRun) -> None:
    """Print the memory of a GPU by component, and the verdict on whether it fits."""
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


def say_time(job: Job, plan: DryRun, tokens_per_step: int, total_tokens: float, loaders: int) -> None:
    """Print the time of a step by component, and that of the run or stage; with `plan.mfu` only the latter.

    Args:
        tokens_per_step, loaders: as in `say_plan`.
    """
    card, layout, batch = planned_card(plan), job.layout, job.batch
    length = tokens_per_step / (batch.sequences * layout.dp)  # mean, of sequences that differ in length
    flops = model_flops_per_token(job.config, round(length), job.adapters is not None)
    if plan.mfu is not None and math.isnan(card.peak_tflops):
        say(f"time: the peak of {card.name} is unknown; name a known GPU with --gpu")
        return
    if plan.mfu is not None:
        seconds = tokens_per_step * flops / (layout.ranks * card.peak_tflops * 1e12 * plan.mfu)
    elif machines := planned_machines(plan):
        step = estimate_step(replace(job, batch=replace(batch, max_length=round(length))), machines, loaders)
        seconds = step.total
        say(f"estimated time of a step in ms ({describe_machines(machines, layout.ranks)}):")
        components = {name: max(len(name), 8) + 2 for name in (*(field.name for field in fields(step)), "total")}
        say("  " + "".join(f"{name.replace('_', ' '):>{width}}" for name, width in components.items()))
        say("  " + "".join(f"{getattr(step, name) * 1e3:{width},.1f}" for name, width in components.items()))
    else:
        say(f"time: the speed of {card.name} is unknown; name a known GPU with --gpu, or give --mfu or --facts")
        return
    tokens_per_second = tokens_per_step / seconds
    mfu = tokens_per_second * flops / (layout.ranks * card.peak_tflops * 1e12)
    share = "" if math.isnan(mfu) else f", {mfu:.1%} MFU"
    hours = total_tokens / tokens_per_second / 3600
    duration = f"{hours / 24:,.1f} days" if hours > 24 else f"{hours:,.2f} hours"
    say(
        f"time: {math.ceil(total_tokens / tokens_per_step):,} steps of {tokens_per_step:,} tokens, {total_tokens:,.0f} "
        f"in all: {duration} on {layout.ranks} x {card.name}, {tokens_per_second:,.0f} tokens/s{share}"
    )


def describe_machines(machines: Machines, gpus: int) -> str:
    """Return the origin of the speeds, and those of the links between the hosts that so many GPUs need."""
    facts, hosts = machines.facts, -(-gpus // machines.per_host)
    links = f"; {hosts} hosts, {machines.network:.1f} GB/s per GPU between them" if hosts > 1 else ""
    return f"with speeds {facts.origin}{links}"
