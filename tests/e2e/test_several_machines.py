"""Training, and failures, on two hosts that each have their own address, name, home and ssh server."""

import contextlib
import os
import signal
import sys

import psutil
import pytest
from transformers import AutoModelForCausalLM

from launching import ROOT
from machines import INTERFACE, NAMES, machines  # noqa: F401
from runtime.process import HUNG, INTERRUPTED

RUN_ON_HOSTS = [sys.executable, ROOT / "scripts" / "run_on_hosts.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 1, "--nnodes", 2]
GLOO = {"GLOO_SOCKET_IFNAME": INTERFACE}
ODD = {"BASH_FUNC_greet%%": "() { echo hello\n}", "OMP_ODD": "späce 'and' \"$HOME\" `id` \\", "SECRET": "hunter2"}


@pytest.fixture
def cluster(machines, sample, tmp_path):  # noqa: F811
    """Return the two hosts as a cluster; each host keeps the default cache in its own home."""
    return Cluster(machines, sample, tmp_path)


class Cluster:
    def __init__(self, hosts, sample, folder):
        self.hosts, self.folder = hosts, folder
        self.first, self.second = hosts
        self.hostfile = folder / "hosts.txt"
        self.hostfile.write_text("".join(f"{name}\n" for name in NAMES))
        self.tokenizer = sample / "tokenizer"
        data = ["-c", "test", "-d", sample / "data", "--tokenizer", self.tokenizer, "-l", 64, "-b", 2, "-s", 2]
        self.flags = [*data, "-p", "zero2", "-x", "bf16", "-o", folder / "checkpoint", "-t", folder / "tb_logs"]

    def launch(self, *flags, hostfile=None, options=(), **environment):
        """Start run_on_hosts.py on the first host."""
        hosts = ["--hostfile", hostfile or self.hostfile, *options]
        command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, *hosts, "pretrain.py"]
        return self.first.run(*command, *self.flags, *flags, folder=self.folder, **GLOO, **environment)

    def launcher(self) -> psutil.Process:
        return self.first.processes(str(RUN_ON_HOSTS[1]), "--hostfile")[0]

    def all_gone(self) -> bool:
        return not any(host.processes("pretrain.py") or host.processes("--serve") for host in self.hosts)


def torchrun(cluster, *flags):
    """Start torchrun on each host, as users do by hand or through a scheduler."""
    rendezvous = ["--master_addr", NAMES[0], "--master_port", 29501]
    for number, host in enumerate(cluster.hosts):
        command = [*TORCHRUN, "--node_rank", number, *rendezvous, "pretrain.py", *cluster.flags, *flags]
        yield host.run(*command, folder=cluster.folder / host.name, **GLOO)


def test_training_and_resuming(cluster):
    """Start through ssh and resume under torchrun. Each host has its own home, hence its own cache."""
    with cluster.launch("--max_steps", 3, **ODD) as run:
        assert run.wait() == 0, run.output()
    assert "plugin: zero2, 2 data-parallel" in run.stdout
    assert run.stdout.count("plugin:") == 1
    assert "[node2]" not in run.stdout + run.stderr  # only rank 0 prints
    for host in cluster.hosts:
        assert (host.home / ".cache" / "llama-training").is_dir()

    with contextlib.ExitStack() as stack:
        resumed = [
            stack.enter_context(run) for run in torchrun(cluster, "--max_steps", 6, "-f", "latest", "--allow_changes")
        ]
        assert [run.wait() for run in resumed] == [0, 0], [run.output() for run in resumed]
    assert run.column("step") == [1, 2, 3, 4, 5, 6]
    AutoModelForCausalLM.from_pretrained(cluster.folder / "checkpoint" / "final")


def test_environment_of_the_hosts(cluster):
    """Hosts get the variables that concern training, whatever their values, no others, and none on a command line."""
    program = cluster.folder / "show.py"
    program.write_text("import os, sys; print(sys.argv[1:], {k: os.environ.get(k) for k in ('OMP_ODD', 'SECRET')})")
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, "--hostfile", cluster.hostfile, program]
    arguments = ["-m", "1000", "two words", "", "$HOME 'ä'"]
    with cluster.first.run(*command, *arguments, folder=cluster.folder, OMP_NUM_THREADS="1", **ODD) as run:
        assert run.wait() == 0, run.output()
    there = next(line for line in run.stdout.splitlines() if line.startswith("[node2] "))
    assert there == f"[node2] {arguments} { ({'OMP_ODD': ODD['OMP_ODD'], 'SECRET': None}) }"
    assert "hunter2" not in run.stderr


