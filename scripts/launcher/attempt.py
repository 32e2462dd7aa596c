"""One attempt of a run, by a replacement of ColossalAI's MultiNodeRunner that reports failures; and the run's hosts."""

import importlib
import math
import os
import shlex
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime.process import HUNG
from scripts.launcher.hosts import CONNECTION_LOST, HUNG_HERE, Host, forwarded, read_hostfile, say
from scripts.launcher.ranks import BEAT, BEAT_SECONDS, END, KILL, KILL_SECONDS, STOP

NOTHING_STARTED = 2
GRACE_SECONDS = 30  # once a host has failed: for the others to end by themselves, with their own message
HUNG_SECONDS = 5  # the same once ranks have ended together because of a hang; those that are left are what hangs
POLL_SECONDS = 0.1
CHECKS_AT_ONCE = 64
FAILURES_OF_A_HOST = 2  # before a spare host takes its place


class Fleet:
    """The hosts of a run over its attempts, and the orders that signals to the launcher give.

    Attributes:
        word: the latest order to the hosts, None without a signal.
        unreachable: True if the last attempt failed since a host could not be reached.
    """

    def __init__(self, spares: int = 0, restarted: bool = False):
        """
        Args:
            spares: number of the hosts file's last hosts to keep.
            restarted: the run is started again after a failure.
        """
        self.restarted = restarted
        self.run = uuid.uuid4().hex
        self.spares = spares
        self.word: str | None = None
        self.unreachable = False
        self.attempts = 0
        self.using: list[str] = []
        self.spare: list[str] = []
        self.failures: Counter[str] = Counter()
        self.moved = False  # another host than the hosts file's first has rank 0

    def fetch(self, hostfile: str, ssh_port: int | None) -> Any:
        """Replace ColossalAI's fetch_hostfile, which reads comments as names, and ignores a file without hosts."""
        if not self.using:
            try:
                self.using = read_hostfile(Path(hostfile))
            except ValueError as error:
                say(f"error: --hostfile: {error}")
                raise SystemExit(NOTHING_STARTED) from error
            if self.spares >= len(self.using):
                say(f"error: --spare_hosts: {self.spares} of the {len(self.using)} hosts in '{hostfile}' leave none")
                raise SystemExit(NOTHING_STARTED)
            split = len(self.using) - self.spares
            self.using, self.spare = self.using[:split], self.using[split:]
        hosts = importlib.import_module("colossalai.cli.launcher.hostinfo").HostInfoList()
        for host in self.using:
            hosts.append(Host(host, ssh_port))
        return hosts

    def settle(self, hosts: list[Host], folder: str) -> None:
        """Put spare hosts in the place of those that cannot be used or have failed too often, in the list itself.

        Raises:
            SystemExit: there are not enough; in the first attempt with NOTHING_STARTED.
        """
        self.attempts += 1
        first, unchecked = hosts[0].login, list(range(len(hosts)))
        for number, host in enumerate(hosts):
            if self.failures[host.login] >= FAILURES_OF_A_HOST and self.spare:
                self._replace(hosts, number, f"has failed {self.failures[host.login]} times")
        tried = len(self.spare)
        while unchecked:
            with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
                problems = list(pool.map(lambda number: hosts[number].problem(folder), unchecked))
            bad = {number: problem for number, problem in zip(unchecked, problems, strict=True) if problem}
            for number, problem in bad.items():
                say(f"error: {hosts[number].hostname}: {problem}")
            if len(bad) > tried:
                self.unreachable = True
                say("nothing was started")
                raise SystemExit(NOTHING_STARTED if self.attempts == 1 else CONNECTION_LOST)
            for number in bad:
                self._replace(hosts, number, "cannot be used")
            tried, unchecked = tried - len(bad), list(bad)
        self.moved = self.moved or hosts[0].login != first

    def _replace(self, hosts: list[Host], number: int, reason: str) -> None:
        """Exchange a host and the first spare one; it may become a spare host itself."""
        old, new = hosts[number], Host(self.spare.pop(0), hosts[number].port)
        say(f"{new.hostname} takes the place of {old.hostname}, which {reason}")
        del self.failures[old.login]
        self.spare.append(old.login)
        self.using[number], hosts[number] = new.login, new

    def listen(self) -> None:
        """Let signals to this process give orders to the hosts."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        self.word = KILL if self.word and number == signal.SIGINT else STOP
        effect = "ending at once" if self.word == KILL else "the run saves a checkpoint and ends"
        say(f"{signal.Signals(number).name}: {effect}")


class Runner:
    """Replacement of ColossalAI's MultiNodeRunner, with the same methods.

    ColossalAI's sends the whole environment, unquoted, on a command line, waits for one host after another, and leaves
    processes running when a host fails or when it is killed itself.
    """

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def connect(self, host_info_list: Any, workdir: str, env: dict[str, str]) -> None:
        self.hosts: list[Host] = host_info_list.hostinfo_list
        self.folder = workdir
        self.environment = forwarded(os.environ, os.environ.get("LAUNCH_ENV", "").split())
        if self.fleet.attempts == 0 and "HF_TOKEN" in os.environ and "HF_TOKEN" not in self.environment:
            say("HF_TOKEN is not sent to the hosts; LAUNCH_ENV=HF_TOKEN sends it")
        self.fleet.settle(self.hosts, workdir)
        if self.fleet.attempts == 1:
            self.fleet.listen()

    def send(self, hostinfo: Host, cmd: str) -> None:
        prefix = "" if hostinfo is self.hosts[0] else f"[{hostinfo.hostname}] "
        command = shlex.split(cmd)
        if self.fleet.moved:
            address = f"--master_addr={self.hosts[0].hostname}"
            command = [address if word.startswith("--master_addr=") else word for word in command]
        order = {"folder": self.folder, "environment": self.environment, "command": command}
        hostinfo.start(order | {"run": self.fleet.run, "restarted": self.fleet.restarted}, prefix)

    def recv_from_all(self) -> None:
        """Wait for all hosts to end, and exit with the run's status."""
        told, ending_at, beat_at = None, math.inf, 0.0
        while None in [host.status() for host in self.hosts]:
            failed_at = min((host.failed_at for host in self.hosts if host.failed_at), default=math.inf)
            hung = any(host.process.returncode in (HUNG, HUNG_HERE) for host in self.hosts)
            late, word = failed_at + (HUNG_SECONDS if hung else GRACE_SECONDS), self.fleet.word
            if time.monotonic() > late and word != KILL:
                word = KILL if hung else END
            if time.monotonic() > late + 2 * KILL_SECONDS:
                for host in self.hosts:  # some neither end nor answer
                    host.process.kill()
            if word != told:
                told = word
                ending_at = min(ending_at, time.monotonic()) if word != self.fleet.word else math.inf
                for host in self.hosts:
                    host.tell(word)
            if time.monotonic() > beat_at + BEAT_SECONDS:
                beat_at = time.monotonic()
                for host in self.hosts:
                    host.tell(BEAT)
            time.sleep(POLL_SECONDS)
        for host in self.hosts:
            host.drain()
        # The likely cause comes first: a host that failed before the others were told to end, and one that was killed
        # or cut off before a program that ended by itself.
        failures = [host for host in self.hosts if host.failed_at]
        failures.sort(key=lambda host: (host.failed_at > ending_at, host.exit_status() <= 128, host.failed_at))
        for host in failures:
            say(f"{host.hostname}: {host.ending()}{', told to end' if host.failed_at > ending_at else ''}")
        self.fleet.unreachable = any(host.lost for host in failures)
        if causes := [host for host in failures if not host.hung]:
            self.fleet.failures[causes[0].login] += 1
        raise SystemExit(failures[0].exit_status() if failures else 0)


def attempts(fleet: Fleet) -> Callable[..., int]:
    """Return a function that makes one attempt with the options of `colossalai run`, and returns its exit status."""
    engine: Any = importlib.import_module("colossalai.cli.launcher.run")
    engine.MultiNodeRunner, engine.HostInfo, engine.fetch_hostfile = lambda: Runner(fleet), Host, fleet.fetch
    command = importlib.import_module("colossalai.cli.launcher").run  # it has the same name as its module

    def attempt(**options: Any) -> int:
        try:
            command.callback(**options)
        except SystemExit as end:
            # ColossalAI's own refusals, such as a missing hosts file, call exit() with None, which a shell sees as
            # success.
            return NOTHING_STARTED if end.code is None else int(end.code)
        return 0

    return attempt
