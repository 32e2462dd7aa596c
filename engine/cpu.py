"""Lets ColossalAI train on a machine without a GPU: its plugins, unchanged, on host memory over Gloo.

It goes through ColossalAI's own extension points (`set_accelerator`, `KernelLoader.register_extension`) where it can.
Four things have none: Gemini's memory monitor, which calls torch.cuda directly; Gemini's chunks, which take "cpu" for
the place that they offload to; the names of HCCL, which the pipeline module asks torch for, where torch is built for
CUDA too, and which it no longer has; and `torch.distributed.all_to_all`, which Gloo does not do in torch 2.11. With a
GPU present nothing here is installed.
"""

import contextlib
import resource
import time

import psutil
import torch
import torch.distributed as dist
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.memory_tracer import memory_monitor, memstats_collector


class _SynchronousStream:
    """A stream or event of a device on which every operation has ended when its call returns."""

    def synchronize(self) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def record(self, stream=None) -> None: ...
    def query(self) -> bool:
        return True


class HostAccelerator(CpuAccelerator):
    """Answers for host memory what ColossalAI asks of a GPU. Memory is the process's resident set, in bytes."""

    def __init__(self):
        super().__init__()
        # LowLevelZeroOptimizer and Gemini's chunks admit the names "cuda" and "npu" alone.
        self._name = "npu"

    def current_device(self) -> torch.device:
        return self.get_current_device()

    def set_device(self, device=None) -> None: ...
    def synchronize(self, device=None) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peak_memory_stats(self, device=None) -> None: ...
    def reset_max_memory_allocated(self, device=None) -> None: ...
    def set_stream(self, stream) -> None: ...

    def device_count(self) -> int:
        return 1

    def get_device_name(self, device=None) -> str:
        return "cpu"

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state, device=None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(self, seed) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed) -> None:
        torch.manual_seed(seed)

    def memory_allocated(self, device=None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device=None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def Stream(self, *args, **kwargs):
        return _SynchronousStream()

    def Event(self, *args, **kwargs):
        return _SynchronousStream()

    def current_stream(self, device=None):
        return _SynchronousStream()

    def default_stream(self, device=None):
        return _SynchronousStream()

    def stream(self, stream):
        return contextlib.nullcontext()


class _TorchAdam:
    """The interface of ColossalAI's C++ CPU Adam over torch's fused one (which needs no compiler)."""

    def __init__(self, lr, beta1, beta2, eps, weight_decay, adamw_mode):
        self.update = torch._fused_adamw_ if adamw_mode else torch._fused_adam_

    def step(
        self, step, lr, beta1, beta2, eps, weight_decay, bias_correction, param, grad, exp_avg, exp_avg_sq, loss_scale
    ):
        grad = grad.to(param.dtype)
        if loss_scale > 0:
            grad = grad / loss_scale
        self.update(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(step))],
            amsgrad=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


class _TorchAdamExtension:
    name = "cpu_adam_torch"
    priority = 0
    CPUAdamOptimizer = _TorchAdam

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None: ...

    def load(self):
        return self


class _HostMemoryMonitor(memory_monitor.MemoryMonitor):
    """Reports no device memory to Gemini, whose static placement does not use the figure."""

    def start(self) -> None: ...

    def finish(self) -> int:
        self.time_stamps.append(time.time())
        self.mem_stats.append(0)
        return 0


def _keep_chunks_in_place() -> None:
    """Makes host memory the place where a Gemini chunk computes, with nowhere to offload to."""
    close_chunk = Chunk.close_chunk

    def close_in_place(chunk: Chunk) -> None:
        close_chunk(chunk)
        if not chunk.is_gathered and chunk.cuda_shard is None:
            chunk.cuda_shard, chunk.cpu_shard = chunk.cpu_shard, None

    def stay(chunk: Chunk, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None: ...

    Chunk.close_chunk, Chunk.shard_move = close_in_place, stay


def _all_to_all(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """torch.distributed.all_to_all of tensors of one shape, as one exchange that Gloo does in every version."""
    received = torch.empty_like(together := torch.stack(inputs))
    dist.all_to_all_single(received, together, group=group)
    for output, part in zip(outputs, received, strict=True):
        output.copy_(part)


def install() -> None:
    """Makes host memory ColossalAI's accelerator in this process. Call once, before any plugin is built."""
    set_accelerator(HostAccelerator())
    CPUAdamLoader.register_extension(_TorchAdamExtension)
    _keep_chunks_in_place()
    memory_monitor.SyncCudaMemoryMonitor = memstats_collector.SyncCudaMemoryMonitor = _HostMemoryMonitor
    dist.all_to_all = _all_to_all  # type: ignore[assignment]
    if not hasattr(dist, "is_hccl_available"):
        dist.is_hccl_available, dist.Backend.HCCL = lambda: False, "hccl"  # type: ignore[attr-defined]
