"""GPUs by name: peak speed and memory."""

import math
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Card:
    """A GPU model, with figures of its vendor's data sheet."""

    name: str
    peak_tflops: float  # dense bf16 and fp16 tensor-core operations
    memory_gb: float  # nominal, in 10^9 bytes; most have 7% more, since vendors mean GiB
    peak_float8_tflops: float | None = None  # dense, with sums in float32; None: it has no float8


# The first whose name is part of the device's name counts, so longer names come first.
CARDS = (
    Card("B200", 2250.0, 180, 4500.0),
    Card("H100 PCIe", 756.0, 80, 1513.0),
    Card("H100 NVL", 835.0, 94, 1671.0),
    Card("H100", 989.0, 80, 1979.0),
    Card("H200", 989.0, 141, 1979.0),
    Card("H800", 989.0, 80, 1979.0),
    Card("A100-SXM4-40GB", 312.0, 40),
    Card("A100-PCIE-40GB", 312.0, 40),
    Card("A100", 312.0, 80),
    Card("A800", 312.0, 80),
    Card("L40S", 362.0, 44, 733.0),  # of 48 GB: error correction takes the rest, also in the A10G
    Card("A10G", 70.0, 22),
    Card("RTX 4090", 165.2, 24, 330.3),
    Card("RTX 3090", 71.0, 24),
)


def find_card(device_name: str) -> Card | None:
    """Return the card of a device, or None if the table lacks it."""
    return next((card for card in CARDS if card.name.lower() in device_name.lower()), None)


@dataclass(frozen=True)
class DryRun:
    """The GPUs that a dry run plans for."""

    dry_run: bool = False
    gpu: str | None = None  # model; None: this machine's, else H100
    gpu_memory: float | None = None  # GB; None: the model's
    memory_limit: int | None = None  # MB that a process may use
    mfu: float = 0.4  # fraction of the peak that training reaches


def planned_card(plan: DryRun) -> Card:
    """Return the planned GPU; its memory is `gpu_memory` if given, and at most `memory_limit`."""
    name = plan.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H100")
    card = find_card(name) or Card(name, math.nan, plan.gpu_memory or math.nan)
    memory = plan.gpu_memory or card.memory_gb
    if plan.memory_limit:
        memory = min(plan.memory_limit * 2**20 / 1e9, memory)
    return replace(card, memory_gb=memory)


def card_problems(plan: DryRun, fp8: bool) -> list[str]:
    """Return a line for each flag whose value describes no GPU, and for --fp8 if the GPU has no float8."""
    problems = []
    card, size = find_card(plan.gpu or ""), re.search(r"(\d+) ?GB", plan.gpu or "", re.IGNORECASE)
    if plan.gpu and not card:
        problems.append(f"--gpu: {plan.gpu!r} is not one of {', '.join(card.name for card in CARDS)}")
    elif card and size and plan.gpu_memory is None and abs(int(size[1]) - card.memory_gb) > 0.1 * card.memory_gb:
        others = [other.name for other in CARDS if card.name in other.name and other.memory_gb == int(size[1])]
        problems.append(
            f"--gpu: {plan.gpu!r} would be taken for {card.name} with {card.memory_gb:g} GB; give "
            + " or ".join([*others, f"--gpu_memory {size[1]}"])
        )
    if plan.gpu_memory is not None and not 0 < plan.gpu_memory < math.inf:
        problems.append(f"--gpu_memory: must be a positive number of GB, not {plan.gpu_memory}")
    planned = find_card(planned_card(plan).name)
    if fp8 and planned and not planned.peak_float8_tflops:
        problems.append(f"--fp8: {planned.name} has no float8; leave --fp8 out, or plan for another --gpu")
    if not 0 < plan.mfu <= 1:
        problems.append(f"--mfu: must be above 0 and at most 1, not {plan.mfu}")
    return problems
