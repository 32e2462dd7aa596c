"""Meetings of ranks: launchers' variables, wrappers, starts by hand, and ranks that end, stop or never start."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from launching import Run, free_port
from runtime import ranks
from runtime.process import RUN_FAILED, USAGE_ERROR

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
LAUNCHED = ("RANK", *ranks.REQUIRED)
VARIABLES = {*LAUNCHED, *ranks.SEVERAL, *ranks.NOT_FIRST, "GROUP_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}

# A program of two ranks. Its arguments: what local rank 0 does while the other waits, a name, and settings of `ranks`.
PROGRAM = """
    import os, signal, sys, threading, time
    sys.path.insert(0, {root!r})
    from runtime import console, process
    console.quiet_third_parties()
    from runtime import ranks

    def work():
        assert sys.stdin.readline() == "go\\n"
        exec(sys.argv[1])
        return {{"run": sys.argv[2], "list": ["x" * 100 + str(n) for n in range(200000)]}}

    def main():
        if problems := ranks.launch_problems():
            raise console.InputError(*problems)
        exec(sys.argv[3])
        ranks.meeting()
        ranks.BEAT_SECONDS = 0.2
        answer = ranks.once_per_node(work)
        second = ranks.once_per_node(lambda: "second")
        sys.stdout.write(f"{{answer['run']}} {{len(answer['list'])}} {{second}}\\n")  # whole, as ranks may share it
        sys.stdout.flush()
        ranks.assemble()
        if "TORCHELASTIC_RUN_ID" not in os.environ and "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
            return 0  # torch's own keys of an earlier attempt are in the test's store
        import torch
        torch.distributed.init_process_group("gloo")
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        sys.stdout.write(f"sum {{total.item()}}\\n")
        sys.stdout.flush()
        return 0

    process.run(main, "program.py")
"""


@pytest.fixture
def environment(monkeypatch):
    """Return a function that replaces all variables of a launcher."""

    def environment(variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    environment({})
    return environment


class TestLaunchProblems:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({}, None),
            ({"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None}, None),
            (
                {"RANK": None, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None},
                "WORLD_SIZE is 2, but RANK is not set;",
            ),
            (
                {"RANK": None, "WORLD_SIZE": None, "LOCAL_WORLD_SIZE": None},
                "LOCAL_RANK is 1, but RANK is not set;",
            ),
            ({"WORLD_SIZE": None, "MASTER_ADDR": None}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR; start"),
            ({"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR; start"),
            ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; start"),
            ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2; start"),
            ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is not below LOCAL_WORLD_SIZE 2; start"),
            ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": None}, "LOCAL_RANK 2 is not below WORLD_SIZE 2; start"),
            ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK 1 is not below LOCAL_WORLD_SIZE 0; start"),
            ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE 4 is above WORLD_SIZE 2; start"),
            ({"GROUP_RANK": "1"}, "GROUP_RANK 1 is not below GROUP_WORLD_SIZE 1; start"),
            ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http' is not a number from 1 to 65535; give"),
            ({"MASTER_PORT": "65536"}, "MASTER_PORT: '65536' is not a number from 1 to 65535; give"),
            ({"MASTER_PORT": "0"}, "MASTER_PORT: '0' is not a number from 1 to 65535; give"),
            ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR: 'no-such-host.invalid' is not the name or address"),
            ({"MASTER_ADDR": "ä" * 70}, "MASTER_ADDR: 'ää"),
        ],
    )
    def test_torchruns_variables(self, environment, changes, problem):
        environment({name: value for name, value in (TORCHRUN | changes).items() if value is not None})
        problems = ranks.launch_problems()
        assert problems == [] if problem is None else (len(problems) == 1 and problems[0].startswith(problem)), problems

    @pytest.mark.parametrize(
        ("variables", "problem"),
        [
            (
                {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
                "SLURM_PROCID is 1, but RANK is not set",
            ),
            ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, but RANK is not set"),
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # in a batch script, before srun
            ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is 2, but RANK"),
            ({"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ],
    )
    def test_other_launchers(self, environment, variables, problem):
        environment(variables)
        assert "".join(ranks.launch_problems())[: len(problem or "")] == (problem or "")
        assert bool(ranks.launch_problems()) == bool(problem)

    def test_port_in_use(self, environment):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = str(other.getsockname()[1])
            environment(TORCHRUN | {"RANK": "0", "MASTER_PORT": port})
            assert ranks.launch_problems() == [
                f"MASTER_PORT: port {port} of this machine cannot be used (another program uses it); "
                "give a free port, or unset RANK"
            ]
            environment(TORCHRUN | {"MASTER_PORT": port})  # the port is another rank's
            assert ranks.launch_problems() == []
            environment(TORCHRUN | {"RANK": "0", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
            assert ranks.launch_problems() == []

    @settings(max_examples=300, deadline=None)
    @given(
        given=st.fixed_dictionaries(
            {},
            optional={
                name: st.sampled_from(["0", "1", "2", "3", "8"])
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
            }
            | {
                "MASTER_ADDR": st.sampled_from(["127.0.0.1", "::1", ""]),
                "MASTER_PORT": st.sampled_from(["0", "29", "x"]),
            },
        )
    )
    def test_accepts_exactly_ranks_and_single_processes(self, given):
        """Compare with the variables' definitions in torchrun's documentation."""
        before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
        os.environ.update(given, TORCHELASTIC_USE_AGENT_STORE="True")
        try:
            problems = ranks.launch_problems()
        finally:
            for name in VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(before)
        number = {name: int(value) for name, value in given.items() if value.isdecimal()}
        if "RANK" not in number:
            largest_index = max(number.get("LOCAL_RANK", 0), number.get("GROUP_RANK", 0))
            right = largest_index == 0 and max(number.get("WORLD_SIZE", 1), number.get("LOCAL_WORLD_SIZE", 1)) < 2
        else:
            size = number.get("WORLD_SIZE", 0)
            here = number.get("LOCAL_WORLD_SIZE", size)
            right = (
                {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= given.keys()
                and given["MASTER_ADDR"] != ""
                and given["MASTER_PORT"] == "29"
                and number["RANK"] < size
                and number["LOCAL_RANK"] < here <= size
                and number.get("GROUP_RANK", 0) < number.get("GROUP_WORLD_SIZE", size)
            )
        assert (problems == []) == right, problems
        assert "\n" not in "".join(problems)


LATE = """
    import sys, time
    sys.path.insert(0, {root!r})
    from runtime import console, process
    console.quiet_third_parties()
    from runtime import ranks

    def main():
        if console.rank():
            time.sleep(5)  # rank 0 is done by then
        print(ranks.once_per_node(lambda: "answer"), flush=True)
        return 0

    process.run(main, "program.py")
