"""The batches of each rank, and errors in reading data."""

import errno
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from corpus.order import GlobalOrder
from data_utils import PackedDataset
from engine.layout import Layout
from processes import boosted, run_ranks
from training.batches import Batches, StepBatch, build_dataloader, check_same_batch
from training.legs import Leg
from training.plan import Plan
from training.run import Run

ONE_RANK = Layout("zero2", tp=1, pp=1, sp=1, dp=1, zero_stage=2)


class TestDataloader:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("ranks", "flags", "coordinates"),
        [
            (2, "-p zero2", [0, 1]),
            (2, "-p gemini", [0, 1]),
            (2, "-p hybrid_parallel --tp 2 --pp 1", [0, 0]),
            (2, "-p hybrid_parallel --tp 1 --pp 2", [0, 0]),
            (2, "-p hybrid_parallel --tp 1 --pp 1 --sp 2", [0, 0]),
            (4, "-p hybrid_parallel --tp 2 --pp 1", [0, 0, 1, 1]),
        ],
    )
    def test_peers_read_the_same_and_data_parallel_ranks_different_parts(self, ranks, flags, coordinates):
        data_parallel = len(set(coordinates))
        order = GlobalOrder(50, 42, True)
        for batches, coordinate in zip(run_ranks(ranks, read_batches, flags, data_parallel), coordinates, strict=True):
            positions = range(20 + coordinate, 52, data_parallel)  # 32 sequences from position 20 of the order
            assert batches == [[order[first], order[second]] for first, second in pairs(positions)]

    @pytest.mark.slow
    def test_a_peer_with_a_different_batch_is_detected(self):
        messages = run_ranks(2, read_differently, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["rank 1 reads a different batch than its model-parallel peers at 20"] * 2

    @pytest.mark.slow
    def test_data_parallel_ranks_with_the_same_data_are_detected(self):
        messages = run_ranks(2, count_parts, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["2 data-parallel ranks read 1 distinct parts of the data"] * 2


class Unreadable:
    """A data set whose second item cannot be read, like a file on a network that is down."""

    def __init__(self, bus_error=False):
        self.bus_error = bus_error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1 and self.bus_error:
            os.kill(os.getpid(), signal.SIGBUS)
        if index == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "tokens.bin")
        return {"number": index}


class TestLegs:
    """Stages one after the other, each with its own loader and number of micro-batches."""

    @pytest.mark.parametrize("workers", [0, 1])
    def test_each_step_has_its_micro_batches(self, workers):
        legs = [(0, 2, 1, 3), (10, 2, 3, 1), (20, 1, 1, 0), (30, 1, 2, 3)]  # first number, batch, micro-batches, steps
        numbers = [[{"number": number} for number in range(first, first + 6)] for first, *_ in legs]
        loaders = [
            DataLoader(part, size, num_workers=workers) for part, (_, size, *_) in zip(numbers, legs, strict=True)
        ]
        batches = Batches(((loader, *leg[2:]) for loader, leg in zip(loaders, legs, strict=True)), ONE_RANK)
        read = [[batch["number"].tolist() for batch in batches._read().micro_batches] for _ in range(7)]
        assert read == [
            *([[0, 1]], [[2, 3]], [[4, 5]]),
            [[10, 11], [12, 13], [14, 15]],
            *([[30], [31]], [[32], [33]], [[34], [35]]),
        ]


class TestUnreadableData:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_in_one_line(self, capfd, workers):
        batches = Batches([(DataLoader(Unreadable(), num_workers=workers), 1, 2)], ONE_RANK)
        assert batches._read() == StepBatch([{"number": torch.tensor([0])}])
        batches.accumulation_steps = 2
        failed = batches._read()
        assert failed.micro_batches == []
        assert failed.error.removeprefix("OSError: ") == "[Errno 5] Input/output error: 'tokens.bin'"
        assert capfd.readouterr().err == ""

    def test_bus_error_in_a_loader_process(self):
        failed = Batches([(DataLoader(Unreadable(bus_error=True), num_workers=1), 2, 1)], ONE_RANK)._read()
        assert failed.micro_batches == []
        assert failed.error.endswith(", was killed by SIGBUS; a file that cannot be read, or /dev/shm full?")


def pairs(positions):
    return zip(positions[::2], positions[1::2], strict=True)


class NumberedSequences(list):
    slice_weights = None
    order, collate = PackedDataset.order, None


def loader_of(flags):
    engine = boosted(f"{flags} -b 2")
    dataset = NumberedSequences({"input_ids": torch.tensor([number])} for number in range(50))
    layout = engine.layout
    leg = Leg(0, 0, 5, 0, 20, 16 // layout.dp, engine.job.batch, 2 * layout.dp, dataset)
    plan = Plan(layout, [leg], total_sequences=100)
    run = Run("test", engine.job, num_workers=0)
    return build_dataloader(engine, run, plan, leg)


def read_batches(flags, data_parallel):
    loader = loader_of(flags)
    batches = list(loader)
    check_same_batch(loader, batches[0], data_parallel)
    return [batch["input_ids"].flatten().tolist() for batch in batches]


def read_differently(flags):
    loader = loader_of(flags)
    batch = next(iter(loader))
    batch["input_ids"][0] += dist.get_rank()
    with pytest.raises(AssertionError) as caught:
        check_same_batch(loader, batch, data_parallel=1)
    return str(caught.value)


def count_parts(flags):
    loader = loader_of(flags)
    with pytest.raises(AssertionError) as caught:
        check_same_batch(loader, next(iter(loader)), data_parallel=2)
    return str(caught.value)
