"""The device that this rank computes on: its GPU, or host memory (see cpu.py)."""

from collections import deque
from collections.abc import Callable

import torch
from colossalai.accelerator import get_accelerator

MB = 2**20  # as in ColossalAI's published figures
RESERVE = 0.05  # fraction of a GPU's memory that copies to the host leave free


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
    """Copies to host memory; those from a GPU go on while it computes.

    Temporary sources are kept until they are copied, as many as there is room for: GPU memory beyond what training has
    needed until the first copy, less a reserve.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._temporary: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self._last: torch.cuda.Event | None = None  # of a source that will change
        self._needed: int | None = None  # bytes that training needs
        self._room = 0.0

    def copy(self, target: torch.Tensor, source: torch.Tensor, temporary: bool) -> torch.Tensor:
        """Begin to copy to a host tensor, pinned if the source is on a GPU, and return it. See `wait`.

        Args:
            temporary: the source does not change; else call `protect` before it does.
        """
        if self._stream is None or not source.is_cuda:
            return target.copy_(source)
        if temporary:
            self._make_room(source.nbytes)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied = self._stream.record_event()
        if temporary:
            self._temporary.append((copied, source))
        else:
            self._last = copied
        return target

    def _make_room(self, size: int) -> None:
        """Wait for the oldest temporary sources until one of this size fits beside the others, or is alone."""
        if not self._temporary:
            free, total = torch.cuda.mem_get_info()
            self._needed = self._needed or torch.cuda.max_memory_allocated()
            self._room = free + torch.cuda.memory_reserved() - self._needed - RESERVE * total
        while self._temporary and sum(source.nbytes for _, source in self._temporary) + size > self._room:
            copied, _ = self._temporary.popleft()
            copied.synchronize()

    def protect(self) -> None:
        """Let the work that is submitted from now on wait until sources that may change are copied."""
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)
            self._last = None

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._stream is not None:
            self._stream.synchronize()
        self._temporary.clear()


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
