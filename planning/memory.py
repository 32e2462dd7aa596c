"""Estimate of a run's GPU memory by component, before the run starts.

It is pure arithmetic and needs no GPUs or ranks. It counts the tensors that torch keeps when the code runs; tests
compare the two. In formulas, h is the hidden size and f the FFN size.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig

from attn import EAGER
from engine import zero
from engine.compilation import Fusion, choose_fusion
from engine.float8 import converted, stored
from engine.gemini_chunks import (
    chunk_parameters,
    chunk_sizes,
    filled,
    float8_chunks,
    keeps_whole,
    prefetched_chunks,
)
from engine.job import AUTO, STEP, Job, recomputed_layers, reenters
from engine.layout import Layout
from engine.loss import EAGER_LOGITS
from engine.shards import staging_bytes
from model_utils import ParameterSpec, attention_size, parameter_specs, sizes_of, trained_specs
from planning.machines import DryRun, planned_card
from runtime.console import say

FP32 = 4  # bytes
MASTER_AND_MOMENTS = 12  # bytes: float32 master weight and Adam's two moments
USABLE_FRACTION = 0.95  # of a GPU's memory; the rest is lost to fragmentation
CONTEXT_BYTES = 1.5e9  # of CUDA and NCCL
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Phase:
    """The memory of one GPU in a phase of the step, in bytes."""

    name: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class MemoryEstimate:
    """The phases of a step on the fullest GPU, and the host memory that offloading takes, in bytes per GPU."""

    phases: tuple[Phase, ...]
    host: float

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True)
class _State:
    """The memory of one GPU that lasts from step to step, and additions during a step, in bytes."""

    weights: float
    optimizer: float
    gradients: float  # at the end of the backward pass
    reducing: float = 0  # unsharded gradients that reductions still read during the backward pass
    exchange: float = 0  # copies of gradients in the reduction at the end of the backward pass
    gathered: float = 0  # weights of other shards during the loss
    gathered_layers: float = 0  # further ones during the backward pass
    step: float = 0  # temporary, during the optimizer step
    host: float = 0


def stage_specs(config: LlamaConfig, layout: Layout, stage: int) -> list[ParameterSpec]:
    """Return the parameters of one pipeline stage, with the sizes of one GPU's tensor-parallel part."""
    return list(_stage_specs(sizes_of(config), layout.tp, layout.pp, layout.chunks, stage))


