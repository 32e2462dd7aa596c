"""Gemini: patches of its memory, prefetching, gradient norm and compilation, and its weights in float8.

Gemini keeps parameters in chunks. Hooks around each operation on a parameter gather its chunk and release it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from colossalai.booster.plugin import GeminiPlugin
from colossalai.interface import ModelWrapper
from colossalai.lazy import LazyInitContext
from colossalai.tensor.d_tensor import is_distributed_tensor
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from colossalai.zero import GeminiDDP, GeminiOptimizer
from colossalai.zero.gemini.chunk import Chunk, TensorState
from colossalai.zero.gemini.chunk import chunk as chunk_module
from colossalai.zero.gemini.gemini_hook import TrainingPhase
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine import float8
from engine.compilation import plain, take_checkpoint_function
from engine.float8 import E4M3
from engine.gemini_chunks import (
    chunk_parameters,
    float8_chunks,
    keeps_gradients_apart,
    keeps_whole,
    prefetched_chunks,
)
from engine.job import Job
from engine.patching import replace
from engine.plugin import UNPADDED_VOCABULARY, LocalPart, common_options
from engine.recomputation import checkpoint_layers as checkpoint_layers
from engine.reduction import Reduction
from engine.waits import waiting
from model_utils import build_model
from runtime.console import say

_INITIALIZE, _ACCESS, _OPTIM_UPDATE = GeminiDDP._init_chunks, Chunk.access_chunk, Chunk.optim_update


def build(job: Job) -> GeminiPlugin:
    """Return GeminiPlugin for `gemini` and `gemini_auto`."""
    on_host = not torch.cuda.is_available()
    store_in_float8(job)
    automatic = job.layout.plugin == "gemini_auto"
    if automatic and on_host:
        say("gemini_auto: without a GPU placement is static, as with gemini")
    smallest, placement = chunk_parameters(job), job.placement
    plugin = GeminiPlugin(
        placement_policy="auto" if automatic and not on_host else "static",
        tp_size=job.layout.tp,
        extra_dp_size=job.layout.extra_dp,
        min_chunk_size_m=smallest / 2**20,
        search_range_m=0 if keeps_whole(job) else smallest // 8 / 2**20,
        max_prefetch=prefetched_chunks(job),
        hidden_dim=job.config.hidden_size,
        enable_gradient_accumulation=keeps_gradients_apart(job),
        pin_memory=job.offloads and not on_host,  # else each chunk would also have a pinned copy
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
    """Return the model without storage; Gemini allocates it in chunks."""
    return build_model(job.config, LazyInitContext(default_device=device))


def prepare(job: Job, plugin: GeminiPlugin, model: ModelWrapper, optimizer: GeminiOptimizer) -> None:
    """Patch Gemini's memory, prefetching and gradient norm."""
    compute_norm_on_device(plugin.tp_size)
    keep_gradients_in(torch.float32 if job.accumulates else job.dtype, model)
    reduce_chunks_in(job, Reduction(plugin.zero_group, job.reduce_dtype))
    if job.exchanges_at_update and job.layout.dp > 1:
        keep_gradients_until_update(model)
    allocate_chunks_on_one_stream(model)
    prefetch_only_in_training(model)
    reset_memory_plan_each_pass(model)
    measure_waits(model)
    if plugin.tp_size > 1:
        reduce_norm_over_tensor_parallel(optimizer, plugin.tp_group)
    optimizer.stored = float8.store_weights(model, model.float8_values.get)


def may_evaluate(model: ModelWrapper) -> bool:
    """Return True if a pass without gradients may run now; with offloading, Gemini needs a training pass first."""
    manager = model.gemini_manager
    return not (manager.need_warmup and manager.is_warmup())


def precision_mixin(optimizer: GeminiOptimizer) -> MixedPrecisionMixin:
    """Return ColossalAI's object for mixed precision."""
    return optimizer.mix_precision_mixin


def step(optimizer: GeminiOptimizer, rejects: Callable[[float], bool] | None = None) -> float:
    """Clip and update; return the gradient norm before clipping, times the loss scale.

    Symptom: after one overflow, every step overflows.
    Cause: GeminiOptimizer leaves `accumulating_grads` on, so the next gradients are added to the overflowed ones.
    Fix: turn it off.
    Remove when: GeminiOptimizer.step does this when it skips.
    """
    _reduce_sums(optimizer)
    # After the update, made or not, GeminiOptimizer copies the master weights over the gradients.
    rejects_step = None if rejects is None else lambda: rejects(optimizer.get_grad_norm())
    replace(optimizer.optim, "rejects", rejects_step)
    optimizer.step()
    replace(optimizer.chunk_manager, "accumulating_grads", False)
    if optimizer.stored:
        _round_weights(optimizer)
        _free_gradients(optimizer)
    norm = optimizer.get_grad_norm()
    return math.inf if norm is None else float(norm)  # None until a step has not been skipped


