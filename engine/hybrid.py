"""The plugins `hybrid_parallel`, `3d` and `3d_cpu`: tensor, pipeline and sequence parallelism, and ZeRO."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster.plugin import HybridParallelPlugin, hybrid_parallel_plugin
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.lazy import LazyInitContext
from colossalai.zero import LowLevelZeroOptimizer
from transformers import LlamaForCausalLM

from engine import compilation, float8, zero
from engine.float8 import E4M3
from engine.job import Job
from engine.patching import replace
from engine.plugin import UNPADDED_VOCABULARY, LocalPart, common_options
from engine.plugin import may_evaluate as may_evaluate
from engine.recomputation import checkpoint_layers as checkpoint_layers
from engine.split_layers import OVERLAP, SplitPolicy, split_tokens
from engine.update import Part, update
from engine.zero import GradientReducer
from model_utils import build_model
from runtime.console import world_size


def build(job: Job) -> HybridParallelPlugin:
    """Return HybridParallelPlugin with the job's layout."""
    _keep_model_unwrapped()
    on_gpu, layout = torch.cuda.is_available(), job.layout
    sequence_parallel, interleaved = layout.sp > 1, layout.chunks > 1
    return HybridParallelPlugin(
        tp_size=layout.tp,
        pp_size=layout.pp,
        sp_size=layout.sp,
        zero_stage=layout.zero_stage,
        microbatch_size=layout.microbatch_size,
        enable_sequence_parallelism=sequence_parallel,
        sequence_parallelism_mode="all_to_all" if sequence_parallel else None,
        custom_policy=SplitPolicy() if layout.tp > 1 or sequence_parallel else None,
        overlap_communication=on_gpu and world_size() > 1,
        cpu_offload=bool(layout.traits.on_host),
        make_vocab_size_divisible_by=UNPADDED_VOCABULARY,
        pp_style="interleaved" if interleaved else "1f1b",
        num_model_chunks=layout.chunks,
        enable_metadata_cache=interleaved or not job.length_varies,  # see step._begin_batch
        # The interleaved schedule drops its last send before it has completed, and Gloo then cancels it.
        overlap_p2p=on_gpu,
        **common_options(job),
    )


@functools.cache
def _keep_model_unwrapped() -> None:
    """Leave torch's DistributedDataParallel out of the models that the plugin builds.

    Symptom: without ZeRO, gradients take twice their memory, also with one data-parallel rank, and are summed and
        reduced in the working precision.
    Cause: `configure` builds HybridParallelModule with `use_ddp`; the buckets of DistributedDataParallel are as large
        as all gradients.
    Fix: build it without; the GradientReducer averages over ranks.
    Remove when: HybridParallelPlugin has an option for it.
    """

    class Unwrapped(HybridParallelModule):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"use_ddp": False})

    replace(hybrid_parallel_plugin, "HybridParallelModule", Unwrapped)


def empty_model(job: Job, device: torch.device) -> LlamaForCausalLM:
    """Return the model without storage; the plugin allocates this rank's part."""
    return build_model(job.config, LazyInitContext(default_device=device))


def prepare(job: Job, plugin: HybridParallelPlugin, model: ModelWrapper, optimizer: OptimizerWrapper) -> None:
    """Split tokens over tensor-parallel ranks, reduce gradients by a GradientReducer, and store weights in float8."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        zero.prepare(job, plugin, model, optimizer)
    else:
        trained = filter(lambda parameter: parameter.requires_grad, model.parameters())
        optimizer.reducer = GradientReducer(job, trained, plugin.mixed_dp_group, partitions=False)
        masters = optimizer.working_to_master_map if isinstance(optimizer, MixedPrecisionOptimizer) else {}
        optimizer.stored = float8.store_weights(
            model, lambda weight: weight.new_empty(weight.numel(), dtype=E4M3) if weight in masters else None
        )
    if plugin.tp_size > 1:
        shared = split_tokens(model.unwrap(), plugin.tp_group, _layer_runs(job, plugin))
        optimizer.reducer.sum_over(plugin.tp_group, shared)


def _layer_runs(job: Job, plugin: HybridParallelPlugin) -> list[tuple[int, int]]:
    """Return the first layer, and the last plus one, of each model chunk of this pipeline stage."""
    layers, manager = job.config.num_hidden_layers, plugin.stage_manager
    if manager is None:
        return [(0, layers)]
    index: Any = manager.get_stage_index(manager.distribute_layers(layers))
    return index if manager.is_interleave else [index]


def precision_mixin(optimizer: OptimizerWrapper) -> MixedPrecisionMixin | None:
    """Return ColossalAI's object for mixed precision; None in fp32."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        return zero.precision_mixin(optimizer)
    return optimizer.mixed_precision if isinstance(optimizer, MixedPrecisionOptimizer) else None


def step(optimizer: OptimizerWrapper, rejects: Callable[[float], bool] | None = None) -> float:
    """Clip and update (see `engine.update`); return the gradient norm before clipping, times the loss scale."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        return zero.step(optimizer, rejects)
    reducer = optimizer.reducer
    reducer.finish()
    gradients = {parameter: gradient.view_as(parameter) for parameter, gradient in reducer.reduced.items()}
    reducer.reduced.clear()
    groups, tp_group = filter(None, (optimizer.tp_pg, optimizer.pp_pg)), optimizer.tp_pg
    if not isinstance(optimizer, MixedPrecisionOptimizer):
        parts = [Part(parameter, None, parameter, gradient) for parameter, gradient in gradients.items()]
        return update(optimizer.optim, parts, None, optimizer.max_norm, groups, tp_group, rejects=rejects)
    parts = [
        Part(
            parameter,
            None if parameter in optimizer.stored else parameter.data,
            optimizer.working_to_master_map[parameter],
            gradient,
        )
        for parameter, gradient in gradients.items()
    ]
    precision = optimizer.mixed_precision
    norm = update(optimizer.optim, parts, precision, optimizer.max_norm, groups, tp_group, rejects=rejects)
    _round_weights(optimizer)
    return norm


def _round_weights(optimizer: MixedPrecisionOptimizer) -> None:
    """Set the weights that are stored in float8."""
    masters = optimizer.working_to_master_map
    if optimizer.stored:
        float8.round_weights(
            (whole, masters[weight].view(-1), scale) for weight, (whole, scale) in optimizer.stored.items()
        )


def local_part(optimizer: OptimizerWrapper, parameter: torch.nn.Parameter) -> LocalPart:
    """Return this rank's part of a parameter and its optimizer state."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        return zero.local_part(optimizer, parameter)
    mixed = isinstance(optimizer, MixedPrecisionOptimizer)
    owner = optimizer.working_to_master_map[parameter] if mixed else parameter
    return LocalPart(0, parameter.numel(), owner.data, optimizer.optim.state[owner], replicated=True)


def update_working_weights(optimizer: OptimizerWrapper) -> None:
    """Copy the master weights to the working weights; in fp32 both are the same tensors."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        zero.update_working_weights(optimizer)
    elif isinstance(optimizer, MixedPrecisionOptimizer):
        for working, master in optimizer.working_to_master_map.items():
            if working not in optimizer.stored:
                working.data.copy_(master)
        _round_weights(optimizer)


def compile_layers(model: ModelWrapper) -> None:
    """Compile each decoder layer as a whole, its collective operations beside others."""
    compilation.compile_layers(model, OVERLAP)
