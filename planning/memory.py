"""Memory that a run takes of a GPU, by component, before it is started.

It is arithmetic alone and needs neither the GPUs nor the ranks. T stands for the tokens that a GPU works on at once
(B x S, microbatches in a pipeline, split by sequence parallelism), L for layers, h for the hidden size, f for the FFN
size, V for the vocabulary, P for the parameters on a GPU (split by tensor and pipeline parallelism) and N for the GPUs
over which ZeRO shards. The formulas count what torch keeps in the code that runs; tests compare them with it.
"""

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig

from attn import EAGER
from engine import gemini, update
from engine.compilation import Fusion, choose_fusion
from engine.job import Job, recomputed_layers, reenters
from engine.layout import GEMINI_PLUGINS, Layout
from model_utils import ParameterSpec, parameter_specs, trained_specs
from planning.cards import DryRun, planned_card
from runtime.console import say

FP32 = 4  # bytes
MASTER_AND_MOMENTS = 12  # bytes: float32 master weight and Adam's two moments
USABLE_FRACTION = 0.95  # of a GPU's memory; the rest is lost to fragments
CONTEXT_BYTES = 1.5e9  # of CUDA and NCCL


@dataclass(frozen=True)
class Phase:
    """The memory of a GPU in one phase of a step, in bytes."""

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
    """The phases of a step on the fullest GPU, and what is offloaded to host memory, in bytes a GPU."""

    phases: tuple[Phase, ...]
    host: float

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True)
class _State:
    """What lasts from step to step on one GPU, and what a step adds to it, in bytes."""

    weights: float
    optimizer: float
    gradients: float  # at the end of the backward pass
    buckets: float = 0  # for the exchange of gradients, kept for good
    under_way: float = 0  # whole gradients that the exchange beside the backward pass reads
    exchange: float = 0  # copies of the gradients that are being exchanged
    gathered: float = 0  # weights of other shards that are at hand for the loss
    gathered_layers: float = 0  # and more in the backward pass
    step: float = 0  # beside the gradients, in the optimizer step
    host: float = 0