def local_part(optimizer: GeminiOptimizer, parameter: torch.nn.Parameter) -> LocalPart:
    """Return this rank's part of a parameter and its optimizer state."""
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
    """Copy the master weights to the working weights."""
    for chunk in optimizer.chunk16_set:
        chunk.optim_update()
    if optimizer.stored:
        _round_weights(optimizer)


def _free_gradients(optimizer: GeminiOptimizer) -> None:
    """Free chunks of gradients after an update.

    Symptom: forward passes have less memory, by all gradients of the rank.
    Cause: Gemini keeps chunks of gradients until the next backward pass overwrites them.
    Fix: free them; `init_grad_chunk` allocates them again.
    Remove when: Gemini frees them.
    """
    manager = optimizer.chunk_manager
    for gradients in filter(None, (chunk.grad_chunk for chunk in optimizer.chunk16_set)):
        manager._ChunkManager__sub_memory_usage(gradients.memory_usage)
        if gradients.is_gathered:
            chunk_module.free_storage(gradients.cuda_global_chunk)
        replace(gradients, "cuda_shard", None)
        manager._ChunkManager__add_memory_usage(gradients.memory_usage)


def _round_weights(optimizer: GeminiOptimizer) -> None:
    """Set the weights that are stored in float8; each rank rounds the parts in its shards. Collective."""
    nothing, parts = torch.zeros(1, device=get_accelerator().get_current_device()), []
    for weight, stored in optimizer.stored.items():
        chunk = optimizer.chunk_manager.get_chunk(weight)
        values, masters, place = chunk.payload, chunk.paired_chunk.payload, chunk.tensors_info[weight]
        first = 0 if chunk.is_gathered else chunk.shard_begin
        part = slice(max(0, place.offset - first), max(0, min(len(values), place.end - first)))
        empty = part.start >= part.stop  # yet the rank takes part in the scale
        value, master = (nothing.to(E4M3), nothing) if empty else (values[part], masters[part])
        parts.append((value, master, stored.scale))
    float8.round_weights(parts, chunk.torch_pg)


def store_in_float8(job: Job) -> None:
    """Keep, gather and release the weights in float8 whose layers multiply in it; see `float8.store_weights`.

    Symptom: each pass gathers weights in working precision, and each layer rounds them again.
    Cause: `_init_chunks` gives all parameters chunks in working precision. A chunk has one precision, and its tensors
        are its parameters' values.
    Fix: `_init_chunks` registers these parameters as float8, so that they get chunks of their own. `float8_values` has
        their views of chunks, and the parameters get their precision back, for gradients, without values. Gathering
        such a chunk exchanges bytes, which all backends can, and sets no parameters; `optim_update` leaves it to
        `_round_weights`.
    Remove when: Gemini has chunks in float8 with scales.
    """

    def _init_chunks(self: GeminiDDP, **options: Any) -> None:
        manager, world = self.chunk_manager, dist.get_world_size(self.zero_group)
        sizes = {name: parameter.numel() for parameter, name in self.param2name.items()}
        names, inside, outside = float8_chunks(job, sizes, torch.cuda.is_available())
        register, dtype, key = manager.register_tensor, self.mixed_precision, ""
        for name, size in ("float8", inside), ("others", outside):
            manager.dp_degree_chunk_size_dict[name] = size + -size % world
            manager.kwargs_config[name] = manager.kwargs_config[world]

        def register_tensor(tensor: torch.Tensor, group_type: str, config_key: int, **options: Any) -> None:
            nonlocal key
            if group_type == "fp16_param":  # its master weight follows
                key = "float8" if self.param2name[tensor] in names else "others"
                tensor.data = tensor.data.to(E4M3 if key == "float8" else dtype)
            register(tensor, group_type, key if names else config_key, **options)

        replace(manager, "register_tensor", register_tensor)
        _INITIALIZE(self, **options)
        self.float8_values = {}
        for parameter, name in self.param2name.items():
            if name in names:
                self.float8_values[parameter] = plain(parameter).detach().view(-1)
                float8.empty_values(parameter, dtype)

    def access_chunk(self: Chunk, async_access: bool = False) -> dist.Work | None:
        if self.dtype != E4M3:
            return _ACCESS(self, async_access)
        if self.is_gathered:
            return None
        chunk_module.alloc_storage(self.cuda_global_chunk)
        whole, own = self.cuda_global_chunk.view(torch.uint8), self.cuda_shard.view(torch.uint8)
        work = dist.all_gather_into_tensor(whole, own, self.torch_pg, async_op=async_access)
        self.cuda_shard, self.is_gathered = None, True
        return work

    def optim_update(self: Chunk) -> None:
        if self.dtype != E4M3:
            _OPTIM_UPDATE(self)

    replace(GeminiDDP, "_init_chunks", _init_chunks)
    replace(Chunk, "access_chunk", access_chunk)
    replace(Chunk, "optim_update", optim_update)


