"""The life of a rank's process: its exit status, what it reports, and the signals that stop it."""

import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from runtime.console import (
    KEYBOARD_INTERRUPT,
    InputError,
    RunError,
    _raw,
    interrupted,
    local_rank,
    open_standard_streams,
    rank,
    world_size,
)

USAGE_ERROR = 2
RUN_FAILED = 1
READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended
TELL_SECONDS = 3  # for the nodes to hear what rank 0 has said, before it ends and the launcher's store with it
_PARENT = os.getppid()  # as this process begins
# Gloo's messages, whatever the collective operation (gloo/transport/tcp/pair.cc)
_LOST_PEER = re.compile(r"(?:Connection closed by peer|Read error|writev) \[(?:::ffff:)?([^\]]+)\]")
_HEARD = "console/heard"  # by so many ranks has been seen what rank 0 says
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")  # of a launcher
# Nobody answers, or torch is what is missing
_NO_STORE = (InputError, OSError, RuntimeError, ValueError, ImportError)


def run(main: Callable[[], int], program: str) -> NoReturn:
    """Run a program's main() and end the process with its status.

    An InputError becomes one line a problem and exit status 2 on every rank; any other error a traceback. A rank whose
    problem is not rank 0's says so itself, once a node. Where the reader of the output is gone, the end is silent.
    The process ends without the interpreter's finalisation. There, Gloo's threads outlive their process group, ask for
    the interpreter lock and abort it ('terminate called without an active exception', in 1 of 15 runs of two ranks with
    torch 2.13), and multiprocessing would wait for the loader processes, which ignore its SIGTERM.
    """
    open_standard_streams()
    for name in _NUMBERS:
        if not os.environ.get(name, "0").isdecimal():
            print(f"{program}: error: {name}: '{os.environ[name]}' is not a number; unset it", file=sys.stderr)
            sys.exit(USAGE_ERROR)
    end_with_launcher()
    try:
        status = main()
        if status == 0:
            from runtime import ranks

            ranks.part()
    except InputError as error:
        _report(f"{program}: error: ", error.problems)
        status = USAGE_ERROR
    except RunError as error:
        _report(f"{program}: ", [str(error)])
        status = RUN_FAILED
    except KeyboardInterrupt:
        status = KEYBOARD_INTERRUPT
    except Exception as error:
        status = RUN_FAILED
        if interrupted(error):
            status = KEYBOARD_INTERRUPT
        elif isinstance(error, BrokenPipeError) and (_reader_gone(sys.stdout) or _reader_gone(sys.stderr)):
            status = READER_GONE
        elif peer := _LOST_PEER.search(str(error)):
            lost = f"rank {rank()} lost the connection to {_name(peer[1])}: a rank there has ended; see its own message"
            print(f"{program}: {lost}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    if getattr(_raw(sys.stdout), "failed", False):
        status = status or RUN_FAILED
    os._exit(status)


def end_with_launcher() -> None:
    """Has the kernel kill this rank when its torchrun is gone, for nobody would be left to end or collect it."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _PARENT:  # gone before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Has this process of `multiprocessing` end as soon as its parent has, however that ended, whatever it is doing."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(RUN_FAILED)

    threading.Thread(target=wait, daemon=True).start()


def _report(prefix: str, problems: Sequence[str]) -> None:
    """Print problems on rank 0, and on one rank of each node if rank 0 does not say the same.

    The ranks ask in the store that they share. Where they cannot meet there, the first rank of every node prints.
    """
    from runtime import ranks

    several = world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if ranks.launch_problems():  # the ranks cannot meet, and this may be no rank at all
        _print_problems(prefix, problems)
    elif rank() == 0:
        _print_problems(prefix, problems)
        if world_size() > 1:
            with contextlib.suppress(*_NO_STORE):
                store = ranks.board(TELL_SECONDS)
                store.set(_key(problems), "said")
                deadline = time.monotonic() + TELL_SECONDS
                while time.monotonic() < deadline and store.add(_HEARD, 0) < world_size() - 1:
                    time.sleep(0.1)
    elif not _said_by_another(problems, alone=local_rank() > 0 and several):
        _print_problems(f"{prefix}on {socket.gethostname()}: ", problems)


def _print_problems(prefix: str, problems: Sequence[str]) -> None:
    for problem in problems:
        print(prefix + problem, file=sys.stderr, flush=True)


def _said_by_another(problems: Sequence[str], alone: bool) -> bool:
    """Return True if rank 0 says the same, or another rank of this node; `alone` where there is nobody to ask."""
    from runtime import ranks

    try:
        store, deadline = ranks.board(TELL_SECONDS), time.monotonic() + TELL_SECONDS
        while time.monotonic() < deadline:
            if store.check([_key(problems)]):
                store.add(_HEARD, 1)
                return True
            time.sleep(0.1)
        return store.add(f"{_key(problems)}/{socket.gethostname()}", 1) > 1
    except _NO_STORE:
        return alone


def _key(problems: Sequence[str]) -> str:
    return f"console/{hashlib.sha256(repr(list(problems)).encode()).hexdigest()}"


def _name(address: str) -> str:
    """An IP address with its host's name, where it has one."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostbyaddr(address)[0]} ({address})"
    return address


def _reader_gone(stream: TextIO) -> bool:
    """Return True if the other end of the pipe that a stream writes to is closed."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 75  # exit status of a run that a signal ended after its checkpoint was saved (EX_TEMPFAIL)


class StopRequest:
    """Set by any of STOP_SIGNALS on any rank; the ranks agree on it at the next step.

    An interrupt after that ends the process at once. A thread sees to it, since Python's handlers do not run during a
    call into C, such as an exchange with a rank that is gone. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        numbers, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(numbers,), name="signals", daemon=True).start()

    def __call__(self) -> bool:
        return self.received

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def _watch(self, numbers: int) -> None:
        """Reads the number of each signal, which Python writes to a pipe the moment that it comes."""
        stopping = False
        while True:
            number = os.read(numbers, 1)[0]
            if stopping and number == signal.SIGINT:
                os._exit(KEYBOARD_INTERRUPT)
            stopping = stopping or number in STOP_SIGNALS


def follow_rank(worker: int) -> None:
    """Launchers signal a rank's loader processes with it; they are to last until the rank has saved, and no longer."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
