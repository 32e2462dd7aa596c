"""This rank's batches: the loader, the next step's micro-batches, or the reason why there are none."""

import hashlib
import multiprocessing.connection
import re
import signal
import traceback
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from corpus.order import ShardedSampler
from data_utils import TrainingData
from engine.boost import Engine
from engine.device import current_device
from engine.layout import Layout
from model_utils import IGNORE_INDEX
from runtime.collectives import gather
from runtime.console import InputError, RunError
from runtime.process import follow_rank
from training.plan import Plan, Run, TrainState

PREFETCHED_BATCHES = 8  # by each loader process: a long document in a stream takes longer than a step of a small model
ENDING_SECONDS = 2  # for a loader process


def build_dataloader(engine: Engine, dataset: TrainingData, run: Run, state: TrainState, plan: Plan) -> DataLoader:
    """Return this rank's batches from the state's position to the end, in the plugin's data-parallel coordinate."""
    if state.stream is not None:
        dataset.resume(state.stream)  # type: ignore[attr-defined]  # a stream has a position of its own
    stop = state.sequences + (plan.total_steps - state.step) * plan.global_batch
    sampler = partial(ShardedSampler, seed=run.job.seed, start=state.sequences, stop=stop, order=dataset.order)
    loader = engine.plugin.prepare_dataloader(
        dataset,
        batch_size=run.job.batch.batch_size,
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


def check_same_batch(loader: DataLoader, batch: dict[str, torch.Tensor], data_parallel: int) -> None:
    """Asserts that there is one share of the data a data-parallel rank, and one batch among the ranks of a share."""
    digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
    first = loader.sampler.positions.start  # type: ignore[attr-defined]
    by_share: dict[int, str] = {}
    for number, (share, other) in enumerate(gather((first, digest))):
        if by_share.setdefault(share, other) != other:
            raise AssertionError(f"rank {number} reads another batch than its model-parallel peers at {share}")
    if len(by_share) != data_parallel:
        raise AssertionError(f"{len(by_share)} shares of the data are read by {data_parallel} data-parallel ranks")


def next_batches(batches: Iterator[dict], number: int) -> tuple[list[dict], str | None]:
    """The micro-batches of a step, or none and the reason, whatever it is: the other ranks wait for this one."""
    try:
        return [next(batches) for _ in range(number)], None
    except Exception as error:
        processes = getattr(batches, "_workers", ())
        # One that is killed loses its connections, which may be what is reported, a moment before it has ended.
        sentinels = [process.sentinel for process in processes]
        ending = multiprocessing.connection.wait(sentinels, timeout=ENDING_SECONDS)
        for process in processes:
            if process.sentinel in ending:
                process.join()
            if process.exitcode:
                return [], f"a loader process, {process.pid}, {_end_of(process.exitcode)}"
        if not isinstance(error, InputError | RunError | OSError):
            traceback.print_exc()
        # A loader process puts its traceback before it.
        last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return [], re.sub(r"^runtime\.console\.\w+: ", "", last_line)


def _end_of(status: int) -> str:
    """Describe the end of a process by its exit status, as `multiprocessing` has it."""
    if status > 0:
        return f"ended with status {status}"
    number = signal.Signals(-status)
    causes = {signal.SIGKILL: "out of host memory?", signal.SIGBUS: "a file that cannot be read, or /dev/shm full?"}
    return f"was killed by {number.name}; {causes.get(number, 'see its own message')}"


def count_tokens(micro_batches: list[dict[str, torch.Tensor]], layout: Layout) -> tuple[int, int, int, int]:
    """In one optimizer step, over all ranks: labels that count, tokens, positions with padding; ranks without a batch.

    Collective.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    counts[3] = not micro_batches
    for batch in micro_batches:
        positions = batch["input_ids"].numel()
        labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        counts[:3] += torch.tensor([labels, int(batch.get("token_count", positions)), positions])
    counts = counts.to(current_device())
    dist.all_reduce(counts)
    failed = int(counts[3])
    return *(counts[:3] // (layout.tp * layout.pp * layout.sp)).tolist(), failed