def allocate_chunks_on_one_stream(model: ModelWrapper) -> None:
    """Allocate gathered chunks on one stream that waits for the others first.

    Symptom: gradients are sometimes wrong, and with accumulated gradients weights are too.
    Cause: the allocator reuses freed memory at once on the stream that allocated it. Gemini frees a chunk while its
        reduce-scatter still runs on another stream, so the next kernel may overwrite gradients in use. This is rare
        under ColossalAI's CUDA_DEVICE_MAX_CONNECTIONS=1, which requirements.start_cuda undoes.
    Fix: `access_chunk` and `init_grad_chunk` allocate on a stream of their own, after it has waited for the compute
        and the reduce stream.
    Remove when: Gemini calls record_stream on freed chunks, or keeps them until they are reduced.
    """
    manager, accelerator = model.chunk_manager, get_accelerator()
    chunk_stream, reduce_stream = manager._prefetch_stream or accelerator.Stream(), model.async_reduce_stream
    access, init_gradients = manager.access_chunk, manager.init_grad_chunk

    @contextlib.contextmanager
    def on_chunk_stream() -> Iterator[None]:
        for stream in filter(None, (accelerator.current_stream(), reduce_stream)):
            chunk_stream.wait_stream(stream)
        with accelerator.stream(chunk_stream):
            yield

    def access_chunk(chunk: Chunk, async_access: bool = False) -> dist.Work | None:
        with on_chunk_stream():
            work = access(chunk, async_access=True)
        if async_access:
            return work
        with waiting():
            if work is not None:
                work.wait()
            accelerator.current_stream().wait_stream(chunk_stream)
        return None

    def init_grad_chunk(chunk: Chunk) -> Chunk:
        with on_chunk_stream():
            gradients = init_gradients(chunk)
        accelerator.current_stream().wait_stream(chunk_stream)
        return gradients

    replace(manager, "access_chunk", access_chunk)
    replace(manager, "init_grad_chunk", init_grad_chunk)


