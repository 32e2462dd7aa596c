"""Life of a program's process: its start, its exit status, reports of its errors, and the signals that stop it."""

import contextlib
import ctypes
import hashlib
import json
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

from runtime import ranks
from runtime.console import (
    InputError,
    NoRoom,
    RunError,
    local_rank,
    local_world_size,
    open_standard_streams,
    output_failed,
    quiet_third_parties,
    rank,
    world_size,
)

# Exit statuses
RUN_FAILED = 1
USAGE_ERROR = 2  # as argparse's
HUNG = 70  # the run made no progress (EX_SOFTWARE in sysexits.h)
NO_ROOM = 74  # a resume found no room for its next checkpoint (EX_IOERR in sysexits.h)
INTERRUPTED = 75  # a signal ended the run after its checkpoint was saved (EX_TEMPFAIL in sysexits.h)
KEYBOARD_INTERRUPT = 130  # as a shell reports SIGINT
READER_GONE = 141  # as a shell reports SIGPIPE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
REPORT_SECONDS = 3  # time for the other nodes to read rank 0's report before its store ends with it

PARENT = "LLAMA_PARENT"  # variable: id of the process that starts this one, which has to end with it
_PARENT = os.getppid()  # at the start of this process
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
# Messages of Gloo's collective operations (gloo/transport/tcp/pair.cc)
_LOST_PEER = re.compile(r"(?:Connection closed by peer|Read error|writev) \[(?:::ffff:)?([^\]]+)\]")
_NO_STORE = (InputError, OSError, RuntimeError, ValueError, ImportError)  # nobody answers, or torch is not installed
_READ = "report/read"  # counts the ranks that have read rank 0's report
_ending = threading.Event()  # another thread ends this process
_EFFECT_SECONDS = 2  # by which a rank postdates an end that another rank's caused: torchrun compares whole seconds


def prepare() -> None:
    """Quiet the libraries, and end without a traceback on Ctrl-C during their imports. Call before importing them."""
    if parent := os.environ.pop(PARENT, None):
        _end_with(int(parent))
    quiet_third_parties()
    sys.excepthook = end_uncaught


def run(main: Callable[[], int], program: str) -> NoReturn:
    """Run a program's main() and end the process with its exit status.

    An InputError prints one line per problem and ends every rank with status 2; a rank whose problems differ from
    rank 0's prints its own, once per node. Other errors print a traceback. torchrun repeats all of this as the root
    cause. A reader of the output that has gone ends the program without a message.

    The interpreter's finalization is skipped. During it, Gloo's threads outlive their process group, ask for the
    interpreter lock and abort ("terminate called without an active exception", in 1 of 15 runs of two ranks with
    torch 2.13), and multiprocessing waits for the loader processes, which ignore its SIGTERM.
    """
    open_standard_streams()
    for name in _RANK_VARIABLES:
        if not os.environ.get(name, "0").isdecimal():
            print(f"{program}: error: {name}: '{os.environ[name]}' is not a number; unset it", file=sys.stderr)
            sys.exit(USAGE_ERROR)
    end_with_launcher()
    try:
        status = _outcome(main)
        if status == 0:
            ranks.part()
        elif status == INTERRUPTED:
            _tell_launcher(f"{program}: a signal ended the run after its checkpoint was saved")
    except InputError as error:
        _report(f"{program}: error: ", error.problems)
        status = USAGE_ERROR
    except RunError as error:
        _report(f"{program}: ", [str(error)])
        status = NO_ROOM if isinstance(error, NoRoom) else RUN_FAILED
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
            _tell_launcher(f"{program}: {lost}", later=_EFFECT_SECONDS)
            print(f"{program}: {lost}", file=sys.stderr, flush=True)
        else:
            _tell_launcher(f"{type(error).__name__}: {error}", traceback.format_exc())
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    if output_failed():
        status = status or RUN_FAILED
    os._exit(status)


def _outcome(main: Callable[[], int]) -> int:
    try:
        return main()
    except BaseException:
        if _ending.is_set():  # it is only an effect of that
            threading.Event().wait()
        raise


@contextlib.contextmanager
def ending(status: int, reason: str, printing: bool) -> Iterator[None]:
    """End the process with a status and a reason after the block, which another thread than main()'s runs.

    Args:
        printing: print the reason; only one rank should.
    """
    _ending.set()
    message = f"{Path(sys.argv[0]).name}: {reason}"
    _tell_launcher(message, later=-_EFFECT_SECONDS)  # it was the cause of what happens now to other ranks
    if printing:
        print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        os._exit(status)


