"""This rank's batches: the loader, the micro-batches of each step, and errors of reading them."""

import hashlib
import json
import multiprocessing.connection
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from corpus.order import GlobalOrder, Order
from engine.boost import Engine
from engine.device import current_device, when_idle
from engine.layout import Layout
from engine.waits import waiting
from model_utils import IGNORE_INDEX
from runtime.collectives import gather
from runtime.console import InputError, RunError
from runtime.process import follow_rank
from runtime.watchdog import DATA, mark
from training.left_out import Range, position_after
from training.legs import Leg
from training.plan import Plan
from training.run import Run

PREFETCHED_BATCHES = 8  # per loader process: a long document in a stream can take longer than a step of a small model
ENDING_SECONDS = 2  # to wait for the end of a failed loader process


class ShardedSampler(Sampler[int]):
    """Yields one data-parallel rank's share: positions start + rank, start + rank + num_replicas, ... below stop.

    `start` and `stop` count sequences over all ranks and epochs since the beginning of training, so a run that resumes
    at `start` on another number of ranks continues the same order. The first four arguments are those of
    `torch.utils.data.DistributedSampler`, which `functools.partial(ShardedSampler, seed=..., start=..., stop=...)`
    replaces.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        *,
        seed: int,
        start: int = 0,
        stop: int,
        order: Callable[[int], Order] | None = None,
        left_out: Sequence[Range] = (),
    ):
        """
        Args:
            order: returns the data set's own order for a seed; default: GlobalOrder.
            left_out: ranges of positions that are passed over, apart and ascending; `stop` does not count them.
        """
        self.order = order(seed) if order else GlobalOrder(len(dataset), seed, shuffle)  # type: ignore[arg-type]
        self.start, self.left_out = start, left_out
        self.positions = range(start + rank, stop, num_replicas)  # as if nothing were left out

    def __iter__(self) -> Iterator[int]:
        for position in self.positions:
            yield self.order[position_after(self.start, position - self.start + 1, self.left_out) - 1]

    def __len__(self) -> int:
        return len(self.positions)


def build_dataloader(engine: Engine, run: Run, plan: Plan, leg: Leg) -> DataLoader[Any]:
    """Return a loader of this rank's batches in a leg of the plan."""
    dataset = leg.dataset
    sampler = partial(
        ShardedSampler,
        seed=run.job.seed,
        start=leg.position,
        stop=leg.position + leg.steps * leg.global_batch,
        order=dataset.order,
        left_out=plan.left_out,
    )
    loader = engine.plugin.prepare_dataloader(
        dataset,
        batch_size=leg.batch.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=run.num_workers,
        prefetch_factor=PREFETCHED_BATCHES if run.num_workers else None,
        pin_memory=torch.cuda.is_available(),
        distributed_sampler_cls=sampler,
        collate_fn=dataset.collate,
    )
    loader.worker_init_fn = follow_rank
    return loader


def check_same_batch(loader: DataLoader[Any], batch: dict[str, torch.Tensor], data_parallel: int) -> None:
    """Check that model-parallel peers read the same batch, and each data-parallel rank a part of its own. Collective.

    Raises:
        AssertionError: the plugin has distributed the data wrongly.
    """
    digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
    first = loader.sampler.positions.start  # type: ignore[attr-defined]
    by_start: dict[int, str] = {}
    for number, (start, other) in enumerate(gather((first, digest))):
        if by_start.setdefault(start, other) != other:
            raise AssertionError(f"rank {number} reads a different batch than its model-parallel peers at {start}")
    if len(by_start) != data_parallel:
        raise AssertionError(f"{data_parallel} data-parallel ranks read {len(by_start)} distinct parts of the data")


def _end_of(status: int) -> str:
    """Describe the end of a process by its exit status, which is -N after signal N."""
    if status > 0:
        return f"ended with status {status}"
    number = signal.Signals(-status)
    causes = {signal.SIGKILL: "out of host memory?", signal.SIGBUS: "a file that cannot be read, or /dev/shm full?"}
    return f"was killed by {number.name}; {causes.get(number, 'see its own message')}"


