"""The learning rate of each schedule, against torch's own schedulers where it has them."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from engine.job import Job, Optimization
from model_utils import load_config
from training.schedule import SCHEDULES, Curve, build_scheduler


def test_warm_up_is_linear_and_ends_at_the_peak():
    for name in SCHEDULES:
        curve = Curve(4, 100, lr_schedule=name, decay_steps=10 if name == "wsd" else None)
        assert [curve(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def torchs(make, steps: int) -> list[float]:
    """Return the factors of one of torch's schedulers, up to and including `steps`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.0])
@pytest.mark.parametrize("warmup", [0, 4])
def test_falls_as_torchs_schedulers_do(warmup, ratio):
    total, rest = 100, 100 - warmup
    expected = {
        "cosine": torchs(lambda optimizer: theirs.CosineAnnealingLR(optimizer, rest, ratio), rest),
        "linear": torchs(lambda optimizer: theirs.LinearLR(optimizer, 1, ratio, rest), rest),
        "constant": [1.0] * (rest + 1),
        "wsd": [1.0] * (rest - 20) + torchs(lambda optimizer: theirs.LinearLR(optimizer, 1, ratio, 20), 20),
    }
    for name, values in expected.items():
        curve = Curve(warmup, total, ratio, name, 20 if name == "wsd" else None)
        assert [curve(step) for step in range(warmup, total + 1)] == pytest.approx(values)
        assert curve(1000) == pytest.approx(values[-1])


def test_the_end_of_wsd_may_fall_as_one_minus_a_square_root():
    curve = Curve(0, 100, 0.2, "wsd", 20, "1-sqrt")
    assert [curve(step) for step in (0, 79, 80)] == [1, 1, 1]
    assert curve(85) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.25)))
    assert curve(100) == pytest.approx(0.2)


def test_no_warm_up_and_only_warm_up():
    assert Curve(0, 10)(0) == 1.0
    assert [Curve(10, 10)(step) for step in (0, 9)] == [0.1, 1.0]
    assert Curve(0, 0)(0) > 0


@pytest.mark.parametrize(
    ("own", "other", "steps", "expected"),
    [
        (Curve(4, 200, lr_schedule="constant"), Curve(4, 100, lr_schedule="constant"), 100, True),
        (Curve(4, 200, 0.1, "wsd", 20), Curve(4, 100, 0.1, "wsd", 10), 91, True),
        (Curve(4, 200, 0.1, "wsd", 20), Curve(4, 100, 0.1, "wsd", 10), 92, False),  # it has begun to fall
        (Curve(4, 100, 0.1, "wsd", 10), Curve(4, 100, lr_schedule="constant"), 50, True),
        (Curve(5, 200, 0.1, "wsd", 20), Curve(4, 100, 0.1, "wsd", 10), 50, False),
        (Curve(4, 200), Curve(4, 100), 2, False),  # a cosine is made for its length
    ],
)
def test_a_run_may_be_made_longer_while_the_past_is_the_same(own, other, steps, expected):
    assert own.agrees(other, steps) == expected


def stage(step, schedule, lr=None, ratio=None):
    return {"step": step, "lr_schedule": schedule, "lr": lr, "min_lr_ratio": ratio}


class TestParts:
    """Stages with a schedule of their own, in a run of 100 steps with a peak of 1e-3."""

    @pytest.mark.parametrize("base", ["cosine", "linear", "constant"])
    @pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
    def test_a_part_falls_from_where_the_schedule_is(self, base, shape):
        plain = Curve(4, 100, lr_schedule=base)
        curve = plain.with_parts([stage(60, shape, ratio=0.02)], 1e-3)
        assert [curve(step) for step in range(61)] == [plain(step) for step in range(61)]
        fall = plain(60) - 0.02
        expected = {
            "linear": torchs(lambda optimizer: theirs.LinearLR(optimizer, 1, 1e-9, 40), 40),
            "cosine": torchs(lambda optimizer: theirs.CosineAnnealingLR(optimizer, 40), 40),
            "1-sqrt": [1 - math.sqrt(step / 40) for step in range(41)],
        }
        assert [curve(step) for step in range(60, 101)] == pytest.approx([0.02 + fall * e for e in expected[shape]])

    def test_parts_follow_one_another_and_stages_without_one_go_on(self):
        """As DeepSeek-V3 was trained (arXiv:2412.19437, section 4.2): a cosine, constant, constant at another rate."""
        stages = [stage(10, None), stage(20, "cosine", ratio=0.1), stage(30, None), stage(60, "constant")]
        curve = Curve(0, 100, lr_schedule="constant").with_parts([*stages, stage(80, "constant", lr=3e-5)], 1e-3)
        assert [curve(step) for step in (0, 10, 20)] == [1, 1, 1]
        assert curve(40) == pytest.approx(0.55)  # half of the way from 20 to 60
        assert [curve(step) for step in (60, 79)] == pytest.approx([0.1, 0.1])
        assert [curve(step) for step in (80, 100)] == pytest.approx([0.03, 0.03])

    def test_a_checkpoint_keeps_no_parts(self):
        curve = Curve(0, 100, lr_schedule="constant").with_parts([stage(20, "linear", ratio=0.0)], 1e-3)
        assert Curve(**curve.settings) == Curve(0, 100, lr_schedule="constant")

    @pytest.mark.parametrize(("steps", "expected"), [(81, True), (82, False)])
    def test_a_run_may_be_made_longer_before_its_part(self, steps, expected):
        own, other = (Curve(0, total, lr_schedule="constant") for total in (200, 100))
        later, earlier = stage(160, "linear", ratio=0.0), stage(80, "linear", ratio=0.0)
        assert own.with_parts([later], 1).agrees(other.with_parts([earlier], 1), steps) == expected


@pytest.mark.parametrize("resumed", [0, 1, 4, 7, 19])
def test_a_resumed_schedule_depends_only_on_the_step(resumed):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5.0)
    job = Job(load_config("test"), optimization=Optimization(lr=1e-3))
    engine = SimpleNamespace(job=job, optimizer=SimpleNamespace(optim=optimizer))
    scheduler = build_scheduler(engine, resumed, Curve(4, 20))
    rates = []
    for _ in range(resumed, 20):
        rates.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [rates[-1]]
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * Curve(4, 20)(step) for step in range(resumed, 20)])