def test_hosts_that_cannot_be_used(cluster):
    """Each host's problem is reported before anything starts."""
    hostfile = cluster.folder / "more.txt"
    hostfile.write_text("node1\nnode2\nno-such-name\n10.77.0.9\n")
    wrong_key = cluster.folder / "wrong"
    cluster.first.call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", wrong_key)
    ssh = f"ssh -i {wrong_key} -o IdentitiesOnly=yes"
    with cluster.launch(hostfile=hostfile, LAUNCH_SSH=ssh) as run:
        assert run.wait() == 2
    lines = run.stderr.splitlines()
    assert len(lines) == 4, run.stderr
    assert "error: node2: root@node2: Permission denied" in lines[0]
    assert "error: no-such-name: ssh: Could not resolve hostname no-such-name" in lines[1]
    assert "error: 10.77.0.9: ssh: connect to host 10.77.0.9 port 22: No route to host" in lines[2]
    assert "nothing was started" in lines[3]
    with cluster.launch(hostfile=cluster.folder / "missing.txt") as run:
        assert run.wait() == 2


def test_killed_rank(cluster):
    """The other host stops too, one line names the host, no process remains, and the run resumes."""
    with cluster.launch("-e", 1000, "-i", 2) as run:
        run.wait_until(lambda: len(run.metrics) >= 4, "the fourth step")
        cluster.second.processes("pretrain.py", "-c")[0].kill()
        assert run.wait() == 128 + signal.SIGKILL
    assert "run_on_hosts.py: node2: was killed by SIGKILL" in run.stderr
    assert "[node2] run_on_hosts.py: rank 1 was killed by SIGKILL" in run.stderr
    assert cluster.all_gone()
    with cluster.launch("-e", 1000, "-f", "latest") as run:
        run.wait_until(lambda: "resumed:" in run.stdout, "the resumed run")
        run.wait_until(lambda: run.column("step")[-1] >= 6, "its steps")
        cluster.launcher().terminate()
        assert run.wait() == INTERRUPTED, run.output()
    assert f"run_on_hosts.py: node2: ended with status {INTERRUPTED}" in run.stderr
    assert cluster.all_gone()
    last = run.column("step")[-1]
    assert list((cluster.folder / "checkpoint").glob(f"epoch*-step{last}/manifest.json"))


RESTARTING = ("--max_restarts", 6)
QUICK = {"LAUNCH_SSH": "ssh -o ServerAliveInterval=1 -o ServerAliveCountMax=3"}  # to notice a host that is gone


class Disturbed:
    """A run that is disturbed and goes on by itself."""

    def __init__(self, run, cluster):
        self.run, self.cluster = run, cluster
        self.restarts, self.started = 0, 1  # attempts after the first; attempts that train

    def rank(self) -> psutil.Process:
        """Wait for two more steps of the latest attempt, and return its rank on the second host."""
        self.run.wait_until(lambda: self.run.stdout.count("global batch:") == self.started, "the attempt")
        trained = len(self.run.metrics)
        self.run.wait_until(lambda: len(self.run.metrics) >= trained + 2, "its second step")
        return self.cluster.second.processes("pretrain.py", "-c")[0]  # then come its loaders

    def wait_for_restarts(self, number=1) -> None:
        """Wait for restarts of which only the last trains."""
        self.restarts, self.started = self.restarts + number, self.started + 1
        self.run.wait_until(lambda: f"restart {self.restarts} of" in self.run.stderr, f"restart {self.restarts}")


def test_a_run_goes_on_by_itself(cluster):
    """A rank is killed, one is stopped, an ssh server hangs, a host's network is cut and comes back."""
    steps, link = 200, ("ip", "link", "set", INTERFACE)
    flags = ["--max_steps", steps, "-i", 2, "--hang_timeout", 5, "--keep_checkpoints", 3]
    with cluster.launch(*flags, options=RESTARTING, **QUICK) as run:
        disturbed = Disturbed(run, cluster)
        disturbed.rank().kill()
        disturbed.wait_for_restarts()
        assert "run_on_hosts.py: node2: was killed by SIGKILL" in run.stderr

        disturbed.rank().suspend()
        disturbed.wait_for_restarts()
        assert "pretrain.py: no progress for 5 s: no answer from rank 1 on node2, stopped or cut off" in run.stderr
        assert f"run_on_hosts.py: node1: ended with status {HUNG}" in run.stderr
        assert "run_on_hosts.py: node2: was killed by SIGKILL, told to end" in run.stderr

        rank = disturbed.rank()
        os.kill(cluster.second.init, signal.SIGSTOP)  # its ssh server
        rank.kill()
        disturbed.wait_for_restarts(2)
        os.kill(cluster.second.init, signal.SIGCONT)
        assert "run_on_hosts.py: error: node2: " in run.stderr

        disturbed.rank()
        cluster.second.call(*link, "down")
        disturbed.wait_for_restarts(2)
        assert "run_on_hosts.py: node2: the connection was lost" in run.stderr
        assert "run_on_hosts.py: error: node2: ssh: connect to host node2 port 22: " in run.stderr
        cluster.second.call(*link, "up")
        assert run.wait() == 0, run.output()
    assert run.column("step") == list(range(1, steps + 1))
    assert cluster.all_gone()


