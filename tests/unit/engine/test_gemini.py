"""Gemini with patched chunks, norm and layers, compared with Gemini unpatched."""

import contextlib
import functools
import io
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.memory_tracer import ChunkMemStatsCollector
from colossalai.zero.gemini.placement_policy import AutoPlacementPolicy

import stream_order
from engine import gemini, shards
from engine.job import Placement
from engine.layout import Parallelism
from engine.step import forward_backward, forward_loss, optimizer_step
from model_utils import count_parameters, load_config
from processes import boosted, job, run_ranks

pytestmark = pytest.mark.slow

OWN_NORM = Chunk.has_inf_or_nan, Chunk.set_l2_norm


def trained(flags: str, prepare: str = "") -> list[tuple[float, float, bool]]:
    """Return loss, norm and overflow of three steps; `prepare` names a change to the model before them."""
    run = boosted(f"-p gemini -b 2 --lr 1e-3 --gradient_clipping 0.1 {flags}")
    if prepare == "own norm":
        Chunk.has_inf_or_nan, Chunk.set_l2_norm = OWN_NORM
    elif prepare:
        torch.compiler.set_stance("force_eager" if prepare == "whole layers" else "default")
        gemini.compile_layers(run.model)
    shards.initialize_weights(run)
    generator = torch.Generator().manual_seed(dist.get_rank())
    steps, micro_batches = [], run.job.batch.accumulation_steps
    for _ in range(3):
        ids = [torch.randint(run.config.vocab_size, (2, 32), generator=generator) for _ in range(micro_batches)]
        batches = [{"input_ids": micro, "labels": micro} for micro in ids]
        label_tokens = 62 * micro_batches * dist.get_world_size()
        loss = forward_backward(run, batches, label_tokens)
        steps.append((loss.item(), *optimizer_step(run)))
    return steps


@functools.cache
def reference(ranks: int, flags: str) -> list[list[tuple[float, float, bool]]]:
    return run_ranks(ranks, trained, flags)


