"""Views of each parameter's float32 master weight and Adam moments, as slices of the full tensor, under any plugin.

Tensor parallelism splits a parameter along one dimension. ZeRO or Gemini flattens each part and splits it into one
contiguous range per rank. `local_shards` describes this rank's state in these two terms under any plugin, so that
initializing, saving and loading are written once, against full tensors in Hugging Face's layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.interface import ModelWrapper
from colossalai.tensor.d_tensor import get_global_shape, get_sharding_spec, is_distributed_tensor
from torch.distributed import ProcessGroup

from engine.boost import Engine
from model_utils import ParameterSpec, initial_weight, plain_name
from runtime.collectives import gather

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class LocalShard:
    """This rank's part of one parameter.

    Attributes:
        spec: name and full shape.
        split_dim: the dimension that tensor parallelism splits, or None.
        tp_group: the tensor-parallel ranks, or None.
        data_group: the ranks whose data differ; each holds a range of the flattened tensor-parallel part, or all of it.
        replicated: True if each of data_group holds all of it.
        start, stop: this rank's range; empty if it holds nothing.
        storage: the optimizer's own float32 tensor, [stop - start] or padded to more.
        adam_state: the optimizer's own state for it, `step` and tensors like `storage`; empty before the first step.
    """

    spec: ParameterSpec
    split_dim: int | None
    tp_group: ProcessGroup | None
    data_group: ProcessGroup
    replicated: bool
    start: int
    stop: int
    storage: torch.Tensor
    adam_state: dict[str, Any]

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    @property
    def tp_shape(self) -> torch.Size:
        """Shape of this rank's tensor-parallel part."""
        shape = list(self.spec.shape)
        if self.split_dim is not None:
            shape[self.split_dim] //= self.tp_size
        return torch.Size(shape)

    def is_writer(self, writer: int) -> bool:
        """Return True on the rank that is 0 in tp_group and, modulo its size, `writer` in data_group."""
        return self.tp_rank == 0 and dist.get_rank(self.data_group) == writer % dist.get_world_size(self.data_group)

    @property
    def gathers_on_gpu(self) -> bool:
        """True if `gather` returns a GPU tensor (NCCL needs one, even for offloaded states)."""
        return self.storage.is_cuda or (torch.cuda.is_available() and dist.get_world_size(self.data_group) > 1)

    def tensor(self, key: str) -> torch.Tensor:
        """Return this rank's range of the master weight or a moment, flat; a view of the optimizer's storage."""
        whole = self.storage if key == MASTER else self.adam_state.get(key)
        whole = torch.zeros_like(self.storage) if whole is None else whole
        return whole.view(-1)[: self.stop - self.start]

    def read(self, full: Any) -> torch.Tensor:
        """Return this rank's range, flat, of a full tensor or safetensors slice; only the rows needed are read."""
        shape = self.tp_shape
        row_size = math.prod(shape[1:])
        first, last = self.start // row_size, -(-self.stop // row_size)
        offset = 0 if self.split_dim is None else self.tp_rank * shape[self.split_dim]
        if self.split_dim == 1:
            rows = full[first:last, offset : offset + shape[1]]
        else:
            rows = full[offset + first : offset + last]
        return rows.reshape(-1)[self.start - first * row_size : self.stop - first * row_size]

    def gather(self, key: str, writer: int) -> torch.Tensor | None:
        """Return the full tensor on the rank that `is_writer` selects, None on the others.

        Collective over the ranks that share the parameter. The result may be the optimizer's own storage; if not, it
        takes the device memory of one tensor.
        """
        part = self.tensor(key)
        writer %= dist.get_world_size(self.data_group)
        if not self.replicated and dist.get_world_size(self.data_group) > 1:
            whole = torch.zeros(self.tp_shape.numel(), dtype=part.dtype, device=get_accelerator().get_current_device())
            whole[self.start : self.stop] = part
            dist.reduce(whole, dist.get_global_rank(self.data_group, writer), group=self.data_group)
            part = whole
        if dist.get_rank(self.data_group) != writer:
            return None
        part = part.view(self.tp_shape)
        is_writer = self.tp_rank == 0
        if self.split_dim is None or self.tp_group is None:
            return part if is_writer else None
        parts = [torch.empty_like(part) for _ in range(self.tp_size)] if is_writer else None
        dist.gather(part.contiguous(), parts, dist.get_global_rank(self.tp_group, 0), group=self.tp_group)
        return torch.cat(parts, dim=self.split_dim) if parts else None