@functools.lru_cache(maxsize=1024)
def _stage_specs(
    sizes: tuple[tuple[str, Any], ...], tp: int, pp: int, chunks: int, stage: int
) -> tuple[ParameterSpec, ...]:
    config = LlamaConfig(**dict(sizes))
    per_range = config.num_hidden_layers // (pp * chunks)
    specs = []
    for spec in parameter_specs(config):
        parts = spec.name.split(".")
        if parts[1] == "layers":
            owner = int(parts[2]) // per_range % pp
        else:
            owner = 0 if "embed_tokens" in parts else pp - 1
        if owner == stage:
            split = tp if len(spec.shape) == 2 else 1
            specs.append(ParameterSpec(spec.name, torch.Size([spec.shape.numel() // split])))
    return tuple(specs)


def _fsdp_state(job: Job, specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Return FSDP's state: float32 shards of weights, gradients and moments; root module and two layers gathered."""
    parameters = sum(spec.shape.numel() for spec in specs)
    root = sum(spec.shape.numel() for spec in specs if ".layers." not in spec.name)
    layers = len({spec.group for spec in specs if ".layers." in spec.name})
    return _State(
        weights=FP32 * parameters / shards,
        optimizer=2 * FP32 * parameters / shards,
        gradients=FP32 * parameters / shards,
        gathered=width * root if shards > 1 else 0,
        gathered_layers=2 * width * (parameters - root) / layers if shards > 1 else 0,
    )


def _gemini_state(job: Job, specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Return Gemini's state: chunks of weights and master weights with unused room, and moments.

    Two chunks are gathered at a time, besides those that are prefetched.
    """
    by_name = {spec.name: spec.shape.numel() for spec in specs}
    sizes = list(by_name.values())
    parameters = sum(sizes)
    names, inside, outside = float8_chunks(job, by_name, on_gpu=True)
    in_float8 = filled([size for name, size in by_name.items() if name in names], inside)
    if names:
        others = filled([size for name, size in by_name.items() if name not in names], outside)
    elif keeps_whole(job):
        others = [parameters]
    else:
        others = chunk_sizes(tuple(sizes), chunk_parameters(job), job.config.hidden_size)
    room, chunk = sum(in_float8) + sum(others), max(in_float8 + others)
    unsharded = 1 - job.placement.shard_param_frac
    largest = width * max(others)
    prefetched = prefetched_chunks(job) * (max(in_float8) if names else largest)
    at_update = job.layout.gradient_ranks > 1 and job.exchanges_at_update
    # A gradient overwrites its weight, unless gradients are accumulated or weights are in float8.
    second_chunk = (FP32 if job.accumulates and not at_update else width) * chunk
    kept = FP32 if job.accumulates else width if names else 0
    reduction = FP32 * chunk / shards + (0 if job.reduce_dtype.itemsize == FP32 else width * chunk)
    return _State(
        weights=(width * room - (width - 1) * sum(in_float8)) * (unsharded + (1 - unsharded) / shards),
        optimizer=(FP32 * room + 2 * FP32 * parameters) / shards,
        gradients=kept * room / (1 if at_update else shards),
        exchange=reduction if at_update else 0,
        gathered=max([*in_float8, largest]) + prefetched if shards > 1 else 0,
        gathered_layers=second_chunk + (0 if at_update else _reduced_copy(job, chunk)) if shards > 1 else 0,
        step=2 * FP32 * max(sizes) / shards,  # one parameter at a time
    )


def _zero_state(job: Job, specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Return the state of LowLevelZeroPlugin and HybridParallelPlugin: full weights, the rest by the ZeRO stage."""
    layout, parameters = job.layout, sum(spec.shape.numel() for spec in specs)
    frozen = 0
    if job.adapters is not None:
        frozen, specs = parameters, trained_specs(job.config, job.adapters)
        parameters = sum(spec.shape.numel() for spec in specs)
    sizes = [spec.shape.numel() for spec in specs]
    mixed = width < FP32
    several = layout.gradient_ranks > 1
    kept = FP32 if job.accumulates or (several and job.reduce_dtype.itemsize == FP32) else width
    held = parameters / shards if layout.zero_stage else parameters
    gradients = FP32 * parameters if several and job.exchanges_at_update else kept * held
    by_name = {spec.name: size for spec, size in zip(specs, sizes, strict=True)}
    in_float8 = sum(by_name[name] for name in stored(job, by_name, on_gpu=True))
    large = [size for size in sizes if size >= zero.SMALL]
    in_layers = [size for name, size in by_name.items() if size >= zero.SMALL and ".layers." in name]
    # At the end of the pass, the embeddings' gradient is reduced while those before it may still be; then the small
    # ones, which exist one by one and concatenated.
    small = sum(sizes) - sum(large)
    copies = (3 if layout.zero_stage else 2) * width * small + _reduced_copy(job, small)
    exchange = width * sum(large[: zero.IN_FLIGHT + 1]) + max(_reduced_copy(job, max(large, default=0)), copies)
    in_flight = width * sum(in_layers[-zero.IN_FLIGHT :]) + _reduced_copy(job, max(in_layers, default=0))
    during_pass = several and not job.exchanges_at_update
    return _State(
        weights=width * (frozen + parameters) - (width - 1) * in_float8,
        optimizer=(MASTER_AND_MOMENTS if mixed or layout.zero_stage else 2 * FP32) * held,
        gradients=gradients,
        reducing=in_flight if during_pass else 0,
        exchange=exchange if several else 0,
        # Without ZeRO in fp32, the largest gradient in float64, for its norm.
        step=0 if mixed or layout.zero_stage else 8 * max(sizes),
    )


def _reduced_copy(job: Job, elements: int) -> int:
    """Return the bytes of a copy of so many gradients in the precision of the reduction, if it is another.

    Without ZeRO the copy is what is kept, and counts there. Within a host this is an upper bound: there the copy is of
    gradients as they travel, in the working precision.
    """
    copied = job.layout.zero_stage > 0 and job.layout.gradient_ranks > 1 and job.reduce_dtype != job.dtype
    return job.reduce_dtype.itemsize * elements if copied else 0


_STATES = {"fsdp": _fsdp_state, "gemini": _gemini_state, "zero": _zero_state, "hybrid": _zero_state}


def _state(job: Job, specs: list[ParameterSpec]) -> _State:
    """Return the memory that the plugin keeps for these parameters, less what is offloaded to host memory."""
    layout, placement = job.layout, job.placement
    shards = layout.gradient_ranks // layout.extra_dp
    state = _STATES[layout.traits.module](job, specs, job.dtype.itemsize, shards)
    fractions = {"weights": placement.offload_param_frac, "optimizer": placement.offload_optim_frac}
    fractions |= dict.fromkeys(layout.traits.on_host, 1.0)
    moved = {name: fraction * getattr(state, name) for name, fraction in fractions.items()}
    left = {name: getattr(state, name) - size for name, size in moved.items()}
    if "optimizer" in layout.traits.on_host:  # it is also updated there
        left["step"] = 0.0
    return replace(state, host=sum(moved.values()), **left)


def layer_activations(
    config: LlamaConfig,
    tp: int,
    token_parts: int,
    width: int,
    seq_length: int,
    fused: Fusion = Fusion.NONE,
    fp8: bool = False,
) -> float:
    """Return the bytes per token that one decoder layer keeps for the backward pass.

    Tensors of hidden size: each RMSNorm's input in float32, its normalised and its scaled output. Tensors of
    `attention_size`, mostly the same: query, key and value, the latter two repeated to the number of heads; the
    attention's output twice, for the kernel and for the projection. Tensors of FFN size: gate, its activation, up, and
    their product. Together they take 26 h + 8 f in half precision.
    Compiled pieces keep a norm's input in working precision and no activation: 22 h + 6 f. A compiled layer keeps no
    normalised output either: 18 h + 6 f. In float8 it also computes again what linear layers take as input, from what
    other operations keep: 12 h + 4 f. Plain attention also keeps its weights, in float32 and in working precision.
    The method is from Korthikanti et al. 2022 (arXiv:2205.05198), section 4.

    Args:
        token_parts: see `Layout`.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    norm = {Fusion.NONE: FP32 + 2 * width, Fusion.PIECES: 3 * width, Fusion.LAYERS: 2 * width}
    norms = 2 * norm[fused] * hidden
    attention = 5 * width * attention_size(config)
    tensors = 4 if fused is Fusion.NONE else 3  # of FFN size
    if fp8 and fused is Fusion.LAYERS:
        norms, attention, tensors = 2 * width * hidden, 4 * width * attention_size(config), 2
        if token_parts > 1:  # inputs that are exchanged, or multiplied meanwhile, are kept in float8
            norms, attention = norms + 2 * hidden, attention + attention_size(config)
    if config._attn_implementation == EAGER:
        attention += (FP32 + width) * config.num_attention_heads * seq_length
    return norms / token_parts + (attention + tensors * width * ffn) / tp


def estimate_memory(job: Job) -> MemoryEstimate:
    """Return the memory of the fullest GPU of a job, whose ranks need not exist.

    Not counted: CUDA's context, buffers of communication, and fragmentation.
    """
    stages = [_stage_estimate(job, stage) for stage in range(job.layout.pp)]
    return max(stages, key=lambda estimate: estimate.peak.total)


def _stage_estimate(job: Job, stage: int) -> MemoryEstimate:
    config, layout, batch, keep_attention = job.config, job.layout, job.batch, job.compute.keep_attention
    state = _state(job, stage_specs(config, layout, stage))
    width = job.dtype.itemsize
    hidden, ffn, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size

    sequences = batch.batch_size
    in_flight: float = 1
    if layout.pp > 1:  # 1F1B: the last stage holds one microbatch, each stage before it one more
        sequences = layout.microbatch_size
        warm_up: float = layout.pp - stage
        if layout.chunks > 1:  # InterleavedSchedule counts passes through one range of layers
            warm_up = (2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp + 1) / layout.chunks
        in_flight = min(warm_up, batch.sequences // sequences)
    tokens = sequences * batch.max_length / layout.sp
    layers = config.num_hidden_layers // layout.pp
    fused = choose_fusion(job, on_gpu=True)
    fp8 = job.compute.fp8 and converted(job, on_gpu=True)[0] > 0
    layer = tokens * layer_activations(config, layout.tp, layout.token_parts, width, batch.max_length, fused, fp8)
    all_recomputed = recomputed_layers(config.num_hidden_layers, job.recomputed)
    recomputed = len(all_recomputed) // layout.pp
    kept = tokens * width * hidden / layout.token_parts if all_recomputed else layer
    if keep_attention:  # its output, and the log-sum-exp of its scores
        kept += tokens * (width * attention_size(config) + FP32 * config.num_attention_heads) / layout.tp
    last = stage == layout.pp - 1
    final_norm = tokens / layout.token_parts * (FP32 + 2 * width) * hidden if last else 0
    activations = in_flight * (recomputed * kept + (layers - recomputed) * layer)
    # The outputs of all ranges of layers but the model's last wait for the gradients that will come back.
    activations += in_flight * (layout.chunks - last) * tokens * width * hidden if layout.pp > 1 else 0
    # In the last layer's backward: recomputed activations, gradients of its output and of the FFN's inner values.
    working = max(tokens * width * (hidden + 2 * ffn / layout.tp), _deterministic_attention(job, sequences, tokens))
    working += layer if all_recomputed else 0
    if all_recomputed and fused is Fusion.LAYERS:  # measured; kept attention's inputs follow the FFN's gradients
        working += (-3 if keep_attention else 2) * tokens * width * hidden
    if config._attn_implementation == EAGER:
        working += 2 * FP32 * tokens * config.num_attention_heads / layout.tp * batch.max_length
    # The gradient is written over the logits. Eagerly a part of them exists in float32 too, with their exponentials.
    own_logits = tokens * vocabulary / layout.tp if last else 0
    eager = min(own_logits, EAGER_LOGITS) if fused is Fusion.NONE else 0
    logits = width * own_logits
    in_float32 = (FP32 + (FP32 if width < FP32 else 0)) * eager
    # With split tokens, every rank's parts, and the gathered input of the last product.
    output_gradient = (1 if layout.token_parts == 1 else 2) * tokens * width * hidden if last else 0
    head_gradient = width * hidden * vocabulary / layout.tp if last else 0

    weights = state.weights + state.gathered
    backward_weights = weights + state.gathered_layers
    optimizer = state.optimizer
    all_gradients = state.gradients
    # A tied weight's gradients by both its uses wait for each other, and their sum is a third tensor.
    uses = 2 * width * hidden * vocabulary / layout.tp if config.tie_word_embeddings else 0
    at_end = all_gradients + state.reducing + uses
    accumulated = state.gradients if job.accumulates else 0
    first = max(accumulated, min(head_gradient, state.gradients)) + min(head_gradient, state.reducing)
    phases = [
        Phase("the loss", weights, accumulated, optimizer, activations + final_norm, logits + in_float32),
        Phase("the output's gradients", weights, first, optimizer, activations + final_norm + output_gradient, logits),
        Phase("the last layer's backward", backward_weights, first, optimizer, activations + working),
        Phase("the end of the backward pass", backward_weights, at_end, optimizer, kept + working),
    ]
    if state.exchange:
        exchanged = all_gradients + state.exchange + uses
        phases.append(Phase("the exchange of gradients", state.weights, exchanged, optimizer))
    phases.append(Phase("the optimizer step", state.weights, all_gradients + state.step, optimizer))
    return MemoryEstimate(tuple(phases), state.host)


def _deterministic_attention(job: Job, sequences: int, tokens: float) -> float:
    """Return the bytes of the backward pass of a layer's fused attention if it is deterministic, else 0.

    Beside the gradients of its output and inputs, flash-attn's kernel (mha_bwd in its flash_api.cpp) then keeps several
    float32 sums of the queries' gradient, so that together they occupy all multiprocessors.
    """
    config, layout = job.config, job.layout
    if not job.compute.deterministic or config._attn_implementation == EAGER:
        return 0.0
    heads = config.num_attention_heads / layout.tp
    sums = math.ceil(MULTIPROCESSORS / (sequences * heads / layout.sp))
    return tokens * heads * config.head_dim * (4 * job.dtype.itemsize + FP32 * sums)


def settle(job: Job, dry_run: DryRun) -> Job:
    """Return the job with the choices made that depend on the GPU's memory: `--recompute auto`, `--exchange auto`."""
    if dry_run.dry_run:
        memory = planned_card(dry_run).memory_gb * 1e9
    elif torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = math.inf
    settled = settle_for(job, memory)
    if job.compute.recompute is None:
        say(f"recomputation: {_describe_recomputation(settled, memory)}")
    return settled


def usable(memory: float) -> float:
    """Return the bytes of a GPU's memory that tensors may take."""
    return memory * USABLE_FRACTION - CONTEXT_BYTES


def settle_for(job: Job, memory: float) -> Job:
    """Return the job with these choices made for GPUs of so many bytes."""
    return _settle_exchange(_settle_recomputation(job, memory), memory)


def _settle_exchange(job: Job, memory: float) -> Job:
    """Return the job that exchanges gradients once a step if its memory fits by the estimate; for `--exchange auto`."""
    once = replace(job, exchange=replace(job.exchange, exchange=STEP))
    several = job.layout.gradient_ranks > 1
    if job.exchange.exchange != AUTO or not (several and job.accumulates) or once.problems():
        return job
    return once if estimate_memory(once).peak.total <= usable(memory) else job


def _settle_recomputation(job: Job, memory: float) -> Job:
    """Return the job with the least recomputation that fits by the estimate; only for `--recompute auto`.

    Attention's output is kept while there is room: recomputing one layer less takes more memory for the time it saves.
    """
    if job.compute.recompute is not None:
        return job
    if memory == math.inf:
        return replace(job, compute=replace(job.compute, recompute=0.0))
    layers = job.config.num_hidden_layers
    keeps = job.config._attn_implementation != EAGER and not reenters(job.layout)
    choices = [(count, keeps and count > 0) for count in range(layers + 1)]
    if keeps and not job.compute.keep_attention:
        choices.append((layers, False))
    for count, keep_attention in choices:
        job = replace(job, compute=replace(job.compute, recompute=count / layers, keep_attention=keep_attention))
        if estimate_memory(job).peak.total <= usable(memory):
            break
    return job


def _describe_recomputation(job: Job, memory: float) -> str:
    if memory == math.inf:
        return "none, since there is no GPU"
    peak, layers = estimate_memory(job).peak.total, job.config.num_hidden_layers
    warning = "" if peak <= usable(memory) else ", which will not be enough"
    extent = f"{len(recomputed_layers(layers, job.recomputed))} of {layers} layers"
    extent += " except attention" if job.compute.keep_attention else ""
    return f"{extent}, {peak / 1e9:.1f} GB at the peak of {memory / 1e9:.1f} GB{warning}"


def checkpoint_memory(job: Job) -> tuple[int, int, int]:
    """Return bytes of host memory: of a save on the rank that writes most and on all ranks, and of a load on a rank.

    A save keeps pinned copies of the master weights and moments. Ranks write the parts of the model in turn (see
    `LocalShard.is_writer`). A load reads one tensor after the other.
    """
    layout, by_rank = job.layout, Counter[tuple[int, int]]()
    specs = trained_specs(job.config, job.adapters)
    writers = layout.dp * layout.sp
    pinned = writers > 1 or not layout.traits.on_host
    positions = {group: number for number, group in enumerate(dict.fromkeys(spec.group for spec in specs))}
    stages = {spec.group: stage for stage in range(layout.pp) for spec in stage_specs(job.config, layout, stage)}
    for spec in specs:
        by_rank[stages[spec.group], positions[spec.group] % writers] += staging_bytes(spec.shape, pinned)
    largest = max(spec.shape.numel() for spec in specs)
    return max(by_rank.values()), by_rank.total(), FP32 * largest // layout.tp