def keep_gradients_in(dtype: torch.dtype, model: ModelWrapper) -> None:
    """Keep gradients that have chunks of their own in this precision, float32 if they are accumulated.

    Symptom: gradients accumulated over many micro-batches lose as much precision as the working one has.
    Cause: `Chunk.init_grad_chunk` gives the chunk of accumulated gradients the weights' precision, and
        `rearrange_accumulated_grad_chunk` puts the sum so far into the next reduction.
    Fix: the chunk of gradients is in `dtype`. `rearrange_accumulated_grad_chunk` keeps the sum aside as the chunk's
        `summed`, `add_tensor_to_chunk_slice` then copies instead, and `reduce` (see `reduce_chunks_in`) adds the sum
        to the reduced shard. A chunk that is not reduced stays where it is, and is added to.
    Remove when: Gemini accumulates in float32.
    """
    manager, init, add = model.chunk_manager, Chunk.init_grad_chunk, Chunk.add_tensor_to_chunk_slice

    def init_grad_chunk(self: Chunk) -> Chunk:
        weights, self.dtype = self.dtype, dtype
        try:
            return init(self)
        finally:
            self.dtype = weights

    def rearrange_accumulated_grad_chunk(chunk: Chunk) -> Chunk:
        gradients = chunk.grad_chunk
        if gradients.can_reduce or (gradients.is_gathered and gradients.pg_size == gradients.extra_dp_size == 1):
            for tensor in gradients.get_tensors():
                gradients.tensor_trans_state(tensor, TensorState.HOLD)
            manager.accessed_chunks.add(gradients)
            replace(manager, "accessed_mem", manager.accessed_mem + gradients.chunk_mem)
            replace(gradients, "l2_norm", None)
            return gradients
        summed = gradients.payload.clone() if gradients.is_gathered else gradients.payload
        manager.init_grad_chunk(chunk)
        gradients.summed = summed
        return gradients

    def add_tensor_to_chunk_slice(self: Chunk, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        if getattr(self, "summed", None) is None:
            add(self, tensor, gradient)
        else:
            self.copy_tensor_to_chunk_slice(tensor, gradient, update_ptr=False)

    if not model.enable_gradient_accumulation:
        return
    replace(Chunk, "init_grad_chunk", init_grad_chunk)
    replace(Chunk, "add_tensor_to_chunk_slice", add_tensor_to_chunk_slice)
    replace(manager, "rearrange_accumulated_grad_chunk", rearrange_accumulated_grad_chunk)


def keep_gradients_until_update(model: ModelWrapper) -> None:
    """Keep each rank's sums of gradients unsharded, and reduce them in `step`.

    Symptom: on a slow network, most of a step passes in reductions, one of each chunk in every micro-batch.
    Cause: `grad_handle` calls `reduce_chunk` as soon as it has all gradients of a chunk.
    Fix: `reduce_chunk` only releases the chunk of weights, and says that nothing was reduced. The chunk of gradients
        stays ready to reduce; the next micro-batch adds to it, or `_reduce_sums` reduces it.
    Remove when: Gemini has an option for it.
    """
    manager = model.chunk_manager

    def reduce_chunk(gradients: Chunk, async_op: bool = False) -> bool:
        if gradients.can_reduce:
            manager.accessed_chunks.remove(gradients)
            replace(manager, "accessed_mem", manager.accessed_mem - gradients.chunk_mem)
            weights = manager.get_chunk(gradients.get_tensors()[0])
            (manager.fake_release_chunk if weights.keep_gathered else manager.release_chunk)(weights)
        return False

    replace(manager, "reduce_chunk", reduce_chunk)


def _reduce_sums(optimizer: GeminiOptimizer) -> None:
    """Reduce the chunks of gradients that `keep_gradients_until_update` has kept, if any. Collective."""
    manager = optimizer.chunk_manager
    for weights in manager.get_chunks(optimizer.module.fp16_params):  # in the same order on all ranks
        gradients = weights.grad_chunk
        if gradients is not None and gradients.can_reduce:
            manager._ChunkManager__sub_memory_usage(gradients.memory_usage)
            gradients.reduce()
            manager._ChunkManager__add_memory_usage(gradients.memory_usage)
            gradients.payload.div_(gradients.pg_size * gradients.extra_dp_size)
            manager.overflow_counter.add_(gradients.has_inf_or_nan)


def reduce_chunks_in(job: Job, reduction: Reduction) -> None:
    """Reduce chunks of gradients between ranks in the job's precision of reduction.

    Symptom: a sum over many ranks loses as much precision as the working one has, and may overflow in fp16.
    Cause: `Chunk.reduce` reduces in the precision of the chunk.
    Fix: reduce a copy, add the sum of earlier micro-batches, and keep the result in the chunk's precision. The
        gradients of a single micro-batch fit into the working precision, also in a chunk in float32.
    Remove when: Gemini has an option for it.
    """
    reduce_alone = Chunk.reduce
    narrow = reduction.in_one_host and not job.exchanges_at_update

    def reduce(self: Chunk, async_op: bool = False) -> None:
        divisor = self.pg_size * self.extra_dp_size  # Gemini divides afterwards
        if divisor == 1:
            reduce_alone(self)
        else:
            with waiting():
                reduce_in_dtype(self)
        summed, self.summed = getattr(self, "summed", None), None
        if summed is not None:
            self.payload.add_(summed.to(self.payload.device, non_blocking=True), alpha=divisor)

    def reduce_in_dtype(self: Chunk) -> None:
        gradients = self.cuda_global_chunk
        if self.keep_gathered:
            reduced = reduction.all_reduce(gradients)
        else:
            reduced = reduction.reduce_scatter(gradients.to(job.dtype) if narrow else gradients)
        if self.extra_dp_group is not None:
            dist.all_reduce(reduced, group=self.extra_dp_group)
        if self.keep_gathered:
            gradients.copy_(reduced)
        else:
            self.cuda_shard = reduced.to(gradients.dtype)
            chunk_module.free_storage(gradients)
            self.is_gathered = False
        self._Chunk__update_tensors_state(TensorState.HOLD)

    replace(Chunk, "reduce", reduce)


def measure_waits(model: ModelWrapper) -> None:
    """Measure the time in which a rank waits for other ranks.

    Symptom: a slow rank makes all ranks' steps as long as its own, and which one it is cannot be seen.
    Cause: Gemini waits for gathered chunks, and at the end of a backward pass for reduced ones, without a hook.
    Fix: `wait_chunks` and `_post_backward` run inside `waiting`.
    Remove when: Gemini reports these waits.
    """
    for owner, name in ((model.gemini_manager, "wait_chunks"), (model, "_post_backward")):
        replace(owner, name, waiting()(getattr(owner, name)))


def prefetch_only_in_training(model: ModelWrapper) -> None:
    """Prefetch chunks in training passes only.

    Symptom: after an evaluation, weights are used before they have been gathered, or Gemini's assertions fail.
    Cause: Gemini prefetches in the order of the first pass, even if that was an evaluation, whose order differs. Also,
        a pass without gradients ends by releasing all chunks, but the next pass assumes that those in flight are
        gathered.
    Fix: `pre_iter` drops the order of all passes before the first training pass, and `get_prefetch_chunks` returns no
        chunks in a pass without gradients.
    Remove when: Gemini records an order for each kind of pass, and waits for prefetches at the end of each pass.
    """
    manager, hook = model.gemini_manager, model.param_op_hook
    policy, begin_pass = manager.placement_policy, manager.pre_iter
    next_chunks = policy.get_prefetch_chunks

    def pre_iter(*args) -> None:
        if manager.is_warmup():
            manager.compute_list.clear()
        begin_pass(*args)

    def get_prefetch_chunks(**progress) -> list[Chunk]:
        training = torch.is_grad_enabled() or hook._training_phase is TrainingPhase.BACKWARD
        return next_chunks(**progress) if training else []

    replace(manager, "pre_iter", pre_iter)
    replace(policy, "get_prefetch_chunks", get_prefetch_chunks)


def reset_memory_plan_each_pass(model: ModelWrapper) -> None:
    """Let Gemini's automatic placement plan each operation by the memory that it took in the first pass.

    Symptom: after an evaluation Gemini moves chunks for operations that need no memory, and not for those that do. Each
        rank also prints "finish_collection" and a number after the first pass.
    Cause: `_step_idx`, the operation's number, runs on from one pass to the next, and a pass without gradients has
        fewer operations. The print is debugging output.
    Fix: `reset_attributes`, which ends each pass, sets `_step_idx` to 0; `finish_collection` prints nothing.
    Remove when: Gemini resets `_step_idx` itself.
    """
    manager = model.gemini_manager
    end_pass, collector = manager.reset_attributes, manager._mem_stats_collector
    if collector is None:
        return
    finish = collector.finish_collection

    def reset_attributes() -> None:
        end_pass()
        replace(collector, "_step_idx", 0)

    def finish_collection() -> None:
        with contextlib.redirect_stdout(None):
            finish()

    replace(manager, "reset_attributes", reset_attributes)
    replace(collector, "finish_collection", finish_collection)


def compute_norm_on_device(tensor_parallel: int) -> None:
    """Check chunks of gradients for overflow and compute their norm in one pass, without waiting for the GPU.

    Symptom: the backward pass waits for the GPU once per chunk, and reads each chunk several more times.
    Cause: `set_l2_norm` casts a whole chunk to float32 and copies its norm to the host; `has_inf_or_nan` looks for
        infinite elements, then for NaN.
    Fix: `has_inf_or_nan` computes the squared norm on the GPU, and checks that it is finite. `set_l2_norm`, which is
        called later, does nothing.
    Remove when: Gemini keeps the norm on the GPU.

    Args:
        tensor_parallel: number of tensor-parallel ranks. All hold the gradients of RMSNorm weights, so each counts one
            part in so many of their squares.
    """

    def squared_norm(chunk: Chunk) -> torch.Tensor:
        valid = (
            chunk.cuda_global_chunk[: chunk.utilized_size] if chunk.is_gathered else chunk.cuda_shard[: chunk.valid_end]
        )
        # Gemini sums chunks in the order of a set, which differs between runs; float64 hides the rounding.
        if tensor_parallel == 1:
            return torch.linalg.vector_norm(valid, dtype=torch.float32).double().square()
        first = 0 if chunk.is_gathered else chunk.shard_begin
        parts, fractions = [], []
        for parameter, place in chunk.tensors_info.items():
            part = valid[max(0, place.offset - first) : max(0, place.end - first)]
            if part.numel():
                parts.append(part)
                fractions.append(1.0 if is_distributed_tensor(parameter) else 1 / tensor_parallel)
        if not parts:
            return valid.new_zeros((), dtype=torch.float64)
        squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).double().square()
        return squares @ torch.tensor(fractions, dtype=torch.float64).to(squares.device, non_blocking=True)

    def has_inf_or_nan(self: Chunk) -> torch.Tensor:
        self.l2_norm = squared_norm(self)
        return ~torch.isfinite(self.l2_norm)

    def set_l2_norm(self: Chunk) -> None:
        """Do nothing: `has_inf_or_nan` has set it."""

    replace(Chunk, "has_inf_or_nan", property(has_inf_or_nan))
    replace(Chunk, "set_l2_norm", set_l2_norm)


