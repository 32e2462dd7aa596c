"""Restarts by run_on_hosts.py: the decision, the program's arguments, and real runs that go on by themselves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launching import ROOT, Run, free_port
from programs import main_program, program
from runtime.process import HUNG, INTERRUPTED, NO_ROOM, RUN_FAILED, USAGE_ERROR
from scripts.launcher import restarts
from scripts.launcher.attempt import Fleet, Runner
from scripts.launcher.hosts import HUNG_HERE, RUN, Host
from scripts.launcher.restarts import Restarts, last_step, value_of

RUN_ON_HOSTS = [sys.executable, ROOT / "scripts" / "run_on_hosts.py"]
LOST, KILLED = 255, 128 + signal.SIGKILL
FIRST, SECOND = "127.0.0.1", "127.0.0.2"  # hosts


def launch(folder: Path, program: Path, *flags, options: tuple = ()) -> Run:
    """Start a program on two ranks of this machine, with checkpoints and logs in `folder`."""
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 2, "--master_port", free_port(), "--max_restarts", 4, *options]
    return Run(
        [*command, program, *flags, "-o", folder / "checkpoint", "-t", folder / "tb_logs"],
        folder,
        {"PYTHONPATH": str(ROOT)},
    )


def log_step(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(f'{json.dumps({"step": step})}\n{{"step": 99')  # the last row is incomplete


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("-o a", "a"),
        ("-oa", "a"),
        ("-o=a", "a"),
        ("--save_dir a -o b", "b"),
        ("-p o --save_dir=a=b", "a=b"),
        ("-x", None),
        ("", None),
    ],
)
def test_values_of_flags(flags, value):
    assert value_of(flags.split(), "-o", "--save_dir") == value


def test_the_last_step(tmp_path):
    assert last_step(tmp_path) is None
    log_step(tmp_path, 7)
    assert last_step(tmp_path) == 7


class TestArguments:
    """Of the attempts after the first."""

    @pytest.mark.parametrize(
        ("load", "before", "after"),
        [
            ([], ["-f", "latest"], ["-f", "latest"]),
            (["-f", "latest"], [], []),
            (
                ["-f", "other/epoch0-step2"],
                [],
                ["-f", "latest"],
            ),  # `latest` would begin a new run before the first save
        ],
    )
    def test_before_and_after_the_first_checkpoint(self, tmp_path, load, before, after):
        program = ["-o", str(tmp_path), *load]
        run = Restarts(5, program, Fleet())
        assert run.arguments() == program
        run.restarted = 1
        assert run.arguments() == program + before
        (tmp_path / "epoch0-step4").mkdir()
        (tmp_path / "epoch0-step4" / "manifest.json").touch()
        assert run.arguments() == program + after

    def test_folders_that_the_shell_does_not_expand(self, monkeypatch, tmp_path):
        """The launcher and the program find the same folders in `--flag=~/x`."""
        monkeypatch.setenv("HOME", str(tmp_path))
        flags = ["--save_dir=~/saved", "--tensorboard_dir=~/logs", "--run_name", "first", "-f", "base/epoch0-step2"]
        run = Restarts(5, flags, Fleet())
        (tmp_path / "saved" / "epoch0-step4").mkdir(parents=True)
        (tmp_path / "saved" / "epoch0-step4" / "manifest.json").touch()
        run.restarted = 1
        assert run.arguments() == [*flags, "-f", "latest"]
        assert run.logs == tmp_path / "logs" / "first"

    @pytest.mark.parametrize("interval", ["-i 0", "--save_interval=0"])
    def test_a_run_that_saves_at_its_end_alone(self, interval):
        expected = "note: --save_interval 0 saves only at the end, so a restart repeats every step"
        assert Restarts(1, f"-o x {interval}".split(), Fleet()).note() == expected
        assert Restarts(0, f"-o x {interval}".split(), Fleet()).note() is None
        assert Restarts(1, f"-o x {interval} -i 5".split(), Fleet()).note() is None

    @pytest.mark.parametrize("flags", ["-c 7b", "-f epoch0-step2"])
    def test_a_run_without_a_folder_is_refused(self, flags):
        expected = "--max_restarts: give the program --save_dir or -f latest, so that a restart finds its checkpoints"
        assert Restarts(1, flags.split(), Fleet()).problem() == expected
        assert Restarts(0, flags.split(), Fleet()).problem() is None

    @pytest.mark.parametrize("flags", ["-c 7b -o folder", "-f latest"])
    def test_a_run_with_a_folder(self, flags):
        assert Restarts(1, flags.split(), Fleet()).problem() is None


@pytest.mark.parametrize(
    ("statuses", "status", "failed"),
    [
        ((HUNG, HUNG), HUNG, {}),
        ((HUNG, HUNG_HERE), HUNG, {SECOND: 1}),
        ((HUNG_HERE, HUNG), HUNG, {FIRST: 1}),
        ((HUNG, KILLED), KILLED, {SECOND: 1}),
        ((RUN_FAILED, KILLED), KILLED, {SECOND: 1}),
        ((0, 0), 0, {}),
    ],
)
def test_the_host_that_is_to_blame(statuses, status, failed):
    """A stopped rank that its neighbours have ended counts for its host, like one that the launcher has killed."""
    runner = Runner(Fleet())
    runner.hosts = [Host(name) for name in (FIRST, SECOND)]
    for host, ended in zip(runner.hosts, statuses, strict=True):
        host.process = subprocess.Popen(["sh", "-c", f"exit {ended}"], stdin=subprocess.PIPE)
        host.threads = []
    with pytest.raises(SystemExit) as end:
        runner.recv_from_all()
    assert (end.value.code, runner.fleet.failures) == (status, failed)


class TestDecisions:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(restarts, "FIRST_PAUSE_SECONDS", 0)
        return Restarts(9, ["-o", str(tmp_path), "-t", str(tmp_path)], Fleet())

    @pytest.mark.parametrize("status", [0, USAGE_ERROR, INTERRUPTED])
    def test_ends_that_a_restart_cannot_help(self, run, status):
        assert not run.again(status)

    def test_wrong_input_of_a_restart_is_a_failure(self, run):
        """The flags were right before; what they name has changed, such as a disk that is not mounted."""
        assert [run.again(status) for status in (RUN_FAILED, USAGE_ERROR, USAGE_ERROR)] == [True, True, False]

    def test_a_full_disk_is_waited_for(self, run):
        assert [run.again(NO_ROOM) for _ in range(10)] == [True] * 9 + [False]

    @pytest.mark.parametrize("status", [RUN_FAILED, HUNG, LOST, KILLED])
    def test_failures(self, run, status):
        assert run.again(status)

    def test_a_signal_to_the_launcher_ends_it(self, run):
        run.fleet.word = "stop"
        assert not run.again(KILLED)

    def test_gives_up_after_three_failures_at_a_step(self, run, tmp_path, capsys):
        for step, again in ((3, True), (3, True), (4, True), (4, True), (4, False)):
            log_step(tmp_path, step)
            assert run.again(RUN_FAILED) == again
        line = "giving up: the run has failed 3 times after step 4, so the fault is in data or code; see above"
        assert capsys.readouterr().err.splitlines()[-1] == f"run_on_hosts.py: {line}"

    def test_a_host_that_is_gone_is_not_the_fault_of_the_program(self, run):
        run.fleet.unreachable = True
        assert [run.again(LOST) for _ in range(10)] == [True] * 9 + [False]

    def test_the_pause_grows_until_the_run_trains_on(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(restarts.time, "sleep", lambda seconds: pytest.fail("waited"))
        run = Restarts(99, ["-o", str(tmp_path), "-t", str(tmp_path)], Fleet())
        monkeypatch.setattr(restarts.time, "monotonic", iter(range(0, 10**9, 10**6)).__next__)
        run.fleet.unreachable = True
        pauses = []
        for step in [5] * 8 + [6]:
            log_step(tmp_path, step)
            assert run.again(LOST)
            pauses.append(run.pause)
        assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 5]


def test_a_killed_and_a_stopped_rank(sample_flags, sample_dataset, tmp_path):
    """The run goes on from its checkpoints to its end, and logs every step once."""
    flags = [*sample_flags, "-p", "zero2", "-x", "bf16", "-b", 2, "--max_steps", 40, "-i", 2, "--hang_timeout", 4]

    def ranks() -> list[psutil.Process]:
        return [process for process in run.processes() if process.environ().get("RANK") == "1"]

    def disturb(attempt: int, action: Callable[[psutil.Process], None]) -> None:
        run.wait_until(lambda: run.stdout.count("length: ") == attempt, f"attempt {attempt}")
        before = len(run.metrics)
        run.wait_until(lambda: len(run.metrics) >= before + 4 and ranks(), "its fourth step")
        action(ranks()[0])
        run.wait_until(lambda: f"restart {attempt} of 4" in run.stderr, f"restart {attempt}")

    with launch(tmp_path, ROOT / "pretrain.py", *flags) as run:
        disturb(1, psutil.Process.kill)
        disturb(2, psutil.Process.suspend)
        assert run.wait() == 0, run.output()
    assert run.column("step") == list(range(1, 41))
    assert run.stdout.count("resumed: ") == 2
    assert "run_on_hosts.py: 127.0.0.1: was killed by SIGKILL" in run.stderr
    assert "no progress for 4 s: no answer from rank 1 on " in run.stderr
    assert f"run_on_hosts.py: 127.0.0.1: ended with status {HUNG}, after a rank there did not answer" in run.stderr


def test_a_fault_of_the_program(tmp_path):
    """It fails at the same step three times; the status is the program's."""
    (tmp_path / "train.py").write_text(main_program("raise RunError('loss nan at step 8')"), encoding="utf-8")
    log_step(tmp_path / "tb_logs", 7)
    with launch(tmp_path, tmp_path / "train.py", "-i", 0) as run:
        assert run.wait() == RUN_FAILED, run.output()
    assert run.stderr.count("ended with status 1: train.py: loss nan at step 8") == 3
    assert "giving up: the run has failed 3 times after step 7" in run.stderr.splitlines()[-1]
    assert "run_on_hosts.py: note: --save_interval 0 saves only at the end" in run.stderr.splitlines()[0]


