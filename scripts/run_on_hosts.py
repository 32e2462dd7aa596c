"""Run `colossalai run` with its own connections to the hosts replaced by ones that report failures.

    python scripts/run_on_hosts.py --nproc_per_node 8 --hostfile hosts.txt pretrain.py -c 7b -p zero2 ...

It takes the options of `colossalai run`, and passes the program's flags on unchanged. Before anything starts, it checks
that every host allows a login and has this folder and this Python. It connects with OpenSSH's ssh, using your keys and
~/.ssh/config.

Only environment variables that concern training are sent to the hosts (FORWARDED below), never on a command line.
Tokens, keys and passwords, such as HF_TOKEN, are sent only if LAUNCH_ENV names them.

If a host fails, one line names it and says how, the other hosts stop too, and the exit status is the program's.
SIGTERM, SIGINT, SIGUSR1 and SIGHUP make the run save a checkpoint and end, and so does the death of this launcher. A
second SIGINT ends the run at once.

Exit status: 0; 2 if nothing was started or the program refused its flags; 75 if a signal ended the run after its
checkpoint was saved; 255 if the connection to a host was lost; else that of the first process that failed (128 + the
signal's number if a signal killed it).

Environment:
    LAUNCH_SSH='ssh -p 2222 -i key'   the command that connects (default: ssh)
    LAUNCH_ENV='NAME OTHER'           more variables to send
"""

import contextlib
import importlib
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

import psutil

FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|LANG|LC_ALL|TZ|CC|CXX|(PYTHON|HF_|TRANSFORMERS_|TOKENIZERS_|DATASETS_|TORCH|"
    r"PYTORCH_|TRITON_|NCCL_|GLOO_|CUDA_|NVIDIA_|OMP_|MKL_|KMP_|UCX_|FI_|MAX_JOBS)\w*)",
    re.ASCII,
)
SECRET = re.compile(r"\w*(TOKEN|SECRET|PASSWORD|CREDENTIALS?|KEY)", re.ASCII)
NOTHING_STARTED = 2
CHECK_SECONDS = 30  # for a host to answer the checks before the start
GRACE_SECONDS = 30  # once a host has failed: for the others to end by themselves, with their own message
KILL_SECONDS = 30  # between SIGTERM and SIGKILL to ranks that have to end
SAVE_SECONDS = 1800  # once the launcher is gone: for the ranks to save and end
POLL_SECONDS = 0.1
CHECKS_AT_ONCE = 64
SERVE = "--serve"  # internal flag: run a host's ranks
LIST_HOSTS = "--list_hosts"  # internal flag, for the shell scripts: print the names in a hosts file
STOP, END, KILL = "stop", "end", "kill"  # orders to a host's ranks: save a checkpoint and end; end; end at once
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


# ----------------------------------------------------------------------------------------------------------- the hosts


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
        for file in (sys.executable, str(Path(__file__).resolve())):
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
        command = self.command(sys.executable, str(Path(__file__).resolve()), SERVE)
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
        return status if status >= 0 else 128 - status

    def ending(self) -> str:
        if self.process.returncode == 255 and not self.is_local_host:
            return "the connection was lost"
        return how_it_ended(self.process.returncode)


def _pass_on(source: IO[bytes], target: BinaryIO, prefix: str) -> None:
    read = True
    for line in source:
        try:
            if read:
                target.write(prefix.encode() + line)
                target.flush()
        except BrokenPipeError:  # end the run, as any program ends whose reader has gone
            read = False
            os.kill(os.getpid(), signal.SIGTERM)


class Runner:
    """Replacement of ColossalAI's MultiNodeRunner, with the same methods.

    ColossalAI's sends the whole environment, unquoted, on a command line, waits for one host after another, and leaves
    processes running when a host fails or when it is killed itself.
    """

    def connect(self, host_info_list: Iterable[Host], workdir: str, env: dict[str, str]) -> None:
        self.hosts, self.folder = list(host_info_list), workdir
        self.word: str | None = None  # latest order to the hosts
        self.environment = forwarded(os.environ, os.environ.get("LAUNCH_ENV", "").split())
        if "HF_TOKEN" in os.environ and "HF_TOKEN" not in self.environment:
            say("HF_TOKEN is not sent to the hosts; LAUNCH_ENV=HF_TOKEN sends it")
        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
            problems = list(pool.map(lambda host: host.problem(workdir), self.hosts))
        for host, problem in zip(self.hosts, problems, strict=True):
            if problem:
                say(f"error: {host.hostname}: {problem}")
        if any(problems):
            say("nothing was started")
            raise SystemExit(NOTHING_STARTED)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        self.word = KILL if self.word and number == signal.SIGINT else STOP
        effect = "ending at once" if self.word == KILL else "the run saves a checkpoint and ends"
        say(f"{signal.Signals(number).name}: {effect}")

    def send(self, hostinfo: Host, cmd: str) -> None:
        prefix = "" if hostinfo is self.hosts[0] else f"[{hostinfo.hostname}] "
        order = {"folder": self.folder, "environment": self.environment, "command": shlex.split(cmd)}
        hostinfo.start(order, prefix)

    def recv_from_all(self) -> None:
        """Wait for all hosts to end, and exit with the run's status."""
        told, ending_at = None, math.inf
        while None in [host.status() for host in self.hosts]:
            failed_at = min((host.failed_at for host in self.hosts if host.failed_at), default=math.inf)
            if time.monotonic() > failed_at + GRACE_SECONDS and self.word != KILL:
                self.word = END
            if time.monotonic() > failed_at + GRACE_SECONDS + 2 * KILL_SECONDS:
                for host in self.hosts:  # some neither end nor answer
                    host.process.kill()
            if self.word != told:
                told = self.word
                ending_at = min(ending_at, time.monotonic()) if told == END else math.inf
                for host in self.hosts:
                    host.tell(told)
            time.sleep(POLL_SECONDS)
        for host in self.hosts:
            host.drain()
        # The likely cause comes first: a host that failed before the others were told to end, and one that was killed
        # or cut off before a program that ended by itself.
        failures = [host for host in self.hosts if host.failed_at]
        failures.sort(key=lambda host: (host.failed_at > ending_at, host.exit_status() <= 128, host.failed_at))
        for host in failures:
            say(f"{host.hostname}: {host.ending()}{', told to end' if host.failed_at > ending_at else ''}")
        raise SystemExit(failures[0].exit_status() if failures else 0)


