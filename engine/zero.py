"""The plugins `zero2` and `zero2_cpu`: sharded gradients and optimizer states; `zero2_cpu` has these in host memory."""

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin import LowLevelZeroPlugin
from colossalai.interface import ModelWrapper
from colossalai.zero import LowLevelZeroOptimizer
from colossalai.zero.low_level._utils import all_gather_into_flat_tensor_nd
from transformers import LlamaForCausalLM

from engine.job import Job
from engine.plugin import LocalPart, common_options
from engine.update import reduce_gradients_directly
from model_utils import build_model
from runtime.console import world_size


def build(job: Job) -> LowLevelZeroPlugin:
    """Return LowLevelZeroPlugin at stage 2."""
    return LowLevelZeroPlugin(
        stage=2,
        cpu_offload=job.layout.plugin == "zero2_cpu",
        overlap_communication=torch.cuda.is_available() and world_size() > 1,
        **common_options(job),
    )


def empty_model(job: Job, device: torch.device) -> LlamaForCausalLM:
    """Return the model in working precision on the device, its weights not yet set."""
    return build_model(job.config, device, job.dtype)


def prepare(plugin: LowLevelZeroPlugin, model: ModelWrapper, optimizer: LowLevelZeroOptimizer) -> None:
    """Replace ZeRO's gradient buckets."""
    reduce_gradients_directly(optimizer)


def gradient_ranks(plugin: LowLevelZeroPlugin) -> int:
    """Return the number of ranks over which gradients are averaged."""
    return dist.get_world_size()


def local_part(optimizer: LowLevelZeroOptimizer, parameter: torch.nn.Parameter) -> LocalPart:
    """Return this rank's part of a parameter and its optimizer state."""
    storage = optimizer.working_to_master_param[id(parameter)]
    start = min(dist.get_rank(optimizer.param_to_pg[parameter]) * storage.numel(), parameter.numel())
    stop = min(start + storage.numel(), parameter.numel())
    return LocalPart(start, stop, storage, optimizer.optim.state[storage], replicated=False)


def update_working_weights(optimizer: LowLevelZeroOptimizer) -> None:
    """Copy the master weights, gathered from all ranks, to the working weights."""
    device = get_accelerator().get_current_device()
    for working, padded in optimizer._working_param_to_padded_working_param.items():
        master = optimizer.working_to_master_param[id(working)]
        all_gather_into_flat_tensor_nd(padded, master.to(device, working.dtype), optimizer.param_to_pg[working])
