"""Launchers on one machine: signals save a checkpoint and set the exit status; hosts files are checked."""

import io
import signal
import socket
import sys
from pathlib import Path

import pytest

from launching import ROOT, Run, free_port
from programs import main_program
from runtime.process import INTERRUPTED
from scripts.launcher import hosts
from scripts.launcher.hosts import Host, read_hostfile

COLOSSALAI_RUN = [Path(sys.executable).parent / "colossalai", "run"]
RUN_ON_HOSTS = [sys.executable, ROOT / "scripts" / "run_on_hosts.py"]


def start(launcher: list, sample_flags: list, folder: Path) -> Run:
    """Start a long run of two ranks."""
    program = ["--nproc_per_node", 2, "--master_port", 29617, ROOT / "pretrain.py", *sample_flags]
    folders = ["-o", folder / "checkpoint", "-t", folder / "tb_logs"]
    flags = ["-p", "zero2", "-x", "bf16", "-b", 1, "-e", 1000]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"  # `colossalai run` calls torchrun by its name
    return Run([*launcher, *program, *flags, *folders], folder, {"PATH": path})


def assert_saved(run: Run) -> None:
    last = run.column("step")[-1]
    assert list(run.save_dir.glob(f"epoch*-step{last}/manifest.json"))
    assert (run.save_dir / "final").is_dir()


@pytest.mark.parametrize(("launcher", "status"), [(COLOSSALAI_RUN, 1), (RUN_ON_HOSTS, INTERRUPTED)])
def test_signal_to_one_rank(sample_flags, sample_dataset, tmp_path, launcher, status):
    with start(launcher, sample_flags, tmp_path) as run:
        run.wait_until(lambda: len(run.metrics) >= 2, "the second step")
        rank = next(process for process in run.processes() if process.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGTERM)
        assert run.wait() == status, run.output()
    assert_saved(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_launcher(sample_flags, sample_dataset, tmp_path, number):
    with start(RUN_ON_HOSTS, sample_flags, tmp_path) as run:
        run.wait_until(lambda: len(run.metrics) >= 2, "the second step")
        run.process.send_signal(number)
        assert run.wait() == INTERRUPTED, run.output()
    assert f"{number.name}: the run saves a checkpoint and ends" in run.stderr
    assert_saved(run)


def test_interrupted_again(sample_flags, sample_dataset, tmp_path):
    """A second Ctrl-C does not wait for the save."""
    with start(RUN_ON_HOSTS, sample_flags, tmp_path) as run:
        run.wait_until(lambda: len(run.metrics) >= 2, "the second step")
        run.process.send_signal(signal.SIGHUP)  # of two pending signals the lower number is delivered first
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 128 + signal.SIGKILL, run.output()
    assert "SIGINT: ending at once" in run.stderr
    assert not list(run.save_dir.glob("epoch*"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.mark.parametrize(
    ("launcher", "wrong"),
    [(launcher, "True") for launcher in (TORCHRUN, COLOSSALAI_RUN, RUN_ON_HOSTS)] + [(TORCHRUN, "console.rank() == 2")],
    ids=["torchrun", "colossalai", "ours", "one rank"],
)
def test_a_mistake_is_what_a_user_sees(tmp_path, launcher, wrong):
    """The launcher's report of four ranks ends with the mistake, not with a remark on how to find it."""
    mistake = "train.py: error: --lr: -1 is bad"
    on_host = mistake if wrong == "True" else mistake.replace("error: ", f"error: on {socket.gethostname()}: ")
    statements = f"import time\nif {wrong}:\n    raise InputError('--lr: -1 is bad')\ntime.sleep(600)"
    (tmp_path / "train.py").write_text(main_program(statements), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    arguments = ["--nproc_per_node", 4, *([] if launcher is TORCHRUN else ["--master_port", free_port()])]
    with Run([*launcher, *arguments, tmp_path / "train.py"], tmp_path, environment) as run:
        assert run.wait() == (2 if launcher is RUN_ON_HOSTS else 1), run.output()
    lines = (run.stderr + run.stdout).splitlines()
    assert lines.count(on_host) == 1
    if launcher is RUN_ON_HOSTS:
        assert len(lines) == 3, run.output()
        assert lines[1].startswith("run_on_hosts.py: rank ")
        assert lines[1].endswith(f" ended with status 2: {mistake}")
        assert lines[2] == "run_on_hosts.py: 127.0.0.1: ended with status 2"
    else:
        cause = lines[lines.index("Root Cause (first observed failure):") :]
        assert f"  traceback : {mistake}" in cause[:8]
        assert "To enable traceback" not in run.stderr + run.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"node1 slots=8\n", "has the line 'node1 slots=8', which is not one host name"),
        (b"node1\xff\n", "is not a text file"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_unusable_hosts_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "hosts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_hostfile(tmp_path / "hosts.txt")


def test_users_and_comments_in_a_hosts_file(tmp_path):
    (tmp_path / "hosts.txt").write_bytes(b"\xef\xbb\xbf# all\r\nme@node1 # first\r\n\r\n  10.0.0.2\nfe80::1:22")
    hosts = [Host(host, 2222) for host in read_hostfile(tmp_path / "hosts.txt")]
    assert [host.hostname for host in hosts] == ["node1", "10.0.0.2", "fe80::1:22"]
    assert hosts[0].command("true")[-2:] == ["me@node1", "exec true"]


def test_a_file_without_hosts_starts_nothing(tmp_path):
    """A hosts file without a host does not mean this machine."""
    (tmp_path / "hosts.txt").write_text("# none yet\n")
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, "--hostfile", tmp_path / "hosts.txt", ROOT / "pretrain.py"]
    with Run(command, tmp_path) as run:
        assert run.wait() == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"run_on_hosts.py: error: --hostfile: '{tmp_path / 'hosts.txt'}' names no host")


def test_torchruns_complaint_at_the_end_is_left_out():
    """Each line of a log record begins with its time and place."""
    place = "E1201 09:25:20.139000 16 torch/distributed/elastic/agent/server/api.py:1008] "
    record = ["Error waiting on exit barrier. Elapsed: 0.005 seconds", "Traceback (most recent call last):", "  raise"]
    own = "my Error waiting on exit barrier"
    lines = [own, *(place + line for line in record), place.replace("20.139", "20.140") + "another", "my last"]
    target = io.BytesIO()
    hosts._pass_on(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), target, "[node2] ")
    assert target.getvalue().decode().splitlines() == [f"[node2] {lines[number]}" for number in (0, 4, 5)]
