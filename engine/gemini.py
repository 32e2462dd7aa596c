"""Changes to Gemini: its chunks and when they are gathered, the norm it clips by, whole layers compiled.

Gemini keeps parameters in chunks, and gathers and releases them from hooks that each operation on a parameter calls.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin import GeminiPlugin
from colossalai.interface import ModelWrapper
from colossalai.lazy import LazyInitContext
from colossalai.tensor.d_tensor import is_distributed_tensor
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from colossalai.zero import GeminiOptimizer
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.chunk.search_utils import _get_unused_byte
from colossalai.zero.gemini.gemini_hook import TrainingPhase
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.compilation import plain, take_checkpoint_function
from engine.job import Job
from engine.plugin import UNPADDED_VOCABULARY, LocalPart, common_options
from model_utils import build_model, count_parameters, parameter_specs
from runtime.console import say

OFFLOADED_CHUNK_PARAMETERS = 32 * 2**20


def build(job: Job) -> GeminiPlugin:
    """Return GeminiPlugin for `gemini` and `gemini_auto`."""
    on_host = not torch.cuda.is_available()
    automatic = job.layout.plugin == "gemini_auto"
    if automatic and on_host:
        say("gemini_auto: there is no GPU memory to balance here, so placement is static, as with gemini")
    least, placement = chunk_parameters(job), job.placement
    plugin = GeminiPlugin(
        placement_policy="auto" if automatic and not on_host else "static",
        tp_size=job.layout.tp,
        extra_dp_size=job.layout.extra_dp,
        min_chunk_size_m=least / 2**20,
        search_range_m=0 if keeps_whole(job) else least // 8 / 2**20,
        max_prefetch=prefetched_chunks(job),
        hidden_dim=job.config.hidden_size,
        enable_gradient_accumulation=job.batch.accumulation_steps > 1,
        pin_memory=not on_host,
        enable_async_reduce=not on_host,
        shard_param_frac=placement.shard_param_frac,
        offload_optim_frac=placement.offload_optim_frac,
        offload_param_frac=placement.offload_param_frac,
        warmup_non_model_data_ratio=placement.warmup_ratio,
        **common_options(job),
    )
    plugin.shard_config.make_vocab_size_divisible_by = UNPADDED_VOCABULARY
    return plugin


def empty_model(job: Job, device: torch.device) -> LlamaForCausalLM:
    """Return the model without memory, which Gemini allocates in its chunks."""
    return build_model(job.config, LazyInitContext(default_device=device))


def prepare(plugin: GeminiPlugin, model: ModelWrapper, optimizer: GeminiOptimizer) -> None:
    """Change Gemini's handling of memory, prefetching and the gradient norm."""
    keep_norm_on_device(plugin.tp_size)
    keep_memory_apart(model)
    prefetch_in_training_alone(model)
    plan_each_pass_from_its_start(model)
    if plugin.tp_size > 1:
        count_norm_over_tensor_parallel(optimizer, plugin.tp_group)


def gradient_ranks(plugin: GeminiPlugin) -> int:
    """Return the number of ranks over which gradients are averaged."""
    return plugin.dp_size


def local_part(optimizer: GeminiOptimizer, parameter: torch.nn.Parameter) -> LocalPart:
    """Return this rank's part of a parameter, and of its optimizer state."""
    replicated = optimizer.chunk_manager.get_chunk(parameter).keep_gathered
    number = next(number for number, other in optimizer.id_to_real_params.items() if other is parameter)
    owner = optimizer.id_to_fake_params.get(number)
    if owner is None:
        return LocalPart(0, 0, torch.empty(0), {}, replicated)
    _, start, size = optimizer.get_offsets(number)
    begin, end = optimizer.param_to_range[owner]
    storage = optimizer.param_to_chunk16[owner].paired_chunk.payload[begin:end]
    return LocalPart(start, start + size, storage, optimizer.optim.state[owner], replicated)


def update_working_weights(optimizer: GeminiOptimizer) -> None:
    """Set the weights that the model computes with from the master weights."""
    for chunk in optimizer.chunk16_set:
        chunk.optim_update()


def keeps_whole(job: Job) -> bool:
    """Return True if there is one data-parallel rank, so nothing to shard, and nothing is offloaded.

    Then Gemini keeps the model in one chunk that is never sharded. Sharded among one rank, each chunk would be copied
    four times a step.
    """
    return job.layout.dp == 1 and not _offloads(job)


def _offloads(job: Job) -> bool:
    fractions = job.placement.offload_optim_frac + job.placement.offload_param_frac
    return job.layout.plugin == "gemini_auto" or fractions > 0


