"""Data that a resumed run leaves out, as `--skip_data FROM-TO` asks: ranges of positions in the global order."""

from collections.abc import Iterable

from runtime.console import InputError

Range = list[int]  # first position, and the one after the last


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Return the positions of all ranges as ranges that are apart, in order."""
    apart: list[Range] = []
    for start, stop in sorted(ranges):
        if apart and start <= apart[-1][1]:
            apart[-1][1] = max(stop, apart[-1][1])
        else:
            apart.append([start, stop])
    return apart


def position_after(position: int, count: int, ranges: Iterable[Range]) -> int:
    """Return the position after the next `count` sequences, none of them in one of the ranges that `merged` returns."""
    for start, stop in ranges:
        if position <= start < position + count:
            position += stop - start
    return position + count


def sequences_between(position: int, stop: int, ranges: Iterable[Range]) -> int:
    """Return the number of sequences between two positions that are in none of the ranges."""
    return max(0, stop - position) - sum(min(stop, end) - start for start, end in ranges if position <= start < stop)


def leave_out(
    left_out: dict[str, Range],
    steps: tuple[int, int],
    step: int,
    position: int,
    global_batch: int,
    end: int,
    last_step: int,
) -> str:
    """Add the sequences of some later steps to those left out, once, and return a line that says so.

    Args:
        left_out: ranges of positions by the steps given for them, as checkpoints keep them.
        steps: the first and the last.
        step, position: those of the checkpoint.
        end: number of sequences in the run's data.
        last_step: that of the run.

    Raises:
        InputError: the steps are behind the checkpoint, or beyond the data or the end of the run.
    """
    first, last = steps
    name = f"{first}-{last}"
    if name in left_out:
        return f"--skip_data: the sequences of steps {name} are left out already, as the checkpoint says"
    if first <= step:
        raise InputError(
            f"--skip_data: step {first} is behind the checkpoint, which is at step {step}; resume from an earlier one"
        )
    ranges = merged(left_out.values())
    start, stop = (position_after(position, (number - step) * global_batch, ranges) for number in (first - 1, last))
    if stop > end:
        raise InputError(f"--skip_data: the data end before step {last}; give earlier steps, or more --num_epochs")
    if last > last_step:
        raise InputError(
            f"--skip_data: the run ends after step {last_step}; give earlier steps, or a larger --max_steps"
        )
    left_out[name] = [start, stop]
    return (
        f"--skip_data: the {sequences_between(start, stop, ranges):,} sequences of steps {name} are left out; step "
        f"{first} trains on those that step {last + 1} would have had"
    )
