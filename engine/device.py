"""The device that this rank computes on: its GPU, or host memory (see cpu.py)."""

from collections.abc import Callable

import torch
from colossalai.accelerator import get_accelerator

MB = 2**20  # as in ColossalAI's published figures


def current_device() -> torch.device:
    return torch.device(get_accelerator().get_current_device())


def device_name() -> str:
    return get_accelerator().get_device_name()


def has_float8() -> bool:
    """Return True if the GPUs multiply float8 matrices; also without a GPU, where the processor does, slowly."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


def synchronize() -> None:
    """Wait until the device has finished all submitted work."""
    get_accelerator().synchronize()


def when_idle() -> Callable[[], bool]:
    """Return a function that returns True once the device has finished the work submitted so far."""
    event = get_accelerator().Event()
    event.record()
    return event.query


class HostCopies:
    """Copies to host memory, one at a time; those from a GPU are on a stream of their own, beside its other work."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._source: torch.Tensor | None = None  # is being copied, so that its memory may not be reused yet

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Begin to copy to a host tensor, pinned if the source is on a GPU, and return it. See `wait`."""
        if self._stream is None or not source.is_cuda:
            return target.copy_(source)
        self.wait()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._source = source
        return target

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._stream is not None:
            self._stream.synchronize()
        self._source = None


def peak_memory() -> int:
    """Return torch's peak allocation on the device in bytes; without a GPU, the process's peak memory."""
    return get_accelerator().max_memory_allocated()


def limit_memory(megabytes: int) -> bool:
    """Limit the GPU memory of this process; Gemini's automatic placement plans within the limit.

    Returns:
        False without a GPU, where there is no limit.
    """
    if not torch.cuda.is_available():
        return False
    from colossalai.legacy.utils.memory import colo_set_process_memory_fraction  # importing it takes half a second

    total = torch.cuda.get_device_properties(current_device()).total_memory
    colo_set_process_memory_fraction(min(1.0, megabytes * MB / total))
    return True