def hosts_of(hostfile: str, ssh_port: int | None) -> Any:
    """Replace ColossalAI's fetch_hostfile, which reads comments as names, and ignores a file without hosts."""
    hosts = importlib.import_module("colossalai.cli.launcher.hostinfo").HostInfoList()
    try:
        for host in read_hostfile(Path(hostfile)):
            hosts.append(Host(host, ssh_port))
    except ValueError as error:
        say(f"error: --hostfile: {error}")
        raise SystemExit(NOTHING_STARTED) from error
    return hosts


def list_hosts(hostfile: str) -> int:
    try:
        print(*map(name_of, read_hostfile(Path(hostfile))), sep="\n")
    except ValueError as error:
        print(error)
        return NOTHING_STARTED
    return 0


def as_one_word(argument: str) -> str:
    """Quote an argument for shlex.split, but keep its end, where ColossalAI looks for `.py`."""
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", argument, flags=re.ASCII) or "''"


def main() -> int:
    arguments = sys.argv[1:]
    script = next((position for position, word in enumerate(arguments) if word.endswith(".py")), None)
    if script is not None:
        # Without `--`, `colossalai run` would take the program's flags that are spelled like its own, such as -m.
        arguments[script:] = ["--", *map(as_one_word, arguments[script:])]
    engine: Any = importlib.import_module("colossalai.cli.launcher.run")
    engine.MultiNodeRunner, engine.HostInfo, engine.fetch_hostfile = Runner, Host, hosts_of
    command_line = importlib.import_module("colossalai.cli.launcher").run  # it has the same name as its module
    try:
        command_line.main(arguments, prog_name="run_on_hosts.py")
    except Exception as error:
        if not str(error).startswith("Hostname "):  # --include or --exclude names an unknown host
            raise
        say(f"error: --hostfile: {error}; --include and --exclude take names that are in it")
        return NOTHING_STARTED
    except SystemExit as end:
        # ColossalAI's own refusals, such as a missing hosts file, call exit() with None, which a shell sees as success.
        return NOTHING_STARTED if end.code is None else int(end.code)
    return 0


# ---------------------------------------------------------------------------------------------------- on each of them


class Ranks:
    """A host's side of the run: torchrun's agent in this process, and its ranks as children.

    The launcher's orders arrive on standard input, which closes when the launcher is gone. Ranks get an empty one.
    """

    def __init__(self) -> None:
        self.words = os.fdopen(os.dup(sys.stdin.fileno()))
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), sys.stdin.fileno())

    def run(self) -> int:
        order = json.loads(self.words.readline())
        os.chdir(order["folder"])
        # Otherwise torch warns about every connection to an address without a name.
        os.environ.update({"TORCH_CPP_LOG_LEVEL": "ERROR", **order["environment"]})
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        # Its lines on each signal that it sends would hide the reason of the failure.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        threading.Thread(target=self._obey, daemon=True).start()
        try:
            options = parse_args(order["command"][1:])
            if options.nproc_per_node != "1":
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a four-line warning
            run(options)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            reasons = failure.message["message"] if isinstance(failure.message, dict) else ""  # see runtime/process.py
            for reason in reasons.splitlines() or [""]:
                say(f"rank {number} {how_it_ended(failure.exitcode)}" + (f": {reason}" if reason else ""))
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + error.sigval
        return 0

    def _obey(self) -> None:
        for word in self.words:
            self._end({STOP: None, END: KILL_SECONDS, KILL: 0}[word.strip()])
        self._end(SAVE_SECONDS)

    def _end(self, seconds: float | None) -> None:
        """Send SIGTERM to the ranks, and SIGKILL after `seconds`; None: never."""
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not ranks:
            os.kill(os.getpid(), signal.SIGTERM)  # the agent still waits for the other hosts
        if seconds is not None:
            timer = threading.Timer(seconds, self._kill)
            timer.daemon = True
            timer.start()

    @staticmethod
    def _kill() -> None:
        for rank in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        time.sleep(5)  # for torchrun's agent to report the ranks
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:2] == [LIST_HOSTS]:
        sys.exit(list_hosts(sys.argv[2]))
    sys.exit(Ranks().run() if sys.argv[1:] == [SERVE] else main())
