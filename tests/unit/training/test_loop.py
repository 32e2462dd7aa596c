"""The learning-rate schedule, batches by rank, and their random numbers."""

import errno
import os
import signal
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from corpus.order import GlobalOrder
from data_utils import PackedDataset
from engine.layout import Layout
from pretrain import parse_args
from processes import boosted, run_ranks
from training.batches import build_dataloader, check_same_batch, next_batches
from training.loop import step_seed
from training.plan import Plan, TrainState
from training.schedule import build_scheduler, cosine_with_warmup

FOUR_RANKS = Layout(tp=1, pp=1, sp=1, dp=4, zero_stage=2)


class TestSchedule:
    def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(self):
        values = [cosine_with_warmup(step, 4, 100) for step in range(5)]
        assert values == [0.25, 0.5, 0.75, 1.0, 1.0]

    def test_cosine_ends_at_a_tenth(self):
        assert cosine_with_warmup(52, 4, 100) == pytest.approx(0.55)  # half way
        assert cosine_with_warmup(100, 4, 100) == pytest.approx(0.1)
        assert cosine_with_warmup(99, 4, 100) == pytest.approx(0.1, abs=1e-3)
        assert cosine_with_warmup(1000, 4, 100) == pytest.approx(0.1)
        falling = [cosine_with_warmup(step, 4, 100) for step in range(4, 101)]
        assert falling == sorted(falling, reverse=True)

    def test_without_warm_up_and_with_nothing_else(self):
        assert cosine_with_warmup(0, 0, 10) == 1.0
        assert [cosine_with_warmup(step, 10, 10) for step in (0, 9)] == [0.1, 1.0]
        assert cosine_with_warmup(0, 0, 0) > 0

    @pytest.mark.parametrize("resumed", [0, 1, 4, 7, 19])
    def test_scheduler_is_a_function_of_the_step(self, resumed):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5.0)
        args, plan = parse_args(["-s", "4", "--lr", "1e-3"]), Plan(FOUR_RANKS, 4, 64.0, 20, total_sequences=80)
        scheduler = build_scheduler(Namespace(optim=optimizer), args, TrainState(step=resumed), plan)
        rates = []
        for _ in range(resumed, plan.total_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            assert scheduler.get_last_lr() == [rates[-1]]
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([1e-3 * cosine_with_warmup(step, 4, 20) for step in range(resumed, 20)])


class TestDataloader:
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
    def test_peers_read_the_same_and_others_their_share_of_the_order(self, ranks, flags, coordinates):
        data_parallel = len(set(coordinates))
        order = GlobalOrder(50, 42, True)
        for batches, coordinate in zip(run_ranks(ranks, read_batches, flags, data_parallel), coordinates, strict=True):
            positions = range(20 + coordinate, 52, data_parallel)  # from sequence 20 of the order on, 32 in all
            assert batches == [[order[first], order[second]] for first, second in pairs(positions)]

    def test_a_peer_with_another_batch_is_found_out(self):
        messages = run_ranks(2, read_differently, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["rank 1 reads another batch than its model-parallel peers at 20"] * 2

    def test_ranks_without_a_share_of_their_own_are_found_out(self):
        messages = run_ranks(2, count_shares, "-p hybrid_parallel --tp 2 --pp 1")
        assert messages == ["1 shares of the data are read by 2 data-parallel ranks"] * 2


class Unreadable:
    """Like a file on a network that has gone: the second item is not to be had."""

    def __init__(self, bus_error=False):
        self.bus_error = bus_error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1 and self.bus_error:
            os.kill(os.getpid(), signal.SIGBUS)
        if index == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "tokens.bin")
        return index


class TestUnreadableData:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_in_one_line(self, capfd, workers):
        batches = iter(DataLoader(Unreadable(), num_workers=workers))
        assert next_batches(batches, 1) == ([torch.tensor([0])], None)
        none, reason = next_batches(batches, 2)
        assert none == []
        assert reason.removeprefix("OSError: ") == "[Errno 5] Input/output error: 'tokens.bin'"
        assert capfd.readouterr().err == ""

    def test_bus_error_of_a_loader_process(self):
        batches = iter(DataLoader(Unreadable(bus_error=True), num_workers=1))
        none, reason = next_batches(batches, 2)
        assert none == []
        assert reason.endswith(", was killed by SIGBUS; a file that cannot be read, or /dev/shm full?")


def pairs(positions):
    return zip(positions[::2], positions[1::2], strict=True)


class NumberedSequences(list):
    slice_weights = None
    order, collate = PackedDataset.order, None


def loader_of(flags):
    run = boosted(flags + " -b 2 -s 0 --num_workers 0 -e 2")
    dataset = NumberedSequences({"input_ids": torch.tensor([number])} for number in range(50))
    layout = run.layout
    state = TrainState(step=5, sequences=20)
    plan = Plan(layout, 2 * layout.dp, 64.0, total_steps=5 + 16 // layout.dp, total_sequences=100)
    return build_dataloader(run.plugin, dataset, run.args, state, plan)


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


def count_shares(flags):
    loader = loader_of(flags)
    with pytest.raises(AssertionError) as caught:
        check_same_batch(loader, next(iter(loader)), data_parallel=2)
    return str(caught.value)


def test_every_step_and_rank_draws_other_random_numbers(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        seeds |= {step_seed(seed, step) for seed in range(3) for step in range(3)}
    assert len(seeds) == 27
    assert {step_seed(seed, step) for seed in range(3) for step in range(3)} < seeds  # nothing else goes in
