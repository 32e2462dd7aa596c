"""A look inside a run: traces of chosen steps by torch's profiler, and snapshots of GPU memory."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from runtime.console import InputError, below, rank, say, world_size

ALLOCATIONS = 100_000  # and frees that a snapshot shows, the last ones


@dataclass(frozen=True)
class Inspection:
    """The steps to look into; the fields are the flags of their names."""

    profile_steps: tuple[int, int] | None = None  # first and last
    profile_ranks: tuple[int, ...] | None = None  # None: rank 0
    memory_snapshot: int | None = None  # step

    def problems(self) -> list[str]:
        """Return a line for each number that cannot be, and for a flag without effect."""
        problems = below(1, memory_snapshot=self.memory_snapshot)
        if self.profile_ranks is not None and self.profile_steps is None:
            problems.append("--profile_ranks: takes effect only with --profile_steps; give that too, or leave it out")
        if unknown := [number for number in self.profile_ranks or () if not 0 <= number < world_size()]:
            problems.append(f"--profile_ranks: {unknown[0]} is none of the {world_size()} ranks, numbered from 0")
        if self.memory_snapshot is not None and not torch.cuda.is_available():
            problems.append("--memory_snapshot: shows the memory of a GPU, and there is none; leave it out")
        return problems

    def check_end(self, total_steps: int) -> None:
        """Raise InputError if the run ends before one of the steps."""
        for name, step in (
            ("profile_steps", (self.profile_steps or (0, 0))[1]),
            ("memory_snapshot", self.memory_snapshot),
        ):
            if (step or 0) > total_steps:
                raise InputError(
                    f"--{name}: the run ends at step {total_steps}, before step {step}; give earlier steps"
                )


class Inspector:
    """Writes this rank's traces and snapshots; `with` it, also a snapshot when memory runs out."""

    def __init__(self, inspection: Inspection, folder: Path):
        """
        Args:
            folder: of the run's logs; files are `profile/` and `memory/` in it.
        """
        self.inspection, self.folder = inspection, folder
        self.profiles = rank() in (inspection.profile_ranks or (0,))
        self.profile: torch.profiler.profile | None = None

    def __enter__(self) -> "Inspector":
        if self.inspection.memory_snapshot is not None:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.profile is not None and error is None and self.inspection.profile_steps:  # a signal ended the run
            say(self._trace(self.profile, self.inspection.profile_steps[1]))
        if isinstance(error, torch.OutOfMemoryError) and self.inspection.memory_snapshot is not None:
            print(self._snapshot("out-of-memory"), flush=True)  # of each rank that has none left
        if self.inspection.memory_snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)

    def begin(self, step: int) -> None:
        """Begin the trace if it begins with this step, or in it: a resume may begin after its first one."""
        steps = self.inspection.profile_steps
        if steps and self.profiles and self.profile is None and steps[0] <= step <= steps[1]:
            self.profile = torch.profiler.profile()
            self.profile.start()

    def end(self, step: int) -> list[str]:
        """Write the trace or the snapshot if it ends with this step; return a line for each."""
        reports = []
        if self.profile is not None and self.inspection.profile_steps and step == self.inspection.profile_steps[1]:
            reports.append(self._trace(self.profile, step))
        if step == self.inspection.memory_snapshot:
            reports.append(self._snapshot(f"step{step}"))
        return reports

    def _trace(self, profile: torch.profiler.profile, last: int) -> str:
        profile.stop()
        first = (self.inspection.profile_steps or (last, last))[0]
        path = self._file("profile", f"steps{first}-{last}-rank{rank()}.json")
        profile.export_chrome_trace(str(path))
        self.profile = None
        return f"profile: {path}, for chrome://tracing or ui.perfetto.dev"

    def _snapshot(self, moment: str) -> str:
        path = self._file("memory", f"{moment}-rank{rank()}.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return f"memory: {path}, for pytorch.org/memory_viz"

    def _file(self, kind: str, name: str) -> Path:
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name