def stage_specs(config: LlamaConfig, layout: Layout, stage: int) -> list[ParameterSpec]:
    """The parameters of one pipeline stage, as large as tensor parallelism leaves them on a GPU."""
    per_range = config.num_hidden_layers // (layout.pp * layout.chunks)
    specs = []
    for spec in parameter_specs(config):
        parts = spec.name.split(".")
        if parts[1] == "layers":
            here = int(parts[2]) // per_range % layout.pp == stage
        else:
            here = stage == (0 if "embed_tokens" in parts else layout.pp - 1)
        if here:
            split = layout.tp if len(spec.shape) == 2 else 1
            specs.append(ParameterSpec(spec.name, torch.Size([spec.shape.numel() // split])))
    return specs


def _state(job: Job, specs: list[ParameterSpec]) -> _State:
    """What the plugin keeps of these parameters."""
    width, layout = job.dtype.itemsize, job.layout
    shards = layout.dp * layout.sp // layout.extra_dp
    if layout.plugin.startswith("fsdp"):
        return _offloaded(_fsdp_state(specs, width, shards), job)
    if layout.plugin in GEMINI_PLUGINS:
        return _offloaded(_gemini_state(job, specs, width, shards), job)
    return _offloaded(_zero_state(job, specs, width, shards), job)


def _fsdp_state(specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Float32 shards of weights, gradients and moments; the outermost module and two layers gathered."""
    parameters = sum(spec.shape.numel() for spec in specs)
    outside = sum(spec.shape.numel() for spec in specs if ".layers." not in spec.name)
    layers = len({spec.group for spec in specs if ".layers." in spec.name})
    return _State(
        weights=FP32 * parameters / shards,
        optimizer=2 * FP32 * parameters / shards,
        gradients=FP32 * parameters / shards,
        gathered=width * outside if shards > 1 else 0,
        gathered_layers=2 * width * (parameters - outside) / layers if shards > 1 else 0,
    )


def _gemini_state(job: Job, specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Chunks of weights and master weights, not quite full, and moments; gathered two chunks, and a layer ahead."""
    sizes = [spec.shape.numel() for spec in specs]
    parameters = sum(sizes)
    chunks = [parameters]
    if not gemini.keeps_whole(job):
        chunks = gemini.chunk_sizes(tuple(sizes), gemini.chunk_parameters(job), job.config.hidden_size)
    room, chunk = sum(chunks), max(chunks)
    whole = 1 - job.placement.shard_param_frac
    ahead = gemini.prefetched_chunks(job) * chunk
    return _State(
        weights=width * room * (whole + (1 - whole) / shards),
        optimizer=(FP32 * room + 2 * FP32 * parameters) / shards,
        # Gradients take the place of the weights that they are of, unless several backward passes add to them.
        gradients=width * room / shards if job.batch.accumulation_steps > 1 else 0,
        gathered=width * (chunk + ahead) if shards > 1 else 0,
        gathered_layers=width * chunk if shards > 1 else 0,
        step=2 * FP32 * max(sizes) / shards,  # one parameter at a time
    )


def _zero_state(job: Job, specs: list[ParameterSpec], width: int, shards: int) -> _State:
    """Of LowLevelZeroPlugin and HybridParallelPlugin: whole weights, shards of the rest as the stage says."""
    layout, parameters = job.layout, sum(spec.shape.numel() for spec in specs)
    frozen = 0
    if getattr(job.config, "lora", None) is not None:
        frozen, specs = parameters, trained_specs(job.config)
        parameters = sum(spec.shape.numel() for spec in specs)
    largest = max(spec.shape.numel() for spec in specs)
    # HybridParallelPlugin adds torch's DistributedDataParallel, whose buckets are as large as all gradients.
    replicated = layout.zero_stage == 0 or (layout.is_hybrid and layout.dp == 1)
    common = dict(
        weights=width * (frozen + parameters),
        buckets=width * parameters if replicated and layout.pp == 1 else 0,
    )
    if layout.zero_stage == 0:
        mixed = width < FP32
        return _State(
            optimizer=(MASTER_AND_MOMENTS if mixed else 2 * FP32) * parameters,
            gradients=width * parameters,
            step=0 if mixed else 8 * largest,  # the norm of the largest in float64
            **common,
        )
    # At the end of the pass the small ones together in three copies.
    together = sum(spec.shape.numel() for spec in specs if spec.shape.numel() < update.SMALL)
    exchange = 3 * width * together if shards > 1 else 0
    in_layers = [spec.shape.numel() for spec in specs if ".layers." in spec.name]
    large = [size for size in in_layers if size >= update.SMALL]
    under_way = width * sum(large[-update.IN_FLIGHT :]) if shards > 1 else 0
    gradients = width * parameters / (shards if layout.zero_stage == 2 else 1)
    return _State(
        optimizer=MASTER_AND_MOMENTS * parameters / shards,
        gradients=gradients,
        under_way=under_way,
        exchange=exchange,
        **common,
    )


def _offloaded(state: _State, job: Job) -> _State:
    """The same state with what the plugin and its flags keep in host memory moved there."""
    if job.layout.plugin == "fsdp_cpu":
        host = state.weights + state.optimizer + state.gradients
        return replace(state, weights=0, optimizer=0, gradients=0, step=0, host=host)
    if job.layout.plugin in ("zero2_cpu", "3d_cpu"):
        return replace(state, optimizer=0, step=0, host=state.optimizer)
    if job.layout.plugin == "gemini_auto":  # it offloads weights too only where nothing else helps
        return replace(state, optimizer=0, step=0, host=state.optimizer)
    optimizer = state.optimizer * job.placement.offload_optim_frac
    weights = state.weights * job.placement.offload_param_frac
    return replace(
        state, weights=state.weights - weights, optimizer=state.optimizer - optimizer, host=optimizer + weights
    )


def layer_activations(config: LlamaConfig, tp: int, width: int, seq_length: int, fused: Fusion = Fusion.NONE) -> float:
    """Bytes a token that one decoder layer keeps for the backward pass.

    Of hidden size: each RMSNorm's input in float32, its normalised and its scaled output; query, key and value, as many
    as there are heads; the attention's output twice, as the kernel and the projection see it. Of FFN size: gate, its
    activation, up, their product. In half precision 26 h + 8 f. Compiled pieces keep a norm's input as it is and do
    without the activation, 22 h + 6 f; a compiled layer does without the normalised output too, 18 h + 6 f. Plain
    attention keeps its weights in float32 and in working precision besides. The method is that of Korthikanti et al.
    2022 (arXiv:2205.05198), section 4.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    norm = {Fusion.NONE: FP32 + 2 * width, Fusion.PIECES: 3 * width, Fusion.LAYERS: 2 * width}
    norms = 2 * norm[fused] * hidden
    attention = 5 * width * hidden
    if config._attn_implementation == EAGER:
        attention += (FP32 + width) * config.num_attention_heads * seq_length
    return norms + (attention + (4 if fused is Fusion.NONE else 3) * width * ffn) / tp


def estimate_memory(job: Job) -> MemoryEstimate:
    """Return the memory of the fullest GPU of a job, whose ranks need not exist.

    Not counted: CUDA's context, NCCL's buffers, and fragmentation.
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
    if layout.pp > 1:  # 1F1B: the first stage has passed on as many microbatches as there are stages
        sequences = layout.microbatch_size
        ahead: float = layout.pp - stage
        if layout.chunks > 1:  # in passes through one of its ranges of layers (InterleavedSchedule's warm-up)
            ahead = (2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp + 1) / layout.chunks
        in_flight = min(ahead, batch.sequences // sequences)
    tokens = sequences * batch.max_length / layout.sp
    layers = config.num_hidden_layers // layout.pp
    fused = choose_fusion(job, on_gpu=True)
    layer = tokens * layer_activations(config, layout.tp, width, batch.max_length, fused)
    twice = recomputed_layers(config.num_hidden_layers, job.recomputed)
    recomputed = len(twice) // layout.pp
    kept = tokens * width * hidden if twice else layer
    if keep_attention:  # and the logarithms of its sums
        kept += tokens * (width * hidden + FP32 * config.num_attention_heads) / layout.tp
    last = stage == layout.pp - 1
    final_norm = tokens * (FP32 + 2 * width) * hidden if last else 0
    activations = in_flight * (recomputed * kept + (layers - recomputed) * layer)
    # In the backward pass of the last layer: what it recomputes, gradients of its output and of the FFN's inner values.
    working = (layer if twice else 0) + tokens * width * (hidden + 2 * ffn / layout.tp)
    if twice and fused is Fusion.LAYERS:  # measured; where attention is kept, its inputs come after the FFN's gradients
        working += (-3 if keep_attention else 2) * tokens * width * hidden
    if config._attn_implementation == EAGER:
        working += 2 * FP32 * tokens * config.num_attention_heads / layout.tp * batch.max_length
    # Log-probabilities, their gradient and that of the logits, all in float32; the logits themselves are gone by then.
    # Compiled, the logits and their gradient are all that lies in memory; the vocabulary-parallel loss is not compiled.
    each = 3 * FP32 if fused is Fusion.NONE or layout.tp > 1 else 2 * width
    logits = tokens * each * vocabulary / layout.tp if last else 0
    head_gradient = width * hidden * vocabulary / layout.tp if last else 0

    weights = state.weights + state.gathered
    backward_weights = weights + state.gathered_layers
    optimizer = state.optimizer
    all_gradients = state.buckets + state.gradients
    at_end = all_gradients + state.under_way
    earlier = state.gradients if batch.accumulation_steps > 1 or layout.pp > 1 else 0
    first = state.buckets + max(earlier, min(head_gradient, state.gradients)) + min(head_gradient, state.under_way)
    phases = [
        Phase("the loss", weights, state.buckets + earlier, optimizer, activations + final_norm, logits),
        Phase("the last layer's backward", backward_weights, first, optimizer, activations + working),
        Phase("the end of the backward pass", backward_weights, at_end, optimizer, kept + working),
    ]
    if state.exchange:
        phases.append(Phase("the exchange of gradients", state.weights, all_gradients + state.exchange, optimizer))
    phases.append(Phase("the optimizer step", state.weights, all_gradients + state.step, optimizer))
    return MemoryEstimate(tuple(phases), state.host)


def settle_recomputation(job: Job, dry_run: DryRun) -> Job:
    """Return the job with the least recomputation with which the estimate fits, where it is still open; say which.

    As long as there is room for the output of attention it is kept: computing one more layer once takes more memory for
    the time that it saves.
    """
    if job.compute.recompute is not None:
        return job
    if dry_run.dry_run:
        memory = planned_card(dry_run).memory_gb * 1e9
    elif torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        say("recomputation: none, there is no GPU memory to fit into")
        return replace(job, compute=replace(job.compute, recompute=0.0))
    room = memory * USABLE_FRACTION - CONTEXT_BYTES
    layers = job.config.num_hidden_layers
    keeps = job.config._attn_implementation != EAGER and not reenters(job.layout)
    choices = [(count, keeps and count > 0) for count in range(layers + 1)]
    if keeps and not job.compute.keep_attention:
        choices.append((layers, False))
    for count, keep_attention in choices:
        job = replace(job, compute=replace(job.compute, recompute=count / layers, keep_attention=keep_attention))
        peak = estimate_memory(job).peak.total
        if peak <= room:
            break
    fits = "" if peak <= room else ", which will not be enough"
    which = f"{count} of {layers} layers{' but for attention' if keep_attention else ''}"
    say(f"recomputation: {which}, {peak / 1e9:.1f} GB at the peak of {memory / 1e9:.1f} GB{fits}")
    return job
