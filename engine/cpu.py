"""Support for ColossalAI's plugins without a GPU: in host memory, over Gloo.

Most of it uses ColossalAI's own extension points (`set_accelerator`, `KernelLoader.register_extension`); patches do the
rest. With a GPU none of this is installed.
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
from colossalai.pipeline import p2p
from colossalai.shardformer.layer import _operation
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.memory_tracer import memory_monitor, memstats_collector

from engine.patching import replace


class _SynchronousStream:
    """A stream or event of a device on which every call is synchronous."""

    def synchronize(self) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def record(self, stream=None) -> None: ...
    def query(self) -> bool:
        return True


class HostAccelerator(CpuAccelerator):
    """Host memory as a device. Memory figures are the process's resident set, in bytes."""

    def __init__(self):
        super().__init__()
        # LowLevelZeroOptimizer and Gemini's chunks accept only the names "cuda" and "npu".
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
    """torch's fused Adam with the interface of ColossalAI's C++ Adam; it needs no compiler."""

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
    """A monitor that reports no device memory to Gemini; static placement does not use the figure."""

    def start(self) -> None: ...

    def finish(self) -> int:
        self.time_stamps.append(time.time())
        self.mem_stats.append(0)
        return 0


def _monitor_host_memory() -> None:
    """Replace Gemini's memory monitor.

    Symptom: Gemini's memory statistics fail without CUDA.
    Cause: SyncCudaMemoryMonitor calls torch.cuda directly.
    Fix: a monitor that reports 0 bytes.
    Remove when: the monitor calls the accelerator.
    """
    replace(memstats_collector, "SyncCudaMemoryMonitor", _HostMemoryMonitor)


def _keep_chunks_in_place() -> None:
    """Keep Gemini's chunks where they compute.

    Symptom: Gemini fails when it accesses a sharded chunk.
    Cause: a chunk treats the device type "cpu" as its offload target, and moves its shard there.
    Fix: `close_chunk` records the shard as being on the device, and `shard_move` does nothing.
    Remove when: chunks compare devices with the accelerator's.
    """
    close = Chunk.close_chunk

    def close_chunk(self: Chunk) -> None:
        close(self)
        if not self.is_gathered and self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    def shard_move(self: Chunk, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None: ...

    replace(Chunk, "close_chunk", close_chunk)
    replace(Chunk, "shard_move", shard_move)


def _exchange_without_lists() -> None:
    """Let sequence-parallel ranks exchange several sequences over Gloo.

    Symptom: sequence parallelism with more than one sequence fails: Gloo has no all-to-all of lists in torch 2.11.
    Cause: `_all_to_all` calls torch.distributed.all_to_all.
    Fix: stack the parts and exchange them with all_to_all_single, which Gloo has in every version.
    Remove when: torch 2.11 is no longer supported.
    """

    def all_to_all(
        tensor: torch.Tensor, ranks: int, group: dist.ProcessGroup, scatter_dim: int, gather_dim: int, **fp8: object
    ) -> torch.Tensor:
        sent = torch.stack(tensor.tensor_split(ranks, scatter_dim))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), dim=gather_dim)

    replace(_operation, "_all_to_all", all_to_all)


def _let_stages_use_gloo() -> None:
    """Let pipeline stages communicate over Gloo.

    Symptom: pipeline parallelism fails with an AttributeError for `is_hccl_available` or `HCCL`.
    Cause: `_check_for_nccl_hccl_backend` uses names that only torch's Ascend builds have.
    Fix: it returns False, since the backend is Gloo.
    Remove when: ColossalAI checks only the backend's name.
    """
    replace(p2p, "_check_for_nccl_hccl_backend", lambda group: False)


def install() -> None:
    """Make host memory ColossalAI's accelerator in this process. Call once, before a plugin is built."""
    set_accelerator(HostAccelerator())
    CPUAdamLoader.register_extension(_TorchAdamExtension)
    _monitor_host_memory()
    _keep_chunks_in_place()
    _exchange_without_lists()
    _let_stages_use_gloo()