"""


class Started:
    """Ranks of a program in real processes."""

    def __init__(
        self, folder, port, statement="pass", name="run", program=PROGRAM, settings="pass", numbers=(0, 1), **changes
    ):
        folder.mkdir(exist_ok=True)
        path = folder / "program.py"
        path.write_text(textwrap.dedent(program).format(root=str(ROOT)))
        pipe = subprocess.PIPE
        self.processes = []
        for number in numbers:
            variables = TORCHRUN | {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": str(port)} | changes
            environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
            command = [sys.executable, path, statement, name, settings]
            self.processes.append(
                subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def go(self):
        self.processes[0].stdin.write("go\n")
        self.processes[0].stdin.flush()

    def wait_for_waiting(self):
        """Return the line in which rank 1 says that it waits for rank 0's work."""
        return next(line for line in self.processes[1].stderr if "not started yet" not in line)

    def ends(self):
        """Return each rank's exit status and its remaining output."""
        outputs = [process.communicate(timeout=120) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs, strict=True)]


class TestStartByHand:
    def test_two_runs_at_once_from_one_shell(self, tmp_path):
        """Neither reads the other's answer. Both ranks of a third run, on the first's port, are refused."""
        ports = free_port(), free_port()
        with Started(tmp_path / "a", ports[0], name="a") as a, Started(tmp_path / "b", ports[1], name="b") as b:
            line = a.wait_for_waiting()
            host = socket.gethostname()
            assert line == f"rank 1 on {host} waits for rank 0 on {host}, at 127.0.0.1:{ports[0]}\n"
            with Started(tmp_path / "c", ports[0], name="c") as c:
                refusals = [(status, error) for status, _, error in c.ends()]
            b.go()
            a.go()
            for run, name in ((a, "a"), (b, "b")):
                for status, output, error in run.ends():
                    assert (status, output) == (0, f"{name} 200000 second\nsum 2.0\n"), error
        assert [status for status, _ in refusals] == [2, 2]
        assert (
            f"MASTER_PORT: port {ports[0]} of this machine cannot be used (another program uses it)" in refusals[0][1]
        )
        assert f"is rank 1 at 127.0.0.1:{ports[0]} already; give each run a port of its own" in refusals[1][1]
        assert [len(error.splitlines()) for _, error in refusals] == [1, 1]

    @pytest.mark.parametrize(
        ("statement", "statuses", "last"),
        [
            ("os.kill(os.getpid(), signal.SIGKILL)", [-9, 1], "rank 0 at 127.0.0.1:{port} has ended"),
            ("raise console.InputError('--dataset: is damaged')", [2, 2], None),
            ("raise ValueError('why')", [1, 1], "rank 0 "),
        ],
    )
    def test_rank_0_ends_while_another_waits(self, tmp_path, statement, statuses, last):
        port = free_port()
        with Started(tmp_path, port, statement) as run:
            run.wait_for_waiting()
            run.go()
            (first, _, error), (second, _, waiting) = run.ends()
        assert [first, second] == statuses
        if last is None:
            assert (error, waiting) == ("program.py: error: --dataset: is damaged\n", "")
        else:
            assert waiting.startswith(f"program.py: on {socket.gethostname()}: {last.format(port=port)}")
            assert len(waiting.splitlines()) == 1

    def test_rank_0_does_not_end_before_a_late_rank_has_come(self, tmp_path):
        """As in a dry run of several ranks, which needs no process group; under torchrun and by hand."""
        port = free_port()
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        with (
            Started(tmp_path / "torchrun", port, program=LATE, TORCHELASTIC_USE_AGENT_STORE="True") as first,
            Started(tmp_path / "hand", free_port(), program=LATE) as second,
        ):
            ends = [*first.ends(), *second.ends()]
        del store
        assert [(status, output) for status, output, _ in ends] == [(0, "answer\n")] * 4, ends

    def test_answers_of_an_earlier_attempt_are_not_read(self, tmp_path):
        """torchrun restarts ranks with the same store and counts the restarts; here the test keeps the store."""
        port = free_port()
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        for count, name in enumerate(("old", "new")):
            attempt = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(count)}
            with Started(tmp_path, port, name=name, **attempt) as run:
                run.wait_for_waiting()
                run.go()
                for status, output, error in run.ends():
                    assert (status, output) == (0, f"{name} 200000 second\n"), error
        assert store.num_keys() > 0

    def test_a_rank_that_is_stopped(self, tmp_path):
        """A signal that stops rank 0, or a machine that hangs, breaks no connection of the others."""
        port = free_port()
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        stop, settings = "os.kill(os.getpid(), signal.SIGSTOP)", "ranks.GONE_SECONDS = 2"
        with Started(tmp_path, port, stop, settings=settings, TORCHELASTIC_USE_AGENT_STORE="True") as run:
            run.wait_for_waiting()
            run.go()
            error = run.processes[1].stderr.read()
            assert run.processes[1].wait() == RUN_FAILED
        assert store.num_keys() > 0
        host = socket.gethostname()
        assert error == (
            f"program.py: on {host}: rank 0 on {host} has shown no sign of life for 2 s, with other ranks waiting; "
            "it has ended or is stopped: see its own message\n"
        )

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_rank_that_is_never_started(self, tmp_path, number):
        port = free_port()
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        settings = "ranks.JOIN_SECONDS = 1"
        launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "run"}
        with Started(tmp_path, port, settings=settings, numbers=[number], **launcher) as run:
            run.go()
            ((status, _, error),) = run.ends()
        assert store.num_keys() > 0
        host = socket.gethostname()
        missing = "rank 1" if number == 0 else f"the rank of LOCAL_RANK 0 on {host}"
        waiting, refusal = error.splitlines()
        assert status == USAGE_ERROR
        assert waiting == f"rank {number} on {host} waits for {missing}, not started yet, at 127.0.0.1:{port}"
        assert refusal.endswith(
            f"WORLD_SIZE: {missing} has not come to 127.0.0.1:{port} within 1 s; start all 2 ranks, or lower WORLD_SIZE"
        )

    def test_rank_0_is_never_started_by_hand(self, tmp_path):
        port = free_port()
        with Started(tmp_path, port, settings="ranks.JOIN_SECONDS = 1", numbers=[1]) as run:
            ((status, _, error),) = run.ends()
        assert status == USAGE_ERROR
        assert error.endswith(
            f"MASTER_ADDR, MASTER_PORT: rank 1 cannot reach 127.0.0.1:{port} (Connection refused); "
            "start rank 0 there, and check that no firewall blocks the port\n"
        )

    def test_no_store(self, tmp_path):
        port = free_port()
        settings = "ranks.LAUNCHER_SECONDS = 1"
        with Started(tmp_path, port, settings=settings, TORCHELASTIC_USE_AGENT_STORE="True") as run:
            ends = run.ends()
        for number, (status, output, error) in enumerate(ends):
            assert (status, output) == (2, "")
            host = f"on {socket.gethostname()}: " if number else ""
            assert error == (
                f"program.py: error: {host}MASTER_ADDR, MASTER_PORT: rank {number} cannot reach 127.0.0.1:{port} "
                "(Connection refused); torchrun, which keeps the store of its ranks there, is gone; "
                "start it again, or unset RANK\n"
            )


def test_a_wrapper_for_each_rank(tmp_path):
    """Each rank's parent is a wrapper's shell, as with timeout, numactl or a profiler."""
    (tmp_path / "wrap.sh").write_text('#!/bin/sh\necho go | "$@"\nexit $?\n')
    (tmp_path / "wrap.sh").chmod(0o755)
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM).format(root=str(ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--no-python"]
    program = [tmp_path / "wrap.sh", sys.executable, tmp_path / "program.py", "pass", "run", "pass"]
    with Run([*launcher, *program], tmp_path) as run:
        assert run.wait(120) == 0, run.output()
    assert sorted(run.stdout.splitlines()) == ["run 200000 second"] * 2 + ["sum 2.0"] * 2
