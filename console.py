"""What the programs say to the people who run them: rank-0 output, mistakes in the input, third-party noise."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

USAGE_ERROR = 2
RUN_FAILED = 1
KEYBOARD_INTERRUPT = 130


class InputError(Exception):
    """The user's input cannot be used. Each problem is one line that names the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run cannot go on; one message says what happened, where, and how to resume."""


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


def quiet_third_parties() -> None:
    """Silences messages of libraries that the user of these programs cannot act on. Call before importing them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "galore_torch", "peft", "datasets"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # ColossalAI's strings, on Python 3.12
    for name in ("colossalai", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run(main: Callable[[], int], program: str) -> NoReturn:
    """Runs a program's main() and ends the process with its status.

    An InputError becomes one line a problem on rank 0 and exit status 2 on every rank; any other error a traceback.
    The process ends without the interpreter's finalisation. There, Gloo's threads outlive their process group, ask for
    the interpreter lock and abort it ('terminate called without an active exception', in 1 of 15 runs of two ranks with
    torch 2.13), and multiprocessing would wait for the loader processes, which ignore its SIGTERM.
    """
    try:
        status = main()
    except InputError as error:
        if rank() == 0:
            for problem in error.problems:
                print(f"{program}: error: {problem}", file=sys.stderr, flush=True)
        status = USAGE_ERROR
    except RunError as error:
        if rank() == 0:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        status = RUN_FAILED
    except KeyboardInterrupt:
        status = KEYBOARD_INTERRUPT
    except Exception:
        traceback.print_exc()
        status = RUN_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
