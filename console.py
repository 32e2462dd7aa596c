"""What the programs say to the people who run them: rank-0 output, mistakes in the input, third-party noise."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

USAGE_ERROR = 2


class InputError(Exception):
    """The user's input cannot be used. Each problem is one line that names the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


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


@contextlib.contextmanager
def input_errors_exit(program: str) -> Iterator[None]:
    """Turns an InputError into one line a problem on rank 0 and exit status 2 on every rank."""
    try:
        yield
    except InputError as error:
        if rank() == 0:
            for problem in error.problems:
                print(f"{program}: error: {problem}", file=sys.stderr, flush=True)
        sys.exit(USAGE_ERROR)


def quiet_third_parties() -> None:
    """Silences messages of libraries that the user of these programs cannot act on. Call before importing them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "galore_torch", "peft", "datasets"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    for name in ("colossalai", "DistributedLogger", "transformers", "torch.distributed.elastic", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
