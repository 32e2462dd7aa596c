"""Throughput of a run: tokens a second, TFLOPS a GPU, and MFU where the device's peak is known."""

import argparse
import contextlib
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from colossalai.accelerator import get_accelerator
from transformers import LlamaConfig

from model_utils import count_parameters, model_flops_per_token


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


@dataclass(frozen=True)
class Throughput:
    tokens_per_second: float  # over all GPUs
    tflops: float  # model TFLOPS of one GPU
    mfu: float | None  # fraction of the device's peak


class PerformanceEvaluator:
    """Measures from one call of `lap` to the next. The caller synchronises the device first."""

    def __init__(self, config: LlamaConfig, seq_length: int, gpus: int, device_name: str):
        self.flops_per_token = model_flops_per_token(config, seq_length)
        self.gpus = gpus
        self.peak = peak_tflops(device_name)
        self.last = time.perf_counter()

    def restart(self) -> None:
        """Leaves what happened since the last lap, such as a checkpoint, out of the next one."""
        self.last = time.perf_counter()

    def lap(self, tokens: int) -> Throughput:
        """Throughput over `tokens` of all GPUs since the last lap."""
        now = time.perf_counter()
        tokens_per_second = tokens / (now - self.last)
        self.last = now
        tflops = tokens_per_second * self.flops_per_token / self.gpus / 1e12
        return Throughput(tokens_per_second, tflops, tflops / self.peak if self.peak else None)


class StepTimer:
    """Seconds of each step, from when the device has done what came before it to when it has done the step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        accelerator = get_accelerator()
        accelerator.synchronize()
        start = time.perf_counter()
        yield
        accelerator.synchronize()
        self.seconds.append(time.perf_counter() - start)


def benchmark_figures(
    config: LlamaConfig,
    step_seconds: list[float],
    sequences: int,
    seq_length: int,
    gpus: int,
    recomputation: float,
    device_name: str,
) -> dict[str, float | list[float] | None]:
    """What a benchmark reports of its steps; throughput over their sum, as one that trains on would see it.

    Args:
        sequences: in a step, over all data-parallel ranks.
        recomputation: share of the layers whose forward pass the backward pass repeats.

    Returns:
        Among others `tflops_per_gpu`, by the count of ColossalAI's published figures (8 x parameters x tokens with
        recomputation, 6 without, attention left out; in between for a share of the layers), and `model_tflops_per_gpu`
        and `mfu` by that of `model_flops_per_token`.
    """
    mean = statistics.fmean(step_seconds)
    samples_per_second = sequences / mean
    tokens_per_second = samples_per_second * seq_length
    counted = (6 + 2 * recomputation) * count_parameters(config)
    model_tflops = tokens_per_second * model_flops_per_token(config, seq_length) / gpus / 1e12
    peak = peak_tflops(device_name)
    return {
        "step_seconds": step_seconds,
        "step_seconds_mean": mean,
        "step_seconds_median": statistics.median(step_seconds),
        "step_seconds_p10": float(np.percentile(step_seconds, 10)),
        "step_seconds_p90": float(np.percentile(step_seconds, 90)),
        "samples_per_second": samples_per_second,
        "tokens_per_second": tokens_per_second,
        "tflops_per_gpu": tokens_per_second * counted / gpus / 1e12,
        "model_tflops_per_gpu": model_tflops,
        "mfu": model_tflops / peak if peak else None,
    }