def test_a_host_without_its_launcher(tmp_path):
    """It kills what an earlier attempt has left, and ends its ranks when it hears nothing."""
    left = subprocess.Popen(["sleep", "600"], env={**os.environ, RUN: "this run"})
    (tmp_path / "train.py").write_text(main_program("import time; time.sleep(600)"), encoding="utf-8")
    serve = "from scripts.launcher import ranks; ranks.SILENCE_SECONDS = 15; raise SystemExit(ranks.Ranks().run())"
    command = ["torchrun", "--nproc_per_node=1", f"--master_port={free_port()}", str(tmp_path / "train.py")]
    order = {"folder": str(tmp_path), "environment": {}, "command": command, "run": "this run", "restarted": True}
    host = subprocess.Popen(**program(serve), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        host.stdin.write(json.dumps(order) + "\n")
        host.stdin.flush()  # it stays open
        assert host.wait(120) == LOST
        assert left.wait(10) == -signal.SIGKILL
        assert "no word from the launcher for 15 s, so the ranks here had to end" in host.stderr.read()
    finally:
        for process in (host, left):
            process.kill()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--max_restarts nan", "Invalid value for '--max_restarts': 'nan' is not a valid integer."),
        ("--max_restarts 1.5", "Invalid value for '--max_restarts': '1.5' is not a valid integer."),
        ("--max_restarts", "Invalid value for '--max_restarts': 'train.py' is not a valid integer."),
        ("--max_restart 2", "No such option '--max_restart'"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, options, problem):
    with Run([*RUN_ON_HOSTS, *options.split(), "train.py", "-o", "x"], tmp_path) as run:
        assert run.wait() == USAGE_ERROR
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"run_on_hosts.py: error: {problem}")
    assert "--max_restarts" in line  # the suggestion for a wrong name
    assert run.stdout == ""