@dataclass
class StepBatch:
    """The data of an optimizer step.

    Attributes:
        micro_batches: this rank's, in host memory; empty if they could not be read.
        stream: the position after them, if the data set is a stream.
        error: the reason why they could not be read.
        label_tokens, tokens, positions: labels that count, tokens, and tokens plus padding, over all ranks.
        ranks_without: number of ranks without micro-batches.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    stream: dict[str, Any] | None = None
    error: str | None = None
    label_tokens: int = 0
    tokens: int = 0
    positions: int = 0
    ranks_without: int = 0

    @property
    def padding(self) -> float:
        """The fraction of the positions that hold padding."""
        return 1 - self.tokens / self.positions


class Batches:
    """The batches of each step in turn; the next step's are prefetched while the device computes.

    Args:
        loaders: for one leg of the run after the other: its loader, its micro-batches per step, and its steps.
    """

    def __init__(self, loaders: Iterable[tuple[DataLoader[Any], int, int]], layout: Layout):
        self.loaders, self.layout = iter(loaders), layout
        self.steps = 0  # left of this leg
        self.iterator: Iterator[dict[str, Any]] = iter(())
        self.prefetched: StepBatch | None = None
        self.waited = 0.0  # seconds that the device was idle during this step's prefetch

    def _open(self) -> None:
        """Begin the next leg that has steps; without one, go on with this one."""
        leg = next((leg for leg in self.loaders if leg[2]), None)
        if leg is None:
            return
        self.loader, self.accumulation_steps, self.steps = leg
        self.iterator, self.checked = iter(self.loader), False
        # torch's handler would raise anywhere, even in a collective operation; `_read` notices dead processes itself.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def prefetch(self) -> None:
        """Read the next step's batches while the device works through its queue."""
        mark(DATA)
        idle, start = when_idle(), time.perf_counter()
        self.prefetched = self._read()
        self.waited = time.perf_counter() - start if idle() else 0.0

    def take(self) -> StepBatch:
        """Return the next step's batches, with counts over all ranks. Collective."""
        batch, self.prefetched, self.waited = self.prefetched or self._read(), None, 0.0
        self._count(batch)
        if not self.checked and not batch.ranks_without:
            check_same_batch(self.loader, batch.micro_batches[0], self.layout.dp)
            self.checked = True
        return batch

    def _read(self) -> StepBatch:
        """Return the micro-batches of a step, or any error instead of raising it: the other ranks wait for this one."""
        try:
            if self.steps == 0:
                self._open()
            self.steps -= 1
            micro_batches = [next(self.iterator) for _ in range(self.accumulation_steps)]
        except Exception as error:
            return StepBatch([], error=_reason(self.iterator, error))
        positions = [json.loads(batch.pop("stream")) for batch in micro_batches if "stream" in batch]
        return StepBatch(micro_batches, positions[-1] if positions else None)

    def _count(self, batch: StepBatch) -> None:
        """Set the batch's counts over all ranks. Collective."""
        counts = torch.zeros(4, dtype=torch.int64)
        counts[3] = not batch.micro_batches
        for micro_batch in batch.micro_batches:
            positions = micro_batch["input_ids"].numel()
            labels = int((micro_batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            counts[:3] += torch.tensor([labels, int(micro_batch.get("token_count", positions)), positions])
        counts = counts.to(current_device())
        mark(DATA)  # a rank before this one still reads
        with waiting():
            dist.all_reduce(counts)
        batch.ranks_without = int(counts[3])
        peers = self.layout.tp * self.layout.pp * self.layout.sp  # ranks that read the same batch
        batch.label_tokens, batch.tokens, batch.positions = (counts[:3] // peers).tolist()


def _reason(iterator: Iterator[dict[str, Any]], error: Exception) -> str:
    """Return in one line why a loader failed: the end of its process, or its error."""
    processes = getattr(iterator, "_workers", ())
    # The connection of a killed process breaks, and may be reported, a moment before the process has ended.
    sentinels = [process.sentinel for process in processes]
    ending = multiprocessing.connection.wait(sentinels, timeout=ENDING_SECONDS)
    for process in processes:
        if process.sentinel in ending:
            process.join()
        if process.exitcode:
            return f"a loader process, {process.pid}, {_end_of(process.exitcode)}"
    if not isinstance(error, InputError | RunError | OSError):
        traceback.print_exc()
    # The message from a loader process has a traceback before the error.
    last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^runtime\.console\.\w+: ", "", last_line)
