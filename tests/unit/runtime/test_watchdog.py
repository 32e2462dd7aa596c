"""The line about a hang: the ranks that do not answer, those behind, and the phase in which the others wait."""

import threading
from types import SimpleNamespace as Namespace

import pytest

from runtime import watchdog
from runtime.watchdog import Position, Watchdog, _finding


@pytest.mark.parametrize(
    ("silent", "marks", "expected"),
    [
        ([1], {0: 9, 2: 9, 3: 9}, "no answer from rank 1 on a, stopped or cut off; the others wait in p9 of step 3"),
        ([2, 3], {0: 9, 1: 9}, "no answer from ranks 2, 3 on b, stopped or cut off; the others wait in p9 of step 3"),
        ([], {0: 9, 1: 7, 2: 7, 3: 9}, "behind in p7 of step 3: rank 1 on a and rank 2 on b; the others wait in p9"),
        (
            [3],
            {0: 9, 1: 8, 2: 7},
            "no answer from rank 3 on b, stopped or cut off; behind in p7 of step 3: rank 2 on b",
        ),
        ([], {0: 9, 1: 9, 2: 9, 3: 9}, "all ranks are in p9 of step 3, none behind; the network or a GPU may hang"),
    ],
)
def test_ranks_are_named_with_their_hosts(monkeypatch, silent, marks, expected):
    """Ranks 0 and 1 are on host a, 2 and 3 on b."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    positions = {number: Position(3, f"p{count}", count) for number, count in marks.items()}
    assert _finding(silent, positions, lambda number: "aabb"[number]).startswith(expected)


def test_one_rank_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _finding([], {0: Position(3, "data", 9)}, lambda number: "a") == "in data of step 3"


def test_no_limit_starts_no_thread(tmp_path):
    before = threading.active_count()
    watched = Watchdog(0, tmp_path)
    for step in range(1, 5):
        watched.begin(step)
    assert threading.active_count() == before


def test_a_stage_whose_steps_take_longer_is_given_time(monkeypatch, tmp_path):
    """Its first step may compile; then its own phases count. The threads are started once."""
    started = []
    monkeypatch.setattr(threading, "Thread", lambda **options: Namespace(start=lambda: started.append(1)))
    for given, limits in ((None, [3600, 3600, 6000, 3000]), (400, [4800, 4800, 600, 400])):
        started.clear()
        watched, found = Watchdog(given, tmp_path), []
        for step, longest in enumerate((1, 50, 60, 2000, 1000, 300), start=1):
            if step == 4:
                watched.restart()
                found.append(watched.limit)
            watched.begin(step)
            monkeypatch.setattr(watchdog, "_longest", ("forward", longest if given is None else longest / 10))
            found.append(watched.limit)
        assert len(started) == 2
        assert found == [given or 300] * 3 + limits


@pytest.mark.parametrize(("longest", "limit"), [(10, 300), (200, 600)])
def test_the_default_limit_allows_for_long_phases(monkeypatch, tmp_path, capsys, longest, limit):
    """As with a pipeline, whose forward and backward passes are one phase, and a step of minutes."""
    monkeypatch.setattr(threading, "Thread", lambda **options: Namespace(start=lambda: None))
    watched = Watchdog(None, tmp_path)
    for step in (1, 2, 3):
        watched.begin(step)
        monkeypatch.setattr(watchdog, "_longest", ("forward", longest))
    watched.begin(4)
    assert watched.limit == limit
    line = "--hang_timeout: 600 s, 3 times the longest phase of a step ('forward')\n"
    assert capsys.readouterr().out == (line if limit > 300 else "")
