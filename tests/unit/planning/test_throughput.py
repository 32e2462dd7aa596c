"""Peaks by device name, and the arithmetic of laps by a clock that the test advances."""

import time

import pytest

from model_utils import load_config, model_flops_per_token
from planning.cards import find_card
from planning.throughput import PerformanceEvaluator


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H800", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("nvidia geforce rtx 3090", 71.0),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak(device, peak):
    card = find_card(device)
    assert (card and card.peak_tflops) == peak


class Clock:
    """Replacement of time.perf_counter."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_measured_reference_point(clock):
    """LLaMA-2 7B on one H200 at 9,772 tokens per second: 45.5% of the peak, recomputation not counted."""
    evaluator = PerformanceEvaluator(model_flops_per_token(load_config("7b"), 4096), gpus=1, device_name="NVIDIA H200")
    clock.now += 2.0
    throughput = evaluator.lap(tokens=9772 * 2)
    assert throughput.tokens_per_second == 9772
    assert throughput.tflops == pytest.approx(9772 * model_flops_per_token(load_config("7b"), 4096) / 1e12)
    assert throughput.mfu == pytest.approx(0.455, abs=5e-4)


def test_each_lap_starts_at_the_end_of_the_last(clock):
    evaluator = PerformanceEvaluator(model_flops_per_token(load_config("test"), 64), gpus=2, device_name="cpu")
    clock.now += 0.5
    assert evaluator.lap(100).tokens_per_second == 200
    clock.now += 4.0
    throughput = evaluator.lap(100)
    assert throughput.tokens_per_second == 25
    assert throughput.tflops == pytest.approx(25 / 2 * model_flops_per_token(load_config("test"), 64) / 1e12)
    assert throughput.mfu is None


def test_restart_excludes_the_time_before(clock):
    evaluator = PerformanceEvaluator(model_flops_per_token(load_config("test"), 64), gpus=1, device_name="cpu")
    clock.now += 60.0
    evaluator.restart()
    clock.now += 2.0
    assert evaluator.lap(100).tokens_per_second == 50
