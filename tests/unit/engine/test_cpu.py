"""ColossalAI without a GPU, after `cpu.install`, in separate processes."""

import pytest
import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.shardformer.layer._operation import all_to_all_comm
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.memory_tracer import memory_monitor, memstats_collector

from engine import shards
from processes import boosted, run_ranks

pytestmark = pytest.mark.slow


def test_importing_changes_nothing():
    assert get_accelerator().name == ("cuda" if torch.cuda.is_available() else "cpu")
    assert [extension.__name__ for extension in CPUAdamLoader.REGISTRY] == [
        "CpuAdamX86Extension",
        "CpuAdamArmExtension",
    ]
    assert Chunk.close_chunk.__module__ == Chunk.shard_move.__module__ == "colossalai.zero.gemini.chunk.chunk"
    assert memstats_collector.SyncCudaMemoryMonitor.__module__ == memory_monitor.__name__


class TestAccelerator:
    def test_is_the_host(self):
        run_ranks(1, check_accelerator)

    @pytest.mark.parametrize("built_for_cuda", [False, True])
    def test_pipeline_stages_use_gloo(self, built_for_cuda):
        assert run_ranks(2, pipeline_device, built_for_cuda) == [(torch.device("cpu"), False)] * 2

    @pytest.mark.parametrize("sequences", [1, 3])
    def test_exchanges_without_lists(self, sequences):
        """Exchange all heads at part of the positions for part of the heads at all positions, and back."""
        whole = torch.arange(sequences * 8 * 4.0).view(sequences, 8, 4)  # [B, positions, heads]
        for rank, (received, gradient) in enumerate(run_ranks(2, exchanged, whole)):
            assert torch.equal(received, whole.chunk(2, dim=2)[rank])
            assert torch.equal(gradient, whole.chunk(2, dim=1)[rank])


def check_accelerator():
    accelerator = get_accelerator()
    assert accelerator.name in ("cuda", "npu")  # the two that LowLevelZero and Gemini accept
    assert accelerator.get_current_device() == accelerator.current_device() == torch.device("cpu")
    assert accelerator.communication_backend == dist.get_backend() == "gloo"
    assert (accelerator.device_count(), accelerator.get_device_name()) == (1, "cpu")

    accelerator.manual_seed(3)
    state = accelerator.get_rng_state()
    drawn = torch.rand(2)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(2), drawn)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)

    before = accelerator.memory_allocated()
    held = torch.ones(2**24)
    assert 0.9 * held.nbytes < accelerator.memory_allocated() - before < 1.5 * held.nbytes
    peak = before + 0.9 * held.nbytes
    del held
    assert accelerator.max_memory_allocated() > peak

    with accelerator.stream(accelerator.Stream()):
        event = accelerator.Event()
        event.record(accelerator.current_stream())
        accelerator.default_stream().wait_event(event)
        accelerator.synchronize()


def pipeline_device(built_for_cuda):
    from colossalai.pipeline.p2p import _check_device

    dist.distributed_c10d.is_nccl_available = lambda: built_for_cuda
    return _check_device(dist.group.WORLD)


def exchanged(whole):
    """Return this rank's tensor after the exchange, and its gradient: the same tensor exchanged back."""
    dist.ProcessGroup.alltoall = None  # as in torch 2.11 with Gloo
    mine = whole.chunk(2, dim=1)[dist.get_rank()].clone().requires_grad_()
    received = all_to_all_comm(mine, dist.group.WORLD, scatter_dim=2, gather_dim=1)
    received.backward(received.detach())
    return received.detach(), mine.grad


class TestAdam:
    @pytest.mark.parametrize("adamw_mode", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_equals_pytorch_over_several_steps(self, adamw_mode, dtype):
        assert run_ranks(1, adam_difference, adamw_mode, dtype)[0] < 1e-6


def adam_difference(adamw_mode, dtype):
    """Return the largest difference from torch's own optimizer after five steps with various scales and rates."""
    options = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    extension = CPUAdamLoader().load()
    adam = extension.CPUAdamOptimizer(0.1, 0.9, 0.95, 1e-8, 0.1, adamw_mode)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator)
    moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
    expected = torch.nn.Parameter(weight.clone())
    optimizer = (torch.optim.AdamW if adamw_mode else torch.optim.Adam)([expected], **options)
    for step, (scale, lr) in enumerate([(-1, 0.1), (1.0, 0.1), (64.0, 0.05), (0.5, 0.02), (-1, 0.01)], start=1):
        gradient = torch.randn(1000, generator=generator).to(dtype)
        before = gradient.clone()
        adam.step(step, lr, 0.9, 0.95, 1e-8, 0.1, True, weight, gradient, *moments, scale)
        assert torch.equal(gradient, before)
        optimizer.param_groups[0]["lr"] = lr
        expected.grad = before.float() / (scale if scale > 0 else 1)
        optimizer.step()
    return (weight - expected).abs().max().item()


class TestChunks:
    def test_stay_on_the_device(self):
        for sharded, host_copies in run_ranks(2, chunk_places):
            assert sharded >= 4
            assert host_copies == 0


def chunk_places():
    """Return the number of chunks, and how many have an offloaded shard after being gathered and released."""
    run = boosted("-p gemini")
    shards.initialize_weights(run)
    model = run.model
    chunks = {model.chunk_manager.get_chunk(parameter) for parameter in model.unwrap().parameters()}
    for chunk in chunks:
        before = chunk.cuda_shard.clone()
        chunk.shard_move(torch.device("cpu"))
        chunk.access_chunk()
        assert chunk.is_gathered
        chunk.release_chunk()
        assert torch.equal(chunk.cuda_shard, before)
    return len(chunks), sum(chunk.cpu_shard is not None for chunk in chunks)