def test_a_spare_host_takes_the_place_of_one_that_fails_twice(cluster):
    hostfile = cluster.folder / "spare.txt"
    hostfile.write_text("node2\nnode1\n")
    flags, options = ["--max_steps", 40, "-i", 2], [*RESTARTING, "--spare_hosts", 1]
    with cluster.launch(*flags, hostfile=hostfile, options=options) as run:
        disturbed = Disturbed(run, cluster)
        for _ in range(2):
            disturbed.rank().kill()
            disturbed.wait_for_restarts()
        assert run.wait() == 0, run.output()
    assert "run_on_hosts.py: node1 takes the place of node2, which has failed 2 times" in run.stderr
    assert run.column("step") == list(range(1, 41))


def test_killed_rank_under_torchrun(cluster):
    """Nothing connects the two hosts except their ranks."""
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(run) for run in torchrun(cluster, "-e", 1000)]
        runs[0].wait_until(lambda: "step 1/" in runs[0].stdout, "the first step")
        cluster.second.processes("pretrain.py", "-c")[1].kill()  # [0] is torchrun
        assert [run.wait() for run in runs] == [1, 1], [run.output() for run in runs]
    assert "pretrain.py: rank 0 lost the connection to node2 (10.77.0.2): a rank there has ended" in runs[0].stderr


def test_killed_launcher(cluster):
    """The hosts notice, and the run saves and ends on both."""
    with cluster.launch("-e", 1000) as run:
        run.wait_until(lambda: len(run.metrics) >= 2, "the second step")
        cluster.launcher().kill()
        run.wait_until(cluster.all_gone, "the end of the ranks")
    last = run.column("step")[-1]
    assert list((cluster.folder / "checkpoint").glob(f"epoch*-step{last}/manifest.json"))


def test_problem_of_one_host(cluster):
    """Only node2 lacks the tokenizer and reports it; the other host soon stops waiting."""
    mount = ["mount", "-t", "tmpfs", "none", cluster.tokenizer]
    cluster.second.call(*mount)
    try:
        with cluster.launch("--max_steps", 1) as run:
            assert run.wait() == 2, run.output()
    finally:
        cluster.second.call("umount", cluster.tokenizer)
    assert f"[node2] pretrain.py: error: on node2: --tokenizer: {cluster.tokenizer}" in run.stderr
    assert "run_on_hosts.py: node1: was killed by SIGTERM, told to end" in run.stderr
    assert cluster.all_gone()


def test_doctor(cluster):
    """The doctor reports that one path is a different folder on each host."""
    shared = cluster.folder / "shared"
    shared.mkdir()
    cluster.second.call("mount", "-t", "tmpfs", "none", shared)
    command = [*RUN_ON_HOSTS, "--nproc_per_node", 1, "--hostfile", cluster.hostfile, "scripts/doctor.py", "-o", shared]
    with cluster.first.run(*command, folder=cluster.folder, **GLOO) as run:
        assert run.wait() == 1, run.output()
    for check in ("packages", "all-reduce", "clocks"):
        assert f"ok      {check} " in run.stdout
    assert f"FAILED  shared folder  {shared}: node1, node2 did not see the others' files" in run.stdout
    assert run.stdout.count("FAILED  ") == 1


def test_plain_colossalai_run(cluster):
    """ColossalAI's own launcher works too; it needs torchrun in PATH and the key in the default place."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["colossalai", "run", "--nproc_per_node", 1, "--hostfile", cluster.hostfile, "pretrain.py"]
    environment = {"PATH": path, **GLOO}
    with cluster.first.run(*command, *cluster.flags, "--max_steps", 2, folder=cluster.folder, **environment) as run:
        assert run.wait() == 0, run.output()
    assert run.column("step") == [1, 2]
