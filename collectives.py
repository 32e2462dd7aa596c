"""What all ranks do together beside exchanging tensors: share values, and fail as one."""

from collections.abc import Callable

import torch.distributed as dist

from console import InputError, RunError, rank


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


def on_rank_zero(action: Callable[[], None], failure: str) -> None:
    """Runs `action` on rank 0, with all ranks waiting for it and sharing its failure. Collective."""
    error = None
    if rank() == 0:
        try:
            action()
        except (InputError, RunError) as caught:
            error = str(caught)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    raise_together(error, failure)
