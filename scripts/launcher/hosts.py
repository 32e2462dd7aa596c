"""Hosts of a run: the hosts file, the connection to each, and what is sent to it."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from runtime.process import HUNG

PROGRAM = Path(__file__).resolve().parents[1] / "run_on_hosts.py"
FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|LANG|LC_ALL|TZ|CC|CXX|(PYTHON|HF_|TRANSFORMERS_|TOKENIZERS_|DATASETS_|TORCH|"
    r"PYTORCH_|TRITON_|NCCL_|GLOO_|CUDA_|NVIDIA_|OMP_|MKL_|KMP_|UCX_|FI_|MAX_JOBS)\w*)",
    re.ASCII,
)
SECRET = re.compile(r"\w*(TOKEN|SECRET|PASSWORD|CREDENTIALS?|KEY)", re.ASCII)
CHECK_SECONDS = 30  # for a host to answer the checks before the start
HUNG_HERE = 71  # internal status of a host whose ranks ended with HUNG since one of them did not answer
CONNECTION_LOST = 255  # exit status of ssh
EXIT_BARRIER = re.compile(rb"(E\d{4} .*?\] )Error waiting on exit barrier")  # a log record's time and place, and text
RUN = "LAUNCH_RUN"  # variable that names a run, with all its attempts, in every process that it starts on a host
SERVE = "--serve"  # internal flag of run_on_hosts.py: run a host's ranks
# ssh uses the first value given for an option, so LAUNCH_SSH's own options win over these. A dead host is detected
# after a minute.
SSH_OPTIONS = "-T -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=accept-new"
SSH_OPTIONS += " -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def say(message: str) -> None:
    print(f"run_on_hosts.py: {message}", file=sys.stderr, flush=True)


def how_it_ended(status: int) -> str:
    """Describe an exit status; negative ones, and those above 128 as a shell reports them, are signals."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with status {status}"


def forwarded(environment: Mapping[str, str], also: Sequence[str]) -> dict[str, str]:
    """Return the variables to send to the hosts: those that concern training, without secrets, and those in `also`."""
    return {
        name: value
        for name, value in environment.items()
        if name in also or (FORWARDED.fullmatch(name) and not SECRET.fullmatch(name))
    }


def read_hostfile(path: Path) -> list[str]:
    """Return the hosts in a file, NAME or USER@NAME, one per line; # begins a comment.

    Raises:
        ValueError: the file is unusable; the message is one line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not a text file") from error
    hosts = [host for line in lines if (host := line.partition("#")[0].strip())]
    if not hosts:
        raise ValueError(f"'{path}' names no host; write one host name per line into it")
    for host in hosts:
        if not re.fullmatch(r"(?!-)([^\s,@]+@)?[^\s,@]+", host):
            raise ValueError(f"'{path}' has the line '{host}', which is not one host name")
        if re.fullmatch(r"[^:]+:\d+", host):
            raise ValueError(f"'{path}' has the line '{host}'; ssh's port is not part of a name: see --help")
    names = [name_of(host).lower() for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"'{path}' names the host '{name}' twice")
    return hosts


def name_of(host: str) -> str:
    """Return a host's name without the user to log in as."""
    return host.rpartition("@")[2]


