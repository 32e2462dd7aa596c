"""Collective calls beside the exchange of tensors: share values, and fail on all ranks together."""

import threading
from collections.abc import Callable

import torch.distributed as dist

from runtime import watchdog
from runtime.console import InputError, RunError, rank

POLL_SECONDS = 0.05


def gather(value: object) -> list:
    """Return every rank's value, ordered by rank; without a process group, this process's alone. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: str | None, failure: str) -> None:
    """Raise RunError on every rank if any rank has an error: `failure`, then the first rank's error. Collective."""
    first = next((f"rank {number}: {text}" for number, text in enumerate(gather(error)) if text), None)
    if first:
        raise RunError(f"{failure}: {first}")


def any_alive(thread: threading.Thread) -> bool:
    """Wait a moment for this rank's thread, then return True if any rank's thread is still running. Collective.

    Call it in a loop: a single collective that waits for the slowest disk could exceed the process group's timeout.
    """
    thread.join(POLL_SECONDS)
    watchdog.alive()
    return any(gather(thread.is_alive()))


def on_rank_zero(action: Callable[[], None], failure: str) -> None:
    """Run `action` in a thread of rank 0 while all ranks wait; an error there is raised on all of them. Collective.

    Raises:
        RunError: `failure`, then the error's text.
    """
    errors: list[str] = []

    def act() -> None:
        try:
            action()
        except (InputError, RunError) as caught:
            errors.append(str(caught))
        except Exception as caught:
            errors.append(f"{type(caught).__name__}: {caught}")

    thread = threading.Thread(target=act if rank() == 0 else None, daemon=True)
    thread.start()
    while any_alive(thread):
        pass
    raise_together(next(iter(errors), None), failure)