def chunk_parameters(job: Job) -> int:
    """Return the least size of chunks, in parameters: that of a decoder layer, whose parameters are gathered together.

    Chunks that move to host memory and back are smaller. Gemini replicates a model smaller than one chunk, and then
    counts accumulated gradients once a rank too often. So a small model gets small chunks and is sharded as a large one
    is, unless a rank keeps it whole.
    """
    parameters = count_parameters(job.config)
    if keeps_whole(job):
        return parameters + 1
    least = OFFLOADED_CHUNK_PARAMETERS if _offloads(job) else layer_parameters(job.config)
    return min(least, parameters // 8) // job.layout.tp


def layer_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of one decoder layer."""
    return sum(spec.shape.numel() for spec in parameter_specs(config) if spec.group == "model.layers.0")


@functools.cache
def chunk_sizes(sizes: tuple[int, ...], least: int, hidden: int) -> list[int]:
    """Return the sizes of Gemini's chunks for parameters of these sizes, as ColossalAI finds and fills them in order.

    It looks for the size that wastes least where parameters above the mean by three standard deviations are left out
    (search_chunk_configuration); one that is larger than a chunk has one by itself (ChunkManager.register_tensor).
    """
    mean = sum(sizes) / len(sizes)
    bound = mean + 3 * math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes))
    packed = [size for size in sizes if size <= bound]
    start = math.ceil(max(least, *packed) / hidden) * hidden
    candidates = range(start, start + least // 8 + 1, hidden)
    best = min(candidates, key=lambda size: _get_unused_byte(packed, size))
    chunks, left = [], 0
    for size in sizes:
        if size > left:
            left = max(best, size)
            chunks.append(left)
        left -= size
    return chunks


def prefetched_chunks(job: Job) -> int:
    """Return the number of chunks to prefetch while earlier ones compute: as many as a layer has.

    It is 0 where a rank has all of them, or where some are in host memory: the GPU may not have room for more at once.
    """
    if job.layout.dp == 1 or _offloads(job):
        return 0
    return math.ceil(layer_parameters(job.config) / job.layout.tp / chunk_parameters(job))


def keep_memory_apart(model: ModelWrapper) -> None:
    """Keeps memory that a collective operation reads from whatever else would be written there meanwhile.

    torch gives memory that is let go at once to the stream that asked for it. Gemini lets go of a chunk when it has
    begun to reduce the gradients in it, on a stream of its own, so what is computed next may get its place and
    overwrite them; as ColossalAI has all streams share one queue, that seldom happens there (see
    requirements.start_cuda).
    Here chunks are gathered into memory of one stream that, whenever it asks for more, waits for the others.
    """
    manager, accelerator = model.chunk_manager, get_accelerator()
    gathering, reducing = manager._prefetch_stream or accelerator.Stream(), model.async_reduce_stream
    access, begin_gradients = manager.access_chunk, manager.init_grad_chunk

    @contextlib.contextmanager
    def memory_for_chunks() -> Iterator[None]:
        for stream in filter(None, (accelerator.current_stream(), reducing)):
            gathering.wait_stream(stream)
        with accelerator.stream(gathering):
            yield

    def access_chunk(chunk: Chunk, async_access: bool = False) -> dist.Work | None:
        with memory_for_chunks():
            work = access(chunk, async_access=True)
        if async_access:
            return work
        if work is not None:
            work.wait()
        accelerator.current_stream().wait_stream(gathering)
        return None

    def init_grad_chunk(chunk: Chunk) -> Chunk:
        with memory_for_chunks():
            gradients = begin_gradients(chunk)
        accelerator.current_stream().wait_stream(gathering)
        return gradients

    manager.access_chunk, manager.init_grad_chunk = access_chunk, init_grad_chunk


def prefetch_in_training_alone(model: ModelWrapper) -> None:
    """Keeps Gemini's prefetching to the training passes whose order it goes by.

    It writes that order down in the first pass, whatever it is. A pass without gradients releases all chunks at its
    end, and the next pass would take those that were under way for gathered.
    """
    manager, hook = model.gemini_manager, model.param_op_hook
    begin, chunks_ahead = manager.pre_iter, manager.placement_policy.get_prefetch_chunks

    def begin_training_pass(*args) -> None:
        if manager.is_warmup():
            manager.compute_list.clear()
        begin(*args)

    def chunks_to_prefetch(**progress) -> list[Chunk]:
        training = torch.is_grad_enabled() or hook._training_phase is TrainingPhase.BACKWARD
        return chunks_ahead(**progress) if training else []

    manager.pre_iter, manager.placement_policy.get_prefetch_chunks = begin_training_pass, chunks_to_prefetch


def may_evaluate(model: ModelWrapper) -> bool:
    """Return True if a pass without gradients may run now: Gemini with offloading first needs a training pass."""
    manager = getattr(model, "gemini_manager", None)
    return manager is None or not (manager.need_warmup and manager.is_warmup())


def plan_each_pass_from_its_start(model: ModelWrapper) -> None:
    """Has Gemini, where chunks move, plan each operation by the memory that the same one took in the first pass.

    It counts the operations from one pass on to the next, which after a pass without gradients are others. Every rank
    prints their number after the first.
    """
    manager = model.gemini_manager
    end_pass, figures = manager.reset_attributes, manager._mem_stats_collector
    if figures is None:
        return
    finish = figures.finish_collection

    def end_pass_and_count() -> None:
        end_pass()
        figures._step_idx = 0

    def finish_silently() -> None:
        with contextlib.redirect_stdout(None):
            finish()

    manager.reset_attributes, figures.finish_collection = end_pass_and_count, finish_silently


def keep_norm_on_device(tensor_parallel: int) -> None:
    """Makes chunks of gradients look for overflow and take their norm in one pass, and without waiting for the GPU.

    On its own each widens all of a chunk to take the norm, waits for the number before it goes on with the backward
    pass, and reads the chunk several times more to find out whether it is finite, which the norm tells.

    Args:
        tensor_parallel: number of ranks of which each holds a whole gradient of the RMSNorm weights, and so adds this
            fraction of their squares to the sum over all.
    """

    def squared_norm(chunk: Chunk) -> torch.Tensor:
        valid = (
            chunk.cuda_global_chunk[: chunk.utilized_size] if chunk.is_gathered else chunk.cuda_shard[: chunk.valid_end]
        )
        # Gemini adds the chunks' squares in the order of a set, which no two runs share: in float64 that does not show.
        if tensor_parallel == 1:
            return torch.linalg.vector_norm(valid, dtype=torch.float32).double().square()
        first = 0 if chunk.is_gathered else chunk.shard_begin
        parts, shares = [], []
        for parameter, place in chunk.tensors_info.items():
            part = valid[max(0, place.offset - first) : max(0, place.end - first)]
            if part.numel():
                parts.append(part)
                shares.append(1.0 if is_distributed_tensor(parameter) else 1 / tensor_parallel)
        if not parts:
            return valid.new_zeros((), dtype=torch.float64)
        squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).double().square()
        return squares @ torch.tensor(shares, dtype=torch.float64).to(squares.device, non_blocking=True)

    def has_inf_or_nan(chunk: Chunk) -> torch.Tensor:
        chunk.l2_norm = squared_norm(chunk)
        return ~torch.isfinite(chunk.l2_norm)

    def set_l2_norm(chunk: Chunk) -> None:
        """has_inf_or_nan, which comes before, has set it."""

    Chunk.has_inf_or_nan, Chunk.set_l2_norm = property(has_inf_or_nan), set_l2_norm


def count_norm_over_tensor_parallel(optimizer: GeminiOptimizer, group: dist.ProcessGroup) -> None:
    """Makes Gemini clip by one norm on all tensor-parallel ranks; on its own each takes that of its part."""
    own_norm = optimizer._calc_global_norm

    def global_norm() -> float:
        squared = torch.tensor(own_norm() ** 2, device=get_accelerator().get_current_device())
        dist.all_reduce(squared, group=group)
        return math.sqrt(squared.item())

    optimizer._calc_global_norm = global_norm


def compile_layers(model: ModelWrapper) -> None:
    """Compiles every decoder layer as a function of its parameters, which Gemini gathers and releases all at once.

    Compiled as they are, layers would pass by the hooks of the operations inside. The one function is that of a layer
    without storage, so it is compiled once for all of them.
    """
    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    with torch.device("meta"):
        empty = LlamaDecoderLayer(model.unwrap().config, layer_idx=0)

    @torch.compile
    def compute(checkpointed: Callable | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return checkpointed(functional_call, empty, *inputs) if checkpointed else functional_call(empty, *inputs)

    for layer in layers:
        layer.forward = _hooked_once(layer, empty, functools.partial(compute, take_checkpoint_function(layer)))


class _Plain(torch.autograd.Function):
    """Parameters as tensors of torch's own class over the same storage, no views of Gemini's, which dynamo refuses."""

    @staticmethod
    def forward(ctx, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(plain(parameter).detach() for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def _hooked_once(layer: LlamaDecoderLayer, empty: LlamaDecoderLayer, compute: Callable) -> Callable:
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(*args, **kwargs):
        empty.train(layer.training)
        args, kwargs = tree_map(plain, (args, kwargs))
        hooked = ColoParamOpHookManager.has_hook()
        with torch._C.DisableTorchFunction():
            gathered = ColoParamOpHookManager.pre_op(parameters, *parameters) if hooked else parameters
            gathered = _Plain.apply(*gathered)
        outputs = compute(dict(zip(names, gathered, strict=True)), args, kwargs)
        return ColoParamOpHookManager.post_op(parameters, outputs) if hooked else outputs

    return forward