class Host:
    """One host: how to reach it, the process that runs there, and how that ended. Replaces ColossalAI's HostInfo too.

    ColossalAI's own ends with a traceback if a name does not resolve, even this machine's.
    """

    def __init__(self, hostname: str, port: int | None = None):
        self.login, self.hostname, self.port = hostname, name_of(hostname), port
        self.process: subprocess.Popen | None = None
        self.failed_at: float | None = None
        self.is_local_host = False
        with contextlib.suppress(OSError, UnicodeError):  # only ssh may know the name
            addresses = socket.getaddrinfo(self.hostname, None, type=socket.SOCK_STREAM)
            self.is_local_host = any(self._is_ours(*address) for address in addresses)

    @staticmethod
    def _is_ours(family: int, kind: int, protocol: int, _: str, address: Any) -> bool:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
        return False

    def command(self, *remote: str) -> list[str]:
        """Return the command line that runs `remote` on this host."""
        if self.is_local_host:
            return list(remote)
        port = ["-p", str(self.port)] if self.port else []
        ssh = [*shlex.split(os.environ.get("LAUNCH_SSH", "ssh")), *port, *SSH_OPTIONS.split()]
        return [*ssh, self.login, "exec " + shlex.join(remote)]

    def problem(self, folder: str) -> str | None:
        """Return the reason why a run cannot start on this host, or None."""
        if self.login.startswith("-"):  # ssh would read it as an option
            return "is not the name of a host"
        needed = f"cd {shlex.quote(folder)} 2>/dev/null || {{ echo has no folder {shlex.quote(folder)}; exit 1; }}\n"
        for file in (sys.executable, str(PROGRAM)):
            needed += f"[ -r {shlex.quote(file)} ] || {{ echo has no file {shlex.quote(file)}; exit 1; }}\n"
        try:
            answer = subprocess.run(
                self.command("sh", "-c", needed), stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS
            )
        except FileNotFoundError as error:
            return f"there is no {error.filename} on this machine; install OpenSSH's client"
        except subprocess.TimeoutExpired:
            return f"no answer within {CHECK_SECONDS} s"
        words = [line for line in (answer.stdout + answer.stderr).decode(errors="replace").splitlines() if line.strip()]
        if answer.returncode == 0:
            return None
        if answer.stdout.strip():
            return f"{words[0]}; all hosts need the same paths"
        return f"{words[-1] if words else how_it_ended(answer.returncode)}; try: ssh {self.login} true"

    def start(self, order: dict, prefix: str) -> None:
        """Start a host's ranks, and threads that pass on their output, each line after `prefix`."""
        command = self.command(sys.executable, str(PROGRAM), SERVE)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self.tell(json.dumps(order))
        outputs = ((self.process.stdout, sys.stdout.buffer), (self.process.stderr, sys.stderr.buffer))
        self.threads = [threading.Thread(target=_pass_on, args=(*pair, prefix), daemon=True) for pair in outputs]
        for thread in self.threads:
            thread.start()

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def drain(self) -> None:
        for thread in self.threads:
            thread.join(timeout=5)

    def status(self) -> int | None:
        status = self.process.poll()
        if status and self.failed_at is None:
            self.failed_at = time.monotonic()
        return status

    def exit_status(self) -> int:
        status = self.process.returncode
        if status == HUNG_HERE:
            return HUNG
        return status if status >= 0 else 128 - status

    @property
    def hung(self) -> bool:
        """True if the ranks here have ended because of a hang whose cause is elsewhere."""
        return self.process.returncode == HUNG

    @property
    def lost(self) -> bool:
        """True if the connection was lost."""
        return self.process.returncode == CONNECTION_LOST and not self.is_local_host

    def ending(self) -> str:
        if self.lost:
            return "the connection was lost"
        if self.process.returncode == HUNG_HERE:
            return f"{how_it_ended(HUNG)}, after a rank there did not answer"
        return how_it_ended(self.process.returncode)


def _pass_on(source: IO[bytes], target: BinaryIO, prefix: str) -> None:
    """Write each line to `target` after `prefix`, but not torchrun's complaint that another host ended first.

    Once all ranks have ended, the host with torchrun's store may close it while others still wait for its answer.
    """
    read, complaint = True, b""  # time and place, with which each of the complaint's lines begins
    for line in source:
        if found := EXIT_BARRIER.match(line):
            complaint = found[1]
        if complaint and line.startswith(complaint):
            continue
        try:
            if read:
                target.write(prefix.encode() + line)
                target.flush()
        except BrokenPipeError:  # end the run, as any program ends whose reader has gone
            read = False
            os.kill(os.getpid(), signal.SIGTERM)
