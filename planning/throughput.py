"""Throughput of a run: tokens per second, TFLOPS per GPU, and MFU if the device's peak is known."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import LlamaConfig

from engine.device import synchronize
from model_utils import count_parameters, model_flops_per_token
from planning.cards import find_card


@dataclass(frozen=True)
class Throughput:
    seconds: float
    tokens_per_second: float  # over all GPUs
    tflops: float  # model TFLOPS per GPU
    mfu: float | None  # fraction of the device's peak; None if that is unknown


class PerformanceEvaluator:
    """Measure the throughput between calls of `lap`. The caller synchronizes the device before each."""

    def __init__(self, flops_per_token: int, gpus: int, device_name: str):
        self.flops_per_token = flops_per_token
        self.gpus = gpus
        card = find_card(device_name)
        self.peak = card.peak_tflops if card else None
        self.last = time.perf_counter()

    def restart(self) -> float:
        """Exclude the time since the last lap, such as that of a checkpoint, from the next lap, and return it."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def lap(self, tokens: int) -> Throughput:
        """Return the throughput since the last lap, in which all GPUs together trained `tokens`."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        tokens_per_second = tokens / seconds
        tflops = tokens_per_second * self.flops_per_token / self.gpus / 1e12
        return Throughput(seconds, tokens_per_second, tflops, tflops / self.peak if self.peak else None)


class StepTimer:
    """Measure the seconds of each step; the device is synchronized before and after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
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
    """Return the figures of a benchmark; the throughput is that of all steps together, as in training.

    Args:
        sequences: per step, over all data-parallel ranks.
        recomputation: fraction of the layers that the backward pass recomputes.

    Returns:
        Among others `tflops_per_gpu`, which counts FLOPs as ColossalAI's published figures do (8 x parameters x tokens
        with recomputation, 6 without, in between for a fraction of the layers; no attention), and
        `model_tflops_per_gpu`, `mfu` and `float8_utilization`, which use `model_flops_per_token`; the last two are
        fractions of the device's peaks in bf16 and float8.
    """
    mean = statistics.fmean(step_seconds)
    samples_per_second = sequences / mean
    tokens_per_second = samples_per_second * seq_length
    counted = (6 + 2 * recomputation) * count_parameters(config)
    model_tflops = tokens_per_second * model_flops_per_token(config, seq_length) / gpus / 1e12
    card = find_card(device_name)
    float8_peak = card.peak_float8_tflops if card else None
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
        "mfu": model_tflops / card.peak_tflops if card else None,
        "float8_utilization": model_tflops / float8_peak if float8_peak else None,
    }