FLAGS = ["-x bf16", "-x bf16 --fp8", "-x bf16 --accumulation_steps 2 -g", "-x fp16"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", FLAGS)
class TestLayers:
    def test_hooked_once_give_the_same_results_to_the_bit(self, ranks, flags):
        assert run_ranks(ranks, trained, flags, "whole layers") == reference(ranks, flags)


@pytest.mark.parametrize("flags", FLAGS[1:3])
def test_compiled_layers_differ_by_rounding(flags):
    compiled = run_ranks(2, trained, flags, "compiled layers")
    for ours, theirs in zip(compiled, reference(2, flags), strict=True):
        for (loss, norm, _), (other_loss, other_norm, _) in zip(ours, theirs, strict=True):
            assert loss == pytest.approx(other_loss, rel=1e-3 if "fp8" in flags else 2e-4)  # zero2's differ as much
            assert norm == pytest.approx(other_norm, rel=2e-2)


def losses_without_training():
    run = boosted("-p gemini -b 2", attention_dropout=0.5)
    torch.compiler.set_stance("force_eager")
    gemini.compile_layers(run.model)
    shards.initialize_weights(run)
    ids = torch.randint(run.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for training in (True, False):
        run.model.train(training)
        found.append({forward_loss(run, {"input_ids": ids, "labels": ids}).item() for _ in range(2)})
    return found


def test_whole_layers_have_no_dropout_in_evaluation():
    training, evaluation = run_ranks(1, losses_without_training)[0]
    assert len(training) == 2
    assert len(evaluation) == 1


def with_prefetching(flags: str, chunks: int) -> tuple[list, int]:
    """Return losses and norms of steps, with passes without gradients around them, and the number of prefetches."""
    gemini.prefetched_chunks = lambda *_: chunks
    run = boosted(f"-p gemini -b 2 --lr 1e-2 {flags}")
    shards.initialize_weights(run)
    fetched, add_work = [], run.model.gemini_manager.add_work
    run.model.gemini_manager.add_work = lambda *work: (fetched.append(work), add_work(*work))
    ids = torch.randint(run.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    batch, losses = {"input_ids": ids, "labels": ids}, []
    batches = [batch] * run.job.batch.accumulation_steps
    for _ in range(4):
        losses.append(forward_loss(run, batch).item())
        losses.append(forward_backward(run, batches, 62 * len(batches) * 2).item())
        losses.append(optimizer_step(run)[0])
    losses.append(forward_loss(run, batch).item())
    return losses, len(fetched)


@pytest.mark.parametrize("flags", FLAGS)
def test_prefetching_does_not_change_the_results(flags):
    plain = run_ranks(2, with_prefetching, flags, 0)
    prefetching = run_ranks(2, with_prefetching, flags, 3)
    for (losses, fetched), (other_losses, none_fetched) in zip(prefetching, plain, strict=True):
        assert losses == other_losses
        assert losses[-1] < losses[0]
        assert none_fetched == 0 < fetched


def train_asynchronously(flags: str) -> None:
    """Train three steps that reduce gradients asynchronously, as on a GPU."""

    class Plugin(gemini.GeminiPlugin):
        def __init__(self, **options):
            super().__init__(**options | {"enable_async_reduce": True})
            self.gemini_config["pin_memory"] = False

    gemini.GeminiPlugin = Plugin
    run = boosted(f"-p gemini -x bf16 -b 2 {flags}")
    torch.compiler.set_stance("force_eager")
    gemini.compile_layers(run.model)
    shards.initialize_weights(run)
    micro_batches = run.job.batch.accumulation_steps
    ids = torch.randint(run.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(3):
        batches = [{"input_ids": ids, "labels": ids}] * micro_batches
        forward_backward(run, batches, 62 * micro_batches * 2)
        optimizer_step(run)


def memory_hazards(flags: str, prefetch: bool, patched: bool) -> list[str]:
    """Return unordered uses of the memory of chunks."""
    memory = stream_order.watch_chunks()
    if not prefetch:
        gemini.prefetched_chunks = lambda *_: 0
    if not patched:
        gemini.allocate_chunks_on_one_stream = lambda model: None
    train_asynchronously(flags)
    return sorted(memory.hazards)


def storage_hazards(flags: str) -> list[str]:
    """Return unordered uses of tensors, and of the memory of freed ones."""
    with stream_order.watch_storages() as storages:
        train_asynchronously(flags)
    return sorted(storages.hazards)


STEPS = [
    "",
    "-g",
    "-g --keep_attention",
    "--accumulation_steps 3",
    "--accumulation_steps 3 --exchange step",
    "--fp8",
    "--fp8 -g --accumulation_steps 3",
]


class TestMemory:
    @pytest.mark.parametrize("prefetch", [True, False])
    @pytest.mark.parametrize("flags", STEPS)
    def test_of_a_chunk_is_not_written_while_it_is_in_use(self, flags, prefetch):
        assert run_ranks(2, memory_hazards, flags, prefetch, True) == [[], []]

    @pytest.mark.parametrize("flags", STEPS)
    def test_of_a_freed_tensor_is_not_taken_while_it_is_in_use(self, flags):
        assert run_ranks(2, storage_hazards, flags) == [[], []]

    def test_is_written_while_in_use_in_gemini_unpatched(self):
        found = run_ranks(2, memory_hazards, "--accumulation_steps 3", False, False)[0]
        assert any("does not wait for a shard copied on stream 1" in hazard for hazard in found)


def figures_of_operations():
    """Return the operation by whose memory each one is planned, in training passes and in evaluations between them.

    Without a GPU there is nothing to measure. The operations' numbers stand for the first pass's measurements, minus so
    much that no chunk has to move.
    """
    run = boosted("-p gemini -b 2")
    shards.initialize_weights(run)
    manager, chunks = run.model.gemini_manager, run.model.chunk_manager
    collector, planned = ChunkMemStatsCollector(chunks), []
    manager._mem_stats_collector = collector
    manager._placement_policy = AutoPlacementPolicy(chunks, collector)
    manager._warmup, manager.pre_iter = False, lambda *_: None
    collector._step_total, less = 1000, 2**50
    collector._memstats._non_model_data_cuda_list = [number - less for number in range(1000)]
    figure = collector.next_period_non_model_data_usage
    collector.next_period_non_model_data_usage = lambda kind: planned[-1].append(figure(kind) + less) or -less
    gemini.reset_memory_plan_each_pass(run.model)
    ids = torch.randint(run.config.vocab_size, (2, 32))
    batch = {"input_ids": ids, "labels": ids}
    for training in (True, False, False, True):
        planned.append([])
        if training:
            forward_backward(run, [batch], 62)
            optimizer_step(run)
            collector._step_total = len(planned[0])
        else:
            forward_loss(run, batch)
    return planned


def test_operations_after_an_evaluation_are_planned_by_their_own_figures():
    first, *evaluations, later = run_ranks(1, figures_of_operations)[0]
    assert first == later == list(range(len(first)))
    for evaluation in evaluations:
        assert evaluation == first[: len(evaluation)]
        assert 0 < len(evaluation) < len(first)


def reported_collection() -> str:
    """Return Gemini's output at the end of the first pass, which records the memory of its operations."""
    run = boosted("-p gemini -b 2")
    collector = run.model.gemini_manager._mem_stats_collector = ChunkMemStatsCollector(run.model.chunk_manager)
    gemini.reset_memory_plan_each_pass(run.model)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        collector.finish_collection()
    assert not collector._start_flag
    return printed.getvalue()


def test_the_number_of_operations_is_not_printed():
    assert run_ranks(1, reported_collection) == [""]


def tracked_memory(flags: str) -> list[int]:
    """Return the bytes that Gemini counts as in use after each of four steps, less moments, which the first makes."""
    run = boosted(f"{flags} -b 2")
    shards.initialize_weights(run)
    manager, found = run.optimizer.chunk_manager, []
    for _ in range(4):
        ids = torch.randint(run.config.vocab_size, (2, 16))
        batches = [{"input_ids": ids, "labels": ids}] * run.job.batch.accumulation_steps
        forward_backward(run, batches, 4 * 15)
        optimizer_step(run)
        found.append(sum(manager.total_mem.values()))
    return found


@pytest.mark.parametrize("flags", ["-p gemini --fp8", "-p gemini --accumulation_steps 2", "-p gemini"])
def test_gemini_counts_no_memory_twice(flags):
    """Automatic placement would move ever more chunks away."""
    for found in run_ranks(2, tracked_memory, flags):
        assert found[1] == found[2] == found[3]


class TestNorm:
    @pytest.mark.parametrize("flags", FLAGS)
    def test_equals_geminis_own(self, flags):
        for ours, theirs in zip(reference(2, flags), run_ranks(2, trained, flags, "own norm"), strict=True):
            assert ours == [(pytest.approx(loss), pytest.approx(norm), skipped) for loss, norm, skipped in theirs]
            assert any(norm > 0.1 for _, norm, _ in ours)  # it clips

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_shows_an_overflow(self, value):
        assert run_ranks(2, overflows, value) == [[False, True], [False, True]]


def overflows(value):
    """Return the overflow of a chunk without and with one such element."""
    run = boosted("-p gemini -x fp16 -b 2")
    chunk = run.model.chunk_manager.get_chunk(next(run.model.unwrap().parameters()))
    seen = []
    for element in (1.0, value):
        chunk.payload.zero_()[0] = element
        seen.append(bool(chunk.has_inf_or_nan))
    return seen


class TestChunks:
    def test_a_small_model_is_sharded_like_a_large_one(self):
        for chunks in run_ranks(2, chunk_sizes):
            assert len(chunks) >= 4
            assert not any(gathered for _, gathered in chunks)
            assert sum(size for size, _ in chunks) == pytest.approx(count_parameters(load_config("test")), rel=0.3)

    def test_one_rank_keeps_the_model_whole(self):
        assert run_ranks(1, chunk_sizes) == [[(count_parameters(load_config("test")), True)]]

    @pytest.mark.parametrize(
        ("flags", "millions"), [("-p gemini", 202.38), ("-p gemini --tp 2", 101.19), ("-p gemini_auto", 33.55)]
    )
    def test_hold_a_layer_of_a_large_model_unless_they_move(self, flags, millions):
        assert run_ranks(4, chunk_options, flags) == [(pytest.approx(millions, rel=1e-3), flags[-1] != "o")] * 4

    def test_an_offloaded_model_is_not_kept_whole(self):
        whole = job("-p gemini")
        assert gemini.keeps_whole(whole)
        assert not gemini.keeps_whole(replace(whole, parallelism=Parallelism("gemini", gpus=2)))
        assert not gemini.keeps_whole(replace(whole, placement=Placement(offload_optim_frac=0.5)))
        assert not gemini.keeps_whole(job("-p gemini_auto"))


def chunk_sizes():
    run = boosted("-p gemini")
    chunks = {run.model.chunk_manager.get_chunk(parameter) for parameter in run.model.unwrap().parameters()}
    return [(chunk.chunk_size, chunk.keep_gathered) for chunk in chunks]


def chunk_options(flags: str) -> tuple[float, int]:
    """Return the parameters in a chunk of 7B, in millions, and the number of chunks to prefetch."""
    options = gemini.build(job(f"-c 7b {flags}")).gemini_config
    return options["min_chunk_size_m"] * 2**20 / 1e6, options["max_prefetch"]
