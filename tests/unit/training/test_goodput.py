"""Goodput from given times."""

import json
import time

import pytest

from runs import run_from
from training.goodput import SAVES, STALLS, STEPS, StepSeconds, describe, first_start, goodput, spend
from training.run import TrainState


@pytest.mark.parametrize(
    ("steps", "counted"),
    [
        ([(30.0, 0.0)], 0.0),  # it may have compiled
        ([(30.0, 0.0), (2.0, 0.0), (2.0, 0.0)], 6.0),  # compilation does not count
        ([(1.0, 0.0), (2.0, 0.0)], 3.0),
        ([(2.0, 0.5)] * 4, 6.0),  # nor does waiting for data
        ([(2.0, 0.0)] * 5 + [(3.9, 0.0)], 13.9),
        ([(2.0, 0.0)] * 5 + [(400.0, 0.0), (2.0, 0.0)], 14.0),  # nor does a stall, beyond a usual step
        ([(2.0, 0.0)] * 60 + [(9.0, 0.0)] * 60, 120 + 25 * 2 + 35 * 9.0),  # slower steps become usual
    ],
)
def test_seconds_that_count(steps, counted):
    state, seconds = TrainState(), StepSeconds()
    for total, waited in steps:
        seconds.add(state, total, waited)
    assert state.spent[STEPS] == pytest.approx(counted)
    assert sum(state.spent.values()) == pytest.approx(sum(total for total, _ in steps))


def test_the_rest_is_named(monkeypatch):
    state = TrainState(started=1000.0)
    monkeypatch.setattr(time, "time", lambda: 1000.0 + 7200)
    assert goodput(state) == 0
    for purpose, amount in ((STEPS, 5400.0), (SAVES, 60.0), (SAVES, 12.0), (STALLS, 720.0)):
        spend(state, purpose, amount)
    assert goodput(state) == 0.75
    assert describe(state) == (
        "goodput: 75.0% of 2.000 hours since the first start; 1.0% saves, 0.0% evaluations, 10.0% data and stalls, "
        "14.0% starts and lost steps"
    )


@pytest.mark.parametrize(
    ("flags", "content", "kept"),
    [
        (["-f", "latest"], json.dumps({"save_dir": "../checkpoint", "started": 123.0}), True),
        ([], json.dumps({"save_dir": "../checkpoint", "started": 123.0}), False),  # another run in the same folder
        (["-f", "latest"], json.dumps({"save_dir": "../checkpoint"}), False),  # of an older version
        (["-f", "latest"], "{", False),
        (["-f", "latest"], None, False),
    ],
)
def test_a_run_that_never_saved_started_when_its_logs_say(tmp_path, flags, content, kept):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert (first_start(run_from("-t", str(tmp_path), *flags).outputs) == 123.0) == kept
