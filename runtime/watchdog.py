"""Hangs: each rank watches its own progress; when it stops, the ranks find out who is missing, say so, and end.

The training thread marks the phase that it enters. A thread of each rank compares the time since with a limit. A rank
over its limit raises an alarm in the store of the launch; every rank answers with its position, and one of them judges.
Without an alarm, a rank asks the store one short question every POLL_SECONDS.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from runtime import process, ranks
from runtime.console import InputError, local_rank, rank, say, world_size

if TYPE_CHECKING:
    from torch.distributed import Store

DATA, FORWARD, BACKWARD, REDUCE, UPDATE = "data", "forward", "backward", "reduce", "update"
SAVE, EVALUATE = "save", "evaluate"

POLL_SECONDS = 5  # between a rank's looks at its own progress and at the alarm; with a short limit, a quarter of it
DEFAULT_SECONDS = 300
FIRST_SECONDS = 3600  # at least, for a phase of the first step of a stage, which may compile
PHASES = 3  # a limit that is not given is at least as many times the longest phase
DUMP_SECONDS = 5  # for a rank to write its state; the disk may be what hangs
LEAVE_SECONDS = 5  # for the ranks to end together, so that none reports that another has ended


class Position(NamedTuple):
    """A rank's place in the run. The ranks count their marks alike, so that a smaller count is a rank behind."""

    step: int = 0
    phase: str = "start"
    marks: int = 0
    since: float = 0.0  # time.monotonic() of the last sign of progress

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


_position = Position()
_longest = ("", 0.0)  # the phase of the step that took most seconds


def mark(phase: str, step: int | None = None) -> None:
    """Note that the training thread enters a phase. Call it at the same places on every rank."""
    global _position, _longest
    now, before = time.monotonic(), _position
    _longest = max(_longest, (before.phase, now - before.since), key=lambda spent: spent[1])
    _position = Position(before.step if step is None else step, phase, before.marks + 1, now)


def alive() -> None:
    """Note progress inside a phase that takes as long as it needs."""
    global _position
    _position = _position._replace(since=time.monotonic())


class Watchdog:
    """Ends the run with status process.HUNG if it makes no progress for a time; see `Outputs.hang_timeout`.

    It watches from the second step on, in that step with a limit that allows for compilation, as the first one shows
    it. Waiting for a disk has no limit (see `collectives.any_alive`), but a rank that is stopped meanwhile is found.
    """

    def __init__(self, seconds: int | None, folder: Path):
        """
        Args:
            seconds: the limit; 0: none; None: DEFAULT_SECONDS, or more if the phases of the run are long.
            folder: of logs; a run that hangs makes a folder in it, with a file per rank.
        """
        self.given, self.folder = seconds, folder
        self.limit: float = DEFAULT_SECONDS if seconds is None else seconds
        self.poll = min(POLL_SECONDS, self.limit / 4)
        self.answer_seconds = 2 * self.poll + 2
        self._begun = 0  # steps since the limit is new
        self._watching = False
        self._heard = time.monotonic()  # time of the store's last answer
        self._ending = threading.Lock()
        self._first = ""  # identity of rank 0

    def restart(self) -> None:
        """Allow the next step any time up to an hour or more, and derive the limit from its phases, as at the start."""
        self._begun, self.limit = 0, max(FIRST_SECONDS, FIRST_SECONDS / DEFAULT_SECONDS * self.limit)

    def begin(self, step: int) -> None:
        """Mark the beginning of a step.

        Raises:
            InputError: a phase takes longer than the limit that is given.
        """
        global _longest
        mark(DATA, step)
        (phase, seconds), _longest = _longest, ("", 0.0)
        self._begun += 1
        if self.given == 0 or self._begun not in (2, 3):
            return
        least = self.given or DEFAULT_SECONDS
        self.limit = max(least, PHASES * seconds)
        if not self._watching:
            self._watching = True
            for work in (self._talk, self._guard):
                threading.Thread(target=work, name="watchdog", daemon=True).start()
        elif self._begun == 2:
            return
        elif self.given and seconds > self.given:
            raise InputError(
                f"--hang_timeout: {self.given} s is shorter than the phase '{phase}' of a step, which took "
                f"{seconds:.1f} s; give several times as much, or leave the flag out"
            )
        elif self.given:
            self.limit = self.given
        elif self.limit > least:
            say(f"--hang_timeout: {self.limit:.0f} s, {PHASES} times the longest phase of a step ('{phase}')")

    def _talk(self) -> None:
        """Raise alarms and answer them, in rounds, until one is about a hang."""
        with contextlib.suppress(RuntimeError):  # the store is gone: see _guard
            store, number, quiet_until = ranks.meeting().another_connection(), 0, 0.0
            self._first = store.get("process/0").decode()
            while True:
                self._heard, key = time.monotonic(), f"hang/{number}"
                if self._idle() > self.limit and self._heard > quiet_until:
                    store.set(f"{key}/alarm", "")
                if store.check([f"{key}/alarm"]):
                    verdict = self._ask(store, key)
                    if message := verdict["message"]:
                        leave = partial(_leave, store, key, verdict)
                        self._end(message, verdict["folder"], verdict["judge"] == rank(), leave)
                    number, quiet_until = number + 1, time.monotonic() + self.limit / 4
                time.sleep(self.poll)

    def _guard(self) -> None:
        """End this rank if it is over its limit and the store does not answer, since then its machine hangs."""
        while True:
            time.sleep(self.poll)
            if self._idle() > self.limit and time.monotonic() - self._heard > 2 * self.answer_seconds:
                keeper = f"{'torchrun' if ranks.launcher_keeps_store() else 'rank 0'} at {ranks.place()}"
                finding = f"no answer from {keeper}, stopped or cut off; the others wait in {_position}"
                victims = [] if ranks.launcher_keeps_store() else [self._first]
                neighbour = any(map(ranks.process_here, victims))
                leave = partial(_kill_here, victims)
                self._end(self._message(finding), self._new_folder(), local_rank() == int(neighbour), leave)

    def _idle(self) -> float:
        return time.monotonic() - _position.since

    def _message(self, finding: str) -> str:
        return f"no progress for {self.limit:.0f} s: {finding}"

    def _new_folder(self) -> str:
        return str(self.folder / f"hang-{datetime.now():%Y%m%d-%H%M%S}")

    def _ask(self, store: "Store", key: str) -> dict[str, Any]:
        """Answer an alarm, and return the verdict: with a message, or without one if the run is only slow."""
        step, phase, marks, _ = _position
        store.set(f"{key}/answer/{rank()}", json.dumps([step, phase, marks, self._idle()]))
        store.add(f"{key}/answers", 1)
        deadline = time.monotonic() + self.answer_seconds + rank() / world_size()  # rank 0 judges if it can
        while time.monotonic() < deadline and store.add(f"{key}/answers", 0) < world_size():
            time.sleep(self.poll / 4)
            self._heard = time.monotonic()
        time.sleep(rank() / world_size())
        if store.compare_set(f"{key}/judge", "", str(rank())).decode() == str(rank()):
            store.set(f"{key}/verdict", json.dumps(self._judge(store, key)))
        return json.loads(store.get(f"{key}/verdict"))

    def _judge(self, store: "Store", key: str) -> dict[str, Any]:
        answers = {
            number: json.loads(store.get(f"{key}/answer/{number}"))
            for number in range(world_size())
            if store.check([f"{key}/answer/{number}"])
        }
        silent = [number for number in range(world_size()) if number not in answers]
        if min(idle for *_, idle in answers.values()) < self.limit / 2:
            return {"message": ""}
        positions = {number: Position(step, phase, marks) for number, (step, phase, marks, _) in answers.items()}
        message = self._message(_finding(silent, positions, lambda number: store.get(f"host/{number}").decode()))
        return {
            "message": message,
            "folder": self._new_folder(),
            "judge": rank(),
            "silent": silent,
            "answered": len(answers),
        }

    def _end(self, message: str, folder: str, printing: bool, leave: Callable[[], None]) -> None:
        """Write this rank's state, and end it together with the others."""
        if not self._ending.acquire(blocking=False):
            return
        message = f"{message}; each rank's stacks are in {folder}; resume with -f latest"
        with process.ending(process.HUNG, message, printing):
            dump = threading.Thread(target=_write_state, args=(Path(folder),), daemon=True)
            dump.start()
            dump.join(DUMP_SECONDS)
            with contextlib.suppress(RuntimeError):  # the store has ended with rank 0
                leave()
            _kill(psutil.Process().children(recursive=True))