def staging_bytes(shape: torch.Size, pinned: bool) -> int:
    """Return the bytes of host memory for float32 copies of a parameter's master weight and moments.

    A pinned buffer takes a power of two (torch's CachingHostAllocator).
    """
    size = 4 * shape.numel()
    return len((MASTER, *MOMENTS)) * (1 << (size - 1).bit_length() if pinned else size)


def local_shards(engine: Engine) -> list[LocalShard]:
    """Return this rank's part of every trained parameter of its stage, in the model's order, the same on its peers."""
    shards = []
    for name, parameter in engine.model.unwrap(unwrap_peft=False).named_parameters():
        if not parameter.requires_grad:
            continue
        split_dim, shape = None, parameter.shape
        if is_distributed_tensor(parameter):
            (split_dim,) = get_sharding_spec(parameter).dim_partition_dict
            shape = get_global_shape(parameter)
        part = engine.module.local_part(engine.optimizer, parameter)
        shards.append(
            LocalShard(
                spec=ParameterSpec(plain_name(name), torch.Size(shape)),
                split_dim=split_dim,
                tp_group=getattr(engine.plugin, "tp_group", None),
                data_group=getattr(engine.plugin, "mixed_dp_group", dist.group.WORLD),  # type: ignore[arg-type]
                **part._asdict(),
            )
        )
    return shards


def frozen_parameters(model: ModelWrapper) -> dict[str, torch.nn.Parameter]:
    """Return the frozen parameters of this rank's pipeline stage, by name; none is split."""
    parameters = model.unwrap(unwrap_peft=False).named_parameters()
    return {plain_name(name): parameter for name, parameter in parameters if not parameter.requires_grad}


@torch.no_grad()
def initialize_weights(engine: Engine) -> None:
    """Set every weight to its `initial_weight`; each rank sets its own part."""
    device = torch.device(get_accelerator().get_current_device())
    for shard in local_shards(engine):
        if shard.start < shard.stop:
            shard.tensor(MASTER).copy_(shard.read(initial_weight(shard.spec, engine.config, engine.job.seed, device)))
    engine.module.update_working_weights(engine.optimizer)


@torch.no_grad()
def restore(engine: Engine, read: Callable[[str, str], torch.Tensor], adam_steps: int) -> None:
    """Set master weights and Adam moments; each rank sets its own part.

    Args:
        read: returns the full tensor, or a lazy slice of it, for a parameter's name and MASTER or one of MOMENTS.
        adam_steps: number of updates in the moments, for Adam's bias correction; 0: no moments are read.
    """
    for shard in local_shards(engine):
        empty = shard.start >= shard.stop  # the optimizer may still count steps for its padding
        if not empty:
            shard.tensor(MASTER).copy_(shard.read(read(shard.spec.name, MASTER)))
        if adam_steps == 0:
            continue
        shard.adam_state["step"] = adam_steps
        for key in MOMENTS:
            shard.adam_state[key] = torch.zeros_like(shard.storage)
            if not empty:
                shard.tensor(key).copy_(shard.read(read(shard.spec.name, key)))
    engine.module.update_working_weights(engine.optimizer)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return True for a tensor without NaN and infinity; allocates no copy."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def first_not_finite(engine: Engine) -> str | None:
    """Return the first parameter with a NaN or an infinity in its master weights, on any rank. Collective."""
    shards = local_shards(engine)
    own = next((shard.spec.name for shard in shards if not is_finite(shard.tensor(MASTER))), None)
    return next(filter(None, gather(own)), None)
