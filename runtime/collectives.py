"""What all ranks do together beside exchanging tensors: share values, and fail as one."""

import threading
from collections.abc import Callable

import torch.distributed as dist

from runtime.console import InputError, RunError, rank

POLL_SECONDS = 0.05


def gather(value: object) -> list:
    """Every rank's value, by rank; without a process group, this one's. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: str | None, failure: str) -> None:
    """Raises RunError, `failure` and the first rank's error, on every rank when any has one. Collective."""
    first = next((f"rank {number}: {text}" for number, text in enumerate(gather(error)) if text), None)
    if first:
        raise RunError(f"{failure}: {first}")


def any_alive(thread: threading.Thread) -> bool:
    """Whether any rank's thread still works; after a moment in which it may end. Collective.

    To be asked again and again, since one exchange that waits for the slowest disk would outlast the process group's
    patience.
    """
    thread.join(POLL_SECONDS)
    return any(gather(thread.is_alive()))


def on_rank_zero(action: Callable[[], None], failure: str) -> None:
    """Runs `action` in a thread of rank 0, with all ranks waiting for it and sharing its failure. Collective."""
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