def test_options_after_the_program_are_its_own(tmp_path):
    (tmp_path / "train.py").write_text("import sys; print(*sys.argv[1:])")
    flags = "-m 9 --nproc_per_node 7 other.py --max_restart 1"
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, "--master_port", free_port(), tmp_path / "train.py"]
    with Run([*command, *flags.split()], tmp_path) as run:
        assert run.wait() == 0, run.output()
    assert run.stdout == f"{flags}\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max_restarts", -1], "--max_restarts: must be at least 0, not -1"),
        (["--spare_hosts", -2], "--spare_hosts: must be at least 0, not -2"),
        (["--spare_hosts", 2], "--spare_hosts: takes effect only with --hostfile; give that too, or leave it out"),
        (
            ["--hostfile", "hosts.txt", "--spare_hosts", 2],
            "--spare_hosts: 2 of the 2 hosts in 'hosts.txt' leave none",
        ),
        (
            ["--hostfile", "hosts.txt", "--spare_hosts", 1, "--num_nodes", 1],
            "--spare_hosts: the last hosts of the file cannot be spared with --num_nodes; leave one out",
        ),
    ],
)
def test_spare_hosts_that_cannot_be(tmp_path, options, problem):
    (tmp_path / "hosts.txt").write_text("a\nb\n")
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, "--max_restarts", 1, *options, "train.py", "-o", "x"]
    with Run(command, tmp_path, cwd=tmp_path) as run:
        assert run.wait() == USAGE_ERROR
    assert run.stderr == f"run_on_hosts.py: error: {problem}\n"
