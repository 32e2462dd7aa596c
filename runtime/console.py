"""Output of the programs: lines of rank 0, the two errors that become lines, robust streams, quiet libraries."""

import codecs
import contextlib
import io
import locale
import logging
import os
import sys
import warnings
from typing import Any, TextIO


class InputError(Exception):
    """Unusable input. Each problem is one line that names the flag or file, and what to do."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that cannot go on. The message says what happened, where, and how to resume."""


class NoRoom(RunError):
    """A run that cannot go on until there is room on a disk."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rank() -> int:
    """Return this process's global rank, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's rank on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return the number of ranks; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return the number of ranks on this node; without a launcher all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def say(message: str) -> None:
    """Print a line on rank 0, nothing on the others."""
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
    """Format a number of bytes in units of 10^6 or 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


class _Output(io.FileIO):
    """Standard output or error that survives a full disk: one line reports it, and the program fails at its end."""

    failed = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.failed and self.fileno() == 1:
                print(f"standard output cannot be written ({error.strerror}); continuing without it", file=sys.stderr)
            self.failed = True
            return memoryview(data).nbytes


def open_standard_streams() -> None:
    """Make standard output and error accept any text in any encoding, and survive being closed or full.

    Streams that the caller has replaced, as a test does, are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened, such as a shard, would become standard output
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


def output_failed() -> bool:
    """Return True if a part of standard output could not be written."""
    return getattr(_raw(sys.stdout), "failed", False)


def quiet_third_parties() -> None:
    """Silence library messages that users cannot act on, and make the streams safe. Call before importing libraries."""
    open_standard_streams()
    _read_utf8()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "galore_torch", "peft", "datasets"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    # A first step without a label that counts updates nothing, and the schedule moves on.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # in ColossalAI's strings, on Python 3.12
    # The last one warns about every use of the policy behind --keep_attention.
    for name in ("colossalai", "bitsandbytes", "datasets", "torch._higher_order_ops.wrap"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _read_utf8() -> None:
    """Read files as UTF-8 where the locale is ASCII; torch._inductor opens its own without an encoding."""
    if codecs.lookup(locale.getencoding()).name == "ascii":
        for name in ("C.UTF-8", "C.utf8", "UTF-8"):  # the locales that PEP 538 tries
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                return


def _raw(stream: TextIO | None) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)
