"""Hosts of a small cluster on one machine: namespaces with their own address, name, processes, home and ssh server.

Killing the process that holds a host's namespaces ends the host and every process on it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from corpora import wait_until
from launching import ROOT, Run

NAMES = ("node1", "node2")
INTERFACE = "eth0"  # on every host
NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "mount")

# $1: name, $2: folder of the host
BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
mount -t tmpfs none /run
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -e -f /dev/null -o HostKey="$2/host_key" -o AuthorizedKeysFile="$2/authorized_keys" \\
    -o UsePAM=no -o StrictModes=no -o PidFile=none
"""


def obstacle() -> str | None:
    """Return the reason why this machine cannot run such hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: openssh-server, iproute2, util-linux, mount)"
    trial = "mount -t tmpfs none /run && ip link add trial0 type veth peer name trial1"
    answer = subprocess.run([*NAMESPACES, "sh", "-c", trial], capture_output=True, text=True)
    return f"this machine allows no namespaces: {answer.stderr.strip()}" if answer.returncode else None


def _call(*command) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


class Machine:
    """One host. Its root user logs in to the others with the key in its home; other files are shared."""

    def __init__(self, name: str, folder: Path):
        self.name, self.home = name, folder / "home"
        boot = ["sh", "-c", BOOT, "boot", name, folder]
        self.log = folder / "sshd.log"
        with open(self.log, "wb") as log:
            self.holder = subprocess.Popen([*NAMESPACES, *boot], stdout=log, stderr=log)
        wait_until(lambda: psutil.Process(self.holder.pid).children(), "the namespaces")
        self.init = psutil.Process(self.holder.pid).children()[0].pid

    def is_up(self) -> bool:
        assert self.holder.poll() is None, self.log.read_text()
        return "Server listening" in self.log.read_text()

    def command(self, *command, **environment: str) -> list[str]:
        """Return the command line that runs `command` on this host."""
        variables = [f"{name}={value}" for name, value in {"HOME": self.home, **environment}.items()]
        enter = ["nsenter", "-t", str(self.init), "-a", f"--wd={ROOT}", "env", *variables]
        return [*enter, *map(str, command)]

    def run(self, *command, folder: Path, **environment: str) -> Run:
        return Run(self.command(*command, **environment), folder, {"PYTHONUNBUFFERED": "1"})

    def call(self, *command) -> None:
        _call(*self.command(*command))

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the processes of this host whose command lines have all of `words`, the oldest first."""
        namespace, found = os.readlink(f"/proc/{self.init}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                if here and set(words) <= set(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, OSError):
                continue
        return sorted(found, key=psutil.Process.create_time)  # process ids start again at some number

    def shut_down(self) -> None:
        self.holder.kill()
        self.holder.wait()


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Iterator[list[Machine]]:
    if reason := obstacle():
        pytest.skip(reason)
    with two_machines(tmp_path_factory.mktemp("hosts")) as started:
        yield started


@contextlib.contextmanager
def two_machines(root: Path) -> Iterator[list[Machine]]:
    """Yield two hosts, node1 and node2, connected by a virtual cable; their files are in `root`."""
    _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / "key")
    addresses = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(NAMES, start=1))
    users = Path("/etc/passwd").read_text().splitlines()
    started = []
    try:
        for name in NAMES:
            folder = root / name
            (folder / "home" / ".ssh").mkdir(parents=True)
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
            shutil.copy(root / "key.pub", folder / "authorized_keys")
            shutil.copy(root / "key", folder / "home" / ".ssh" / "id_ed25519")
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
            others = [user for user in users if not user.startswith("root:")]
            (folder / "passwd").write_text("\n".join([f"root:*:0:0::{folder / 'home'}:/bin/sh", *others, ""]))
            started.append(Machine(name, folder))
        ends = [f"cable{os.getpid()}{end}"[-15:] for end in "ab"]
        _call("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (machine, end) in enumerate(zip(started, ends, strict=True), start=1):
            _call("ip", "link", "set", end, "netns", machine.init, "name", INTERFACE)
            machine.call("ip", "addr", "add", f"10.77.0.{number}/24", "dev", INTERFACE)
            machine.call("ip", "link", "set", INTERFACE, "up")
        for machine in started:
            wait_until(machine.is_up, f"the ssh server of {machine.name}")
        yield started
    finally:
        for machine in started:
            machine.shut_down()
