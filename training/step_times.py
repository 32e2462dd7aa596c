"""Times of each rank's steps, and the ranks that are slower than the others."""

import socket
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

from engine import waits
from engine.boost import Engine
from runtime.collectives import gather
from runtime.console import rank, world_size

STEPS = 50  # over which ranks are compared
SLOWER = 0.1  # than the median of the ranks, from which a rank is named
NAMED = 3  # slow ranks, at most, in a line


class Times(NamedTuple):
    """A rank's times, in seconds."""

    steps: float = 0.0  # from their begin to the update's end; saves and evaluations lie between them
    data: float = 0.0  # of this, waiting for data
    waiting: float = 0.0  # and for other ranks, the transfer included

    @property
    def own(self) -> float:
        """The time for the rank's own work, which only it can shorten."""
        return self.steps - self.waiting

    def plus(self, other: Sequence[float]) -> "Times":
        return Times(*(own + more for own, more in zip(self, other, strict=True)))


class StepTimes:
    """Measures this rank's steps, and compares those of all ranks every `interval` steps; see `engine.waits`.

    The ranks' figures travel in the all-reduce that every step has (`loop.agree`), and are read after it, when the
    device has passed the moments of the step before. Nothing else is synchronized.

    Ranks of the same pipeline stage are compared. What tensor-parallel ranks exchange inside a layer, and stages with
    one another, counts as own work: all ranks that share a slow one's layers are slow with it.
    """

    def __init__(self, engine: Engine, interval: int):
        self.interval = interval
        self.due = False  # the ranks' figures are exchanged in this step
        self.first = True  # the first step compiles, and is not measured
        stage = engine.plugin.stage_manager.stage if engine.layout.pp > 1 else 0
        peers = gather((socket.gethostname(), stage))
        self.hosts, self.stages = [host for host, _ in peers], [stage for _, stage in peers]
        self.pending: list[tuple[waits.Span, float, list[waits.Span]]] = []
        self.own, self.own_steps = Times(), 0
        self.all, self.all_steps = [Times()] * len(peers), 0  # of all ranks, over up to STEPS
        self.figures: dict[str, float] = {}
        self.reports: list[str] = []

    def begin(self, step: int) -> None:
        """Begin step `step`, counted from 1."""
        self.due = step % self.interval == 0 and world_size() > 1
        self.began = waits.moment()
        waits.take()

    def end(self, data: float) -> None:
        """End the step; it waited `data` seconds for the next one's data."""
        if not self.first:
            self.pending.append(((self.began, waits.moment()), data, waits.take()))
        self.first = False

    def to_exchange(self) -> list[float]:
        """Return this rank's part of a sum over ranks: its times among zeros, or nothing if it is not due."""
        if not self.due:
            return []
        values = [0.0] * (len(Times._fields) * world_size())
        values[len(self.own) * rank() : len(self.own) * (rank() + 1)] = self.own
        return values

    def exchanged(self, values: list[float]) -> None:
        """Take the sum, just after the all-reduce."""
        self.figures, self.reports = {}, []
        if values and self.own_steps:
            fields = len(Times._fields)
            ranks = [Times(*values[start : start + fields]) for start in range(0, len(values), fields)]
            self._compare(ranks)
            self.own, self.own_steps = Times(), 0
        for step, data, spans in self.pending:
            self.own = self.own.plus((waits.seconds(step), data, sum(map(waits.seconds, spans))))
            self.own_steps += 1
        self.pending.clear()

    def _compare(self, ranks: list[Times]) -> None:
        excess = self._excess(ranks)
        slowest = max(range(len(ranks)), key=excess.__getitem__)
        waiting = statistics.median_low(times.waiting / max(times.steps, sys.float_info.min) for times in ranks)
        self.figures = {"slowest_rank": slowest, "rank_spread": excess[slowest], "waiting": waiting}
        self.all = [total.plus(times) for total, times in zip(self.all, ranks, strict=True)]
        self.all_steps += self.own_steps
        if self.all_steps >= STEPS:
            self._report()
            self.all, self.all_steps = [Times()] * len(ranks), 0

    def _excess(self, ranks: list[Times]) -> list[float]:
        """Return by what fraction each rank's own work takes longer than the median of the ranks of its stage."""
        medians: dict[int, float] = {}
        for stage in set(self.stages):
            peers = [times.own for times, other in zip(ranks, self.stages, strict=True) if other == stage]
            medians[stage] = max(statistics.median_low(peers), sys.float_info.min)
        return [times.own / medians[stage] - 1 for times, stage in zip(ranks, self.stages, strict=True)]

    def _report(self) -> None:
        excess = self._excess(self.all)
        slow = [number for number, more in enumerate(excess) if more > SLOWER]
        slow.sort(key=excess.__getitem__, reverse=True)
        for number in slow[:NAMED]:
            times, steps = self.all[number], self.all_steps
            self.reports.append(
                f"slow: rank {number} on {self.hosts[number]} needs {times.own / steps:.3f} s a step for its own work, "
                f"{excess[number]:.0%} more than the median, {times.data / steps:.3f} s of it for data; "
                f"the others wait (last {steps} steps)"
            )
        if len(slow) > NAMED:
            self.reports.append(f"slow: {len(slow) - NAMED:,} more ranks")
