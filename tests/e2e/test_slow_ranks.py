"""Runs in which one rank is slower than the others, each in real processes: the rank is named."""

import re
import socket

import pytest

# Rank 1 sleeps in every step, far longer than a step takes: while it computes, or while it reads.
SLOW = """
import time
import training.step_times
training.step_times.STEPS = 8
{name} = {owner}.{attribute}
def slow(*args):
    if console.rank() == 1:
        time.sleep(0.4)
    return {name}(*args)
{owner}.{attribute} = slow
"""
COMPUTING = SLOW.format(name="compute", owner="training.loop", attribute="forward_backward")
READING = SLOW.format(name="read", owner="training.batches.Batches", attribute="_read")
LINE = re.compile(
    r"slow: rank (\d+) on (\S+) needs ([\d.]+) s a step for its own work, (\d+)% more than the median, "
    r"([\d.]+) s of it for data; the others wait \(last \d+ steps\)"
)


@pytest.mark.parametrize(
    ("ranks", "flags", "change", "slow"),
    [
        (3, "-p zero2 -b 1", COMPUTING, {1}),
        (2, "-p zero2 -b 1 --accumulation_steps 2", READING, {1}),
        (2, "-p gemini -b 1", COMPUTING, {1}),
        (4, "-p hybrid_parallel --tp 2 --pp 1 -b 1", COMPUTING, {0, 1}),  # two ranks that share their layers
    ],
    ids=["zero2", "reading", "gemini", "tensor"],
)
def test_a_slow_rank_is_named(pretrain, ranks, flags, change, slow):
    flags = [*flags.split(), "-x", "bf16", "--max_steps", 18, "--log_interval", 4]
    run = pretrain(*flags, change=change, processes=ranks)
    found = [LINE.fullmatch(line).groups() for line in run.stdout.splitlines() if line.startswith("slow:")]
    assert found, run.stdout
    for number, host, _, _, data in found:
        assert int(number) in slow
        assert host == socket.gethostname()
        assert (float(data) > 0.39) == (change == READING)
    rows = [row for row in run.metrics if "slowest_rank" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert {row["slowest_rank"] for row in rows} <= slow
    assert all(row["rank_spread"] > 0.1 for row in rows)
    assert all(0 < row["waiting"] < 1 for row in rows)


def test_equal_ranks_are_not_named(pretrain):
    """One rank exchanges nothing."""
    run = pretrain("-p", "zero2", "-x", "bf16", "-b", 1, "--max_steps", 6, "--log_interval", 2)
    assert "slow:" not in run.stdout
    assert not any("slowest_rank" in row for row in run.metrics)
