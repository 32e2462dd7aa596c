"""Messages to the people who run the programs: rank-0 output, mistakes in the input, third-party noise."""

import codecs
import contextlib
import ctypes
import hashlib
import io
import locale
import logging
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
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, TextIO

USAGE_ERROR = 2
RUN_FAILED = 1
KEYBOARD_INTERRUPT = 130
READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended
TELL_SECONDS = 3  # for the nodes to hear what rank 0 has said, before it ends and the launcher's store with it
_PARENT = os.getppid()  # as this process begins
# Gloo's messages, whatever the collective operation (gloo/transport/tcp/pair.cc)
_LOST_PEER = re.compile(r"(?:Connection closed by peer|Read error|writev) \[(?:::ffff:)?([^\]]+)\]")
_HEARD = "console/heard"  # by so many ranks has been seen what rank 0 says
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")  # of a launcher


class InputError(Exception):
    """The user's input cannot be used. Each problem is one line that names the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


# Nobody answers, or torch is what is missing
_NO_STORE = (InputError, OSError, RuntimeError, ValueError, ImportError)


class RunError(Exception):
    """A run cannot go on; one message says what happened, where, and how to resume."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rank() -> int:
    """Global rank as the launcher set it; 0 before and without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message: str) -> None:
    """Prints on rank 0 alone."""
    if rank() == 0:
        print(message, flush=True)


def size_text(size: float) -> str:
    """A number of bytes for people, in units of 10^6 or 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


class _Output(io.FileIO):
    """Standard output or error; a full disk does not end a run, but one line says so, and the run fails at its end."""

    failed = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.failed and self.fileno() == 1:
                print(f"standard output cannot be written ({error.strerror}); going on without it", file=sys.stderr)
            self.failed = True
            return memoryview(data).nbytes


def open_standard_streams() -> None:
    """Have standard output and error take any text, whatever their encoding, and whether they are full or closed.

    Streams that the caller has put in their place, as a test does, stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file to be opened, a shard for example, would become standard output
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, f"__{name}__")
        if getattr(sys, name) is not old or isinstance(_raw(old), _Output):
            continue
        raw = _Output(number, "w", closefd=False)
        unbuffered = isinstance(getattr(old, "buffer", None), io.FileIO)  # python -u
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
            encoding=getattr(old, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=getattr(old, "line_buffering", True),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _read_utf8() -> None:
    """Have files be read as UTF-8 where the locale is ASCII alone, as torch._inductor's own have to be."""
    if codecs.lookup(locale.getencoding()).name == "ascii":
        for name in ("C.UTF-8", "C.utf8", "UTF-8"):  # PEP 538's
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                return


def _raw(stream: TextIO | None) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def quiet_third_parties() -> None:
    """Silence messages of libraries that the user of these programs cannot act on. Call before importing them.

    Every program calls this first, so that its streams are made safe here too.

    A Ctrl-C during those imports, which take seconds, then ends the program without a traceback too.
    """
    open_standard_streams()
    _read_utf8()
    sys.excepthook = end_uncaught
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "galore_torch", "peft", "datasets"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    # Where no label of the first step counts, nothing is updated, and the schedule goes on.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # ColossalAI's strings, on Python 3.12
    # The last asks for care with what --keep_attention is told to keep.
    for name in ("colossalai", "bitsandbytes", "datasets", "torch._higher_order_ops.wrap"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
            import ranks

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


def interrupted(error: BaseException | None) -> bool:
    """Return True if an error is a Ctrl-C or was caused by one, as when a library reports that its import failed."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def end_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the place of sys.excepthook: ends in silence where the user has pressed Ctrl-C."""
    if interrupted(error):
        os._exit(KEYBOARD_INTERRUPT)
    sys.__excepthook__(kind, error, trace)


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
    import ranks

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
    import ranks

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
