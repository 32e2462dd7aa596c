"""What a dry run prints: memory of a GPU by component, what would fit if that does not, and steps and days."""

import argparse
import copy
import math
from collections import ChainMap

from transformers import LlamaConfig

from attn import select_attention
from engine.layout import Layout, layout_problems, planned_ranks, resolve_layout
from engine.recomputation import recomputed_share, reenters
from model_utils import model_flops_per_token
from planning.cards import planned_card
from planning.memory import estimate_memory
from runtime.console import say


def memory_remedies(args: argparse.Namespace, config: LlamaConfig) -> str:
    """What fits by the estimate: single changes or, where none does, several at once; those that slow down least first.

    Where memory has run out though the estimate fits, it is what takes less than that.
    """
    before, gpus = estimate_memory(args, config, resolve_layout(args, config)).peak.total, 2 * planned_ranks(args)

    def fits(changes: dict) -> bool:
        changed, tried = argparse.Namespace(**vars(args) | changes), copy.deepcopy(config)
        if layout_problems(changed, tried) or (changed.keep_attention and reenters(changed)):
            return False
        layout = resolve_layout(changed, tried)
        select_attention(tried, changed.flash_attention, layout.sp > 1)
        needed, room = estimate_memory(changed, tried, layout).peak.total, planned_card(changed).memory_gb * 1e9
        return (needed < before or "memory_limit" in changes) and not needed > room  # NaN: a GPU that is not known

    lean: dict[str, dict] = {} if args.flash_attention else {"-a": {"flash_attention": True}}
    if recomputed_share(args) < 1:
        lean["-g" if args.recompute is None else "--recompute 1"] = {"gradient_checkpoint": True, "recompute": None}
    sizes = [args.batch_size >> halvings for halvings in range(1, args.batch_size.bit_length())]
    batches = [{f"-b {size}": {"batch_size": size}} for size in sizes]
    plugins = ("zero2_cpu",) if getattr(args, "lora_rank", None) else ("gemini", "zero2_cpu", "gemini_auto")
    others: dict[str, dict] = {"no --keep_attention": {"keep_attention": False}} if args.keep_attention else {}
    others |= {f"-p {plugin}": {"plugin": plugin} for plugin in plugins}
    if getattr(args, "memory_limit", None):
        others["a larger --memory_limit"] = {"memory_limit": None}
    others[f"{gpus} GPUs"] = {"gpus": gpus}

    largest = next((batch for batch in batches if all(map(fits, batch.values()))), {})
    if helping := [change for change, values in (lean | largest | others).items() if fits(values)]:
        return ", ".join(helping)
    for together in (lean, *(lean | batch for batch in batches)):
        flags, values = " ".join(together), dict(ChainMap(*together.values()))
        if fits(values):
            return flags
        if helping := [change for change, more in others.items() if fits(values | more)]:
            return f"{flags} with {' or '.join(helping)}"
    return "more GPUs, or larger ones"


def say_plan(
    args: argparse.Namespace, config: LlamaConfig, layout: Layout, tokens_per_step: int, total_tokens: float
) -> None:
    """Prints what a dry run is for: memory of a GPU by component, whether it fits, and the time that training takes."""
    estimate, card = estimate_memory(args, config, layout), planned_card(args)
    unit, bytes_of_unit = ("GB", 1e9) if estimate.peak.total > 1e9 else ("MB", 1e6)
    say(f"memory of a GPU in {unit}, of {layout.ranks} (estimate):")
    components = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    say(f"  {'':30}" + "".join(f"{name:>12}" for name in components))
    for moment in estimate.moments:
        figures = "".join(f"{getattr(moment, name) / bytes_of_unit:12.2f}" for name in components)
        say(f"  {moment.name:30}{figures}{'  <- peak' if moment is estimate.peak else ''}")
    if estimate.host:
        say(f"  and {estimate.host / 1e9:.1f} GB of host memory for each GPU")
    peak, memory = estimate.peak.total, card.memory_gb
    if not math.isnan(memory):
        verdict, remedy = (
            ("fits", "") if peak <= memory * 1e9 else ("does NOT fit", f"; what helps: {memory_remedies(args, config)}")
        )
        say(f"{verdict}: {peak / bytes_of_unit:.1f} {unit} at the peak, on {card.name} with {memory:g} GB{remedy}")

    flops = model_flops_per_token(config, args.max_length)
    if math.isnan(card.peak_tflops):
        say(f"time: the peak of {card.name} is not known; name a kind with --gpu")
        return
    tokens_per_second = layout.ranks * card.peak_tflops * 1e12 * args.mfu / flops
    steps = math.ceil(total_tokens / tokens_per_step)
    hours = total_tokens / tokens_per_second / 3600
    duration = f"{hours / 24:,.1f} days" if hours > 24 else f"{hours:,.2f} hours"
    say(
        f"time: {steps:,} steps of {tokens_per_step:,} tokens, {total_tokens:,.0f} in all: "
        f"{duration} on {layout.ranks} x {card.name} "
        f"at {args.mfu:.0%} MFU, {tokens_per_second:,.0f} tokens/s"
    )
