"""The learning-rate schedule."""

from types import SimpleNamespace

import pytest
import torch

from engine.job import Job, Optimization
from model_utils import load_config
from training.schedule import build_scheduler, cosine_with_warmup


def test_warm_up_is_linear_and_ends_at_the_peak():
    values = [cosine_with_warmup(step, 4, 100) for step in range(5)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_ends_at_a_tenth():
    assert cosine_with_warmup(52, 4, 100) == pytest.approx(0.55)  # half way
    assert cosine_with_warmup(100, 4, 100) == pytest.approx(0.1)
    assert cosine_with_warmup(99, 4, 100) == pytest.approx(0.1, abs=1e-3)
    assert cosine_with_warmup(1000, 4, 100) == pytest.approx(0.1)
    falling = [cosine_with_warmup(step, 4, 100) for step in range(4, 101)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_ends_at_the_fraction_asked_for():
    assert cosine_with_warmup(100, 4, 100, min_ratio=0.25) == pytest.approx(0.25)
    assert cosine_with_warmup(100, 4, 100, min_ratio=0.0) == pytest.approx(0.0)
    assert cosine_with_warmup(4, 4, 100, min_ratio=0.0) == 1.0


def test_no_warm_up_and_only_warm_up():
    assert cosine_with_warmup(0, 0, 10) == 1.0
    assert [cosine_with_warmup(step, 10, 10) for step in (0, 9)] == [0.1, 1.0]
    assert cosine_with_warmup(0, 0, 0) > 0


@pytest.mark.parametrize("resumed", [0, 1, 4, 7, 19])
def test_a_resumed_schedule_depends_only_on_the_step(resumed):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5.0)
    job = Job(load_config("test"), optimization=Optimization(lr=1e-3))
    engine = SimpleNamespace(job=job, optimizer=SimpleNamespace(optim=optimizer))
    scheduler = build_scheduler(engine, resumed, warmup_steps=4, total_steps=20)
    rates = []
    for _ in range(resumed, 20):
        rates.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [rates[-1]]
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * cosine_with_warmup(step, 4, 20) for step in range(resumed, 20)])