def interrupted(error: BaseException | None) -> bool:
    """Return True if an error is a Ctrl-C, or caused by one, as in a library that reports a failed import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def end_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace sys.excepthook: end without a message on Ctrl-C, print a traceback otherwise."""
    if interrupted(error):
        os._exit(KEYBOARD_INTERRUPT)
    sys.__excepthook__(kind, error, trace)


def end_with_launcher() -> None:
    """End this rank when its torchrun is gone, since nothing else would end or reap it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(_PARENT)


def _end_with(parent: int) -> None:
    """Ask the kernel to kill this process when the thread of `parent` that started it ends, however that happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """End this `multiprocessing` process as soon as its parent ends, however that happens."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(RUN_FAILED)

    threading.Thread(target=wait, daemon=True).start()


class StopRequest:
    """Set by any of STOP_SIGNALS on any rank; the ranks agree on it at the next step.

    A Ctrl-C after that ends the process at once. A thread does this, because Python's signal handlers do not run during
    a call into C, such as a collective with a rank that is gone. A SIGHUP that is ignored, as under nohup, stays
    ignored.
    """

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def __call__(self) -> bool:
        return self.received

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def _watch(self, reader: int) -> None:
        """Read the number of each signal, which Python writes to a pipe as soon as the signal arrives."""
        stopping = False
        while True:
            number = os.read(reader, 1)[0]
            if stopping and number == signal.SIGINT:
                os._exit(KEYBOARD_INTERRUPT)
            stopping = stopping or number in STOP_SIGNALS


def follow_rank(worker: int) -> None:
    """Keep a loader process alive until its rank ends: launchers signal it too, but the rank still has to save."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------- reports of several ranks


def _report(prefix: str, problems: Sequence[str]) -> None:
    """Print problems on rank 0, and on one rank of each node whose problems differ from rank 0's.

    The ranks compare them in the store of their launch. Without a store, every rank of a single node prints, or local
    rank 0 of each of several nodes.
    """
    _tell_launcher("\n".join(prefix + problem for problem in problems))
    several_nodes = world_size() > local_world_size()
    if ranks.launch_problems():  # there is no store, and this may not be a rank at all
        _print_problems(prefix, problems)
    elif rank() == 0:
        _print_problems(prefix, problems)
        if world_size() > 1:
            with contextlib.suppress(*_NO_STORE):
                store, deadline = ranks.launch_store(REPORT_SECONDS), time.monotonic() + REPORT_SECONDS
                store.set(_key(problems), "printed")
                while time.monotonic() < deadline and store.add(_READ, 0) < world_size() - 1:
                    time.sleep(0.1)
    elif not _printed_by_another(problems, without_store=local_rank() > 0 and several_nodes):
        _print_problems(f"{prefix}on {socket.gethostname()}: ", problems)


def _tell_launcher(reason: str, trace: str = "", later: int = 0) -> None:
    """Write the reason why this rank ends where torchrun looks for it; it prints that of the earliest end last.

    The format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.record_exception.

    Args:
        trace: for torchrun to print instead of the reason.
        later: seconds to add to the time of this end.
    """
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": trace or reason, "timestamp": str(int(time.time()) + later)}
        temporary = Path(f"{name}.tmp")  # torchrun itself fails if it reads a part of the file
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"message": {"message": reason, "extraInfo": details}}), encoding="utf-8")
            temporary.replace(name)


def _print_problems(prefix: str, problems: Sequence[str]) -> None:
    for problem in problems:
        print(prefix + problem, file=sys.stderr, flush=True)


def _printed_by_another(problems: Sequence[str], without_store: bool) -> bool:
    """Return True if rank 0 or another rank of this node prints the same; `without_store` if there is no store."""
    try:
        store, deadline = ranks.launch_store(REPORT_SECONDS), time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline:
            if store.check([_key(problems)]):
                store.add(_READ, 1)
                return True
            time.sleep(0.1)
        return store.add(f"{_key(problems)}/{socket.gethostname()}", 1) > 1
    except _NO_STORE:
        return without_store


def _key(problems: Sequence[str]) -> str:
    return f"report/{hashlib.sha256(repr(list(problems)).encode()).hexdigest()}"


def _name(address: str) -> str:
    """Return an IP address together with its host's name, if it has one."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostbyaddr(address)[0]} ({address})"
    return address


def _reader_gone(stream: TextIO) -> bool:
    """Return True if the other end of the pipe that a stream writes to is closed."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
