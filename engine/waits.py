"""The time that this rank waits for others, measured without synchronizing the device."""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch.cuda import Event

Moment: TypeAlias = float | Event  # without a GPU, the host's clock
Span: TypeAlias = tuple[Moment, Moment]

_spans: list[Span] | None = None  # of this step; None: nobody measures


def moment() -> Moment:
    """Return this moment of the current stream; `seconds` reads it once the stream has passed it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = Event(enable_timing=True)
    event.record()
    return event


def seconds(span: Span) -> float:
    """Return the seconds between two moments that have passed."""
    begin, end = span
    if isinstance(begin, Event):
        return begin.elapsed_time(end) / 1000  # type: ignore[arg-type]
    return end - begin  # type: ignore[operator]


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Measure a block in which this rank waits for others: an exchange, or the compute stream's wait for one.

    An exchange on a side stream delays nothing by itself, so it is not measured.
    """
    if _spans is None or (torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream()):
        yield
        return
    begin = moment()
    yield
    _spans.append((begin, moment()))


def take() -> list[Span]:
    """Return the waits measured since the last call, and go on measuring; the first call begins to."""
    global _spans
    spans, _spans = _spans or [], []
    return spans
