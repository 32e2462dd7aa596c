"""Runs that stop making progress: the ranks that hang are named, and all end with status 70."""

import os
import re
import socket

import pytest

from launching import ForkedRun
from runtime.process import HUNG, USAGE_ERROR

HOST = socket.gethostname()
# Some ranks do something when they enter a phase of a step.
CHANGE = """
from runtime import watchdog
marked = watchdog.mark
def mark(phase, step=None):
    marked(phase, step)
    if os.environ["RANK"] in "{ranks}" and phase == "{phase}" and watchdog._position.step in {steps}:
        {action}
watchdog.mark = training.loop.mark = training.batches.mark = mark
"""
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
SLEEP = "import time; time.sleep(600)"
SLOW = "[(__import__('time').sleep(0.5), watchdog.alive()) for _ in range(12)]"


@pytest.fixture(scope="module")
def hang(start):
    """Function that runs two ranks, of which some do `action` in a phase, and returns the run after its end."""

    def hang(ranks: str, phase: str, action: str = STOP, seconds: int = 3, steps: tuple = (3,), **options) -> ForkedRun:
        flags = ["-p", "zero2", "-x", "bf16", "-b", 4, "--max_steps", 5, "-i", 3, "--hang_timeout", seconds]
        if phase == "evaluate":
            flags += ["--eval_fraction", "0.1", "--eval_interval", 3]
        change = CHANGE.format(ranks=ranks, phase=phase, action=action, steps=steps)
        with start(*flags, processes=2, change=change, **options) as run:
            run.wait()
            return run

    return hang


def finding(run: ForkedRun) -> str:
    """Return what the line says about the ranks; exactly one rank prints it."""
    lines = re.findall(r"^changed_pretrain\.py: no progress for \d+ s: (.*)$", run.stderr, re.MULTILINE)
    assert len(lines) == 1, run.output()
    found, folder = re.fullmatch(r"(.*); each rank's stacks are in (\S+); resume with -f latest", lines[0]).groups()
    assert os.path.dirname(folder) == str(run.folder / "tb_logs")
    for path in run.folder.glob("tb_logs/hang-*/*"):
        state = path.read_text()
        assert re.match(rf"rank \d on {HOST}, process \d+: \w+ of step \d, for \d+ s\n", state)
        assert "in train\n" in state  # the main thread's stack
    return found


@pytest.mark.parametrize(
    ("phase", "others"),
    [
        ("data", "data"),
        ("forward", "backward"),
        ("backward", "backward"),
        ("reduce", "reduce"),
        ("update", "update"),
        ("save", "save"),
        ("evaluate", "evaluate"),
    ],
)
def test_a_stopped_rank_is_named(hang, phase, others):
    run = hang("1", phase)
    assert run.returncode == HUNG, run.output()
    assert finding(run) == f"no answer from rank 1 on {HOST}, stopped or cut off; the others wait in {others} of step 3"
    assert [path.name for path in run.folder.glob("tb_logs/hang-*/*")] == ["rank00000.txt"]


@pytest.mark.parametrize("torchrun", [True, False])
def test_rank_0_is_stopped(hang, torchrun):
    """torchrun keeps the ranks' store, and repeats the line; without it the store stops together with rank 0."""
    run = hang("0", "update", torchrun=torchrun)
    if torchrun:
        cause = run.stderr[run.stderr.index("Root Cause") :]
        line = f"no progress for 3 s: no answer from rank 0 on {HOST}, stopped or cut off; the others wait in update"
        assert f"exitcode  : {HUNG} " in cause
        assert f"traceback : changed_pretrain.py: {line} of step 3" in cause
    else:
        assert finding(run).startswith("no answer from rank 0 at 127.0.0.1:")


def test_a_rank_is_behind(hang):
    run = hang("1", "data", SLEEP)
    assert finding(run) == f"behind in data of step 3: rank 1 on {HOST}; the others wait in data of step 3"
    assert len(list(run.folder.glob("tb_logs/hang-*/*"))) == 2


def test_no_rank_is_behind(hang):
    run = hang("01", "forward", SLEEP)
    assert finding(run) == "all ranks are in forward of step 3, none behind; the network or a GPU may hang"


def test_a_slow_rank_is_no_hang(hang):
    """It shows progress within the limit, but the others wait for it longer; nor does it count as a slow step."""
    run = hang("1", "save", SLOW)
    assert run.returncode == 0, run.output()


def test_a_limit_below_the_time_of_a_phase_is_refused(hang):
    """Not as a hang, since the first step takes as long."""
    run = hang("01", "update", "import time; time.sleep(2.5)", seconds=1, steps=(1, 2))
    assert run.returncode == USAGE_ERROR, run.output()
    assert "--hang_timeout: 1 s is shorter than the phase 'update' of a step, which took 2." in run.stderr
    assert run.column("step") == [1, 2]
