"""GPUs by name: peak speed and memory."""

import argparse
import math
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Card:
    """A kind of GPU, from its vendor's data sheet."""

    name: str
    peak_tflops: float  # dense bf16 and fp16 tensor-core operations
    memory_gb: float  # nominal, in 10^9 bytes; most have 7% more, the binary unit


# The first whose name is part of the device's name.
CARDS = (
    Card("B200", 2250.0, 180),
    Card("H100 PCIe", 756.0, 80),
    Card("H100 NVL", 835.0, 94),
    Card("H100", 989.0, 80),
    Card("H200", 989.0, 141),
    Card("H800", 989.0, 80),
    Card("A100-SXM4-40GB", 312.0, 40),
    Card("A100-PCIE-40GB", 312.0, 40),
    Card("A100", 312.0, 80),
    Card("A800", 312.0, 80),
    Card("L40S", 362.0, 44),  # of 48, the rest corrects memory errors; so in the next
    Card("A10G", 70.0, 22),
    Card("RTX 4090", 165.2, 24),
    Card("RTX 3090", 71.0, 24),
)


def find_card(device_name: str) -> Card | None:
    """The kind of a device, or None for one that is not in the table."""
    return next((card for card in CARDS if card.name.lower() in device_name.lower()), None)


def peak_tflops(device_name: str) -> float | None:
    """Peak of one device in TFLOPS, or None for a device that is not in the table."""
    card = find_card(device_name)
    return card.peak_tflops if card else None


def planned_card(args: argparse.Namespace) -> Card:
    """The GPU that `--gpu` names, or this machine's, or an H100; with `--gpu_memory`, up to `--memory_limit`."""
    name = args.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H100")
    card = find_card(name) or Card(name, math.nan, args.gpu_memory or math.nan)
    memory = args.gpu_memory or card.memory_gb
    if getattr(args, "memory_limit", None):
        memory = min(args.memory_limit * 2**20 / 1e9, memory)
    return replace(card, memory_gb=memory)


def card_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags that describe the GPUs of a dry run."""
    problems = []
    card, size = find_card(args.gpu or ""), re.search(r"(\d+) ?GB", args.gpu or "", re.IGNORECASE)
    if args.gpu and not card:
        problems.append(f"--gpu: {args.gpu!r} is none of {', '.join(card.name for card in CARDS)}")
    elif card and size and args.gpu_memory is None and abs(int(size[1]) - card.memory_gb) > 0.1 * card.memory_gb:
        others = [other.name for other in CARDS if card.name in other.name and other.memory_gb == int(size[1])]
        problems.append(
            f"--gpu: {args.gpu!r} would be taken for {card.name} with {card.memory_gb:g} GB; give "
            + " or ".join([*others, f"--gpu_memory {size[1]}"])
        )
    if args.gpu_memory is not None and not 0 < args.gpu_memory < math.inf:
        problems.append(f"--gpu_memory: {args.gpu_memory} is not a positive number of GB")
    if not 0 < args.mfu <= 1:
        problems.append(f"--mfu: {args.mfu} is not above 0 and at most 1")
    return problems
