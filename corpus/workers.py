"""Processes that tokenize."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from runtime.process import end_with_parent

_shared: tuple  # of a worker process


def forked_pool(num_workers: int, *shared: Any) -> ProcessPoolExecutor:
    """Return a pool of processes that inherit `shared`; `submit(call, function, *arguments)` uses it.

    Forked processes do not import the main program again, and `shared` need not be picklable. They use neither CUDA nor
    threads of this process.
    """
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), _start, shared)


def _start(*shared: Any) -> None:
    """Leave an interrupt to the parent process, and end when that does."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def call(function: Callable, *arguments: Any) -> Any:
    """Return function(*shared, *arguments) in a process of `forked_pool`."""
    return function(*_shared, *arguments)
