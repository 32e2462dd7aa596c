"""Messages to the people who run the programs: rank-0 output, mistakes in the input, third-party noise."""

import codecs
import contextlib
import io
import locale
import logging
import os
import sys
import warnings
from types import TracebackType
from typing import Any, TextIO

KEYBOARD_INTERRUPT = 130


class InputError(Exception):
    """The user's input cannot be used. Each problem is one line that names the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


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


def below(least: int, **values: int | None) -> list[str]:
    """Return a line for each flag whose value is below the least possible; None is a flag that was left out."""
    return [
        f"--{name}: must be at least {least}, not {value}"
        for name, value in values.items()
        if value is not None and value < least
    ]


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