def reduce_norm_over_tensor_parallel(optimizer: GeminiOptimizer, group: dist.ProcessGroup) -> None:
    """Clip by the norm over all tensor-parallel ranks.

    Symptom: tensor-parallel ranks clip by different factors, and their replicated weights drift apart.
    Cause: `_calc_global_norm` sums over data-parallel ranks only.
    Fix: sum its square over the tensor-parallel group too.
    Remove when: GeminiOptimizer does this.
    """
    own_norm = optimizer._calc_global_norm

    def global_norm() -> float:
        squared = torch.tensor(own_norm() ** 2, device=get_accelerator().get_current_device())
        dist.all_reduce(squared, group=group)
        return math.sqrt(squared.item())

    replace(optimizer, "_calc_global_norm", global_norm)


def compile_layers(model: ModelWrapper) -> None:
    """Compile every decoder layer as one function of its parameters.

    Symptom: a compiled layer computes with released parameters.
    Cause: Gemini's hooks run in the operations inside the layer, which compilation replaces.
    Fix: the layer's `forward` calls the hooks once for all its parameters, around a compiled function. That function is
        compiled once for all layers: it calls a layer on the meta device with the parameters as arguments. With float8
        they are marked as if they stayed in memory, as Gemini gathers them into the same storage again for the backward
        pass; else the compiler would keep each layer's float8 weights until then, since they are smaller. Kernels then
        rely on aligned addresses, which the sizes that float8 needs give.
    Remove when: Gemini gathers parameters in module hooks.
    """
    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    with torch.device("meta"):
        empty = LlamaDecoderLayer(model.unwrap().config, layer_idx=0)
    float8.convert_alike(empty, layers[0])

    @torch.compile
    def compute(checkpointed: Callable | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return checkpointed(functional_call, empty, *inputs) if checkpointed else functional_call(empty, *inputs)

    for layer in layers:
        compiled = functools.partial(compute, take_checkpoint_function(layer))
        replace(layer, "forward", _hooked_once(layer, empty, compiled))


class _Plain(torch.autograd.Function):
    """Conversion of parameters to plain tensors of the same storage; dynamo refuses views of Gemini's tensor class."""

    @staticmethod
    def forward(ctx, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(plain(parameter).detach() for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def _hooked_once(layer: LlamaDecoderLayer, empty: LlamaDecoderLayer, compute: Callable) -> Callable:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    converted, stored = float8.is_converted(layer), float8.stored_tensors(layer)

    def forward(*args, **kwargs):
        empty.train(layer.training)
        args, kwargs = tree_map(plain, (args, kwargs))
        hooked = ColoParamOpHookManager.has_hook()
        with torch._C.DisableTorchFunction():
            gathered = ColoParamOpHookManager.pre_op(parameters, *parameters) if hooked else parameters
            gathered = _Plain.apply(*gathered)
        if converted:
            for tensor in (*gathered, *stored.values()):
                torch._dynamo.mark_static_address(tensor, guard=False)
        outputs = compute(dict(zip(names, gathered, strict=True)) | stored, args, kwargs)
        return ColoParamOpHookManager.post_op(parameters, outputs) if hooked else outputs

    return forward
