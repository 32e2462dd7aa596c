"""Throughput of a run: tokens a second, model TFLOPS a GPU, and MFU where the device's peak is known."""

import time
from dataclasses import dataclass

from transformers import LlamaConfig

from model_utils import model_flops_per_token

# Dense bf16/fp16 tensor-core TFLOPS from the vendors' data sheets; the first name that the device's name contains.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("A10G", 70.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Peak of one device in TFLOPS, or None for a device that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS if name.lower() in device_name.lower()), None)


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