def _finding(silent: list[int], positions: dict[int, Position], host: Callable[[int], str]) -> str:
    """Describe a hang by the ranks that did not answer, those that are behind, and the phase in which others wait."""

    def named(numbers: Iterable[int]) -> str:
        by_host: dict[str, list[int]] = {}
        for number in numbers:
            by_host.setdefault(host(number), []).append(number)
        return " and ".join(
            f"{'ranks' if len(found) > 1 else 'rank'} {', '.join(map(str, found))} on {name}"
            for name, found in by_host.items()
        )

    furthest = max(positions.values(), key=lambda position: position.marks)
    parts = [f"no answer from {named(silent)}, stopped or cut off"] if silent else []
    for behind in sorted({position for position in positions.values() if position.marks < furthest.marks}):
        parts.append(f"behind in {behind}: {named(number for number, other in positions.items() if other == behind)}")
    if parts:
        return "; ".join([*parts, f"the others wait in {furthest}"])
    if world_size() == 1:
        return f"in {furthest}"
    return f"all ranks are in {furthest}, none behind; the network or a GPU may hang"


def _leave(store: "Store", key: str, verdict: dict[str, Any]) -> None:
    """Wait until all ranks that answered are ready to end; then kill those of this machine that did not."""
    silent = [store.get(f"process/{number}").decode() for number in verdict["silent"]]
    store.add(f"{key}/ready", 1)
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and store.add(f"{key}/ready", 0) < verdict["answered"]:
        time.sleep(0.1)
    _kill_here(silent)


def _kill_here(identities: list[str]) -> None:
    """Kill those of these processes that live on this machine, and their children."""
    for victim in filter(None, map(ranks.process_here, identities)):
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill([*victim.children(recursive=True), victim])


def _kill(processes: list[psutil.Process]) -> None:
    for victim in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def _write_state(folder: Path) -> None:
    """Write this rank's position and the stacks of its threads, and NCCL's flight recorder if it is on."""
    import torch.distributed as dist

    path = folder / f"rank{rank():05d}.txt"
    place = f"{_position}, for {time.monotonic() - _position.since:.0f} s"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"rank {rank()} on {socket.gethostname()}, process {os.getpid()}: {place}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if dist.is_initialized() and "nccl" in dist.get_backend():
            from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # only with CUDA

            path.with_suffix(".nccl_trace").write_bytes(_dump_nccl_trace())
