"""Estimate of the time of an optimizer step, from first principles and measured facts about a GPU and its links.

Counted are the FLOPs of matrix products and attention, the bytes that all other kernels move, and the bytes that ranks
exchange; docs/planner.md has the method and its errors. In formulas, h is the hidden size, q and k are the sizes of
queries and keys, and f is the FFN size.
"""

from dataclasses import dataclass, fields

from attn import EAGER
from engine import zero
from engine.compilation import Fusion, choose_fusion
from engine.float8 import converted, stored
from engine.job import ROWWISE, Job, recomputed_layers, reenters
from engine.overlap import PARTS
from model_utils import attention_size, model_flops_per_token, trained_specs
from planning.facts import Curve, Facts, at
from planning.machines import Machines
from planning.memory import FP32, MASTER_AND_MOMENTS, stage_specs

BACKWARD_ATTENTION = 2.5  # times the forward pass's FLOPs: five products instead of two
LOSS_PASSES = 5  # over the logits: the loss reads them three times; their gradient is written, and read
NOT_COMPILED = {Fusion.NONE: 2.0, Fusion.PIECES: 1.3, Fusion.LAYERS: 1.0}  # bytes moved, relative to compiled layers
SCORE_BYTES = 33  # that plain attention moves for each score, forward and backward
QUANTIZED_BYTES = 5  # per element that becomes float8: 2 for its scale, 2 to divide, 1 to write
ROWWISE_FACTOR = 1.5  # of them if rows are scaled: each product needs other scales
EXCHANGES = 10  # of a layer's tokens between tensor-parallel ranks: 4 forward, 4 backward, 2 of inputs again
REPEATED_EXCHANGES = 3  # of them if the layer is computed again
FLOAT8_EXCHANGES = 0.6  # share of both that move operands, in float8 if products are; the others move sums of products
FIRST_PART = 35e-6  # seconds until the first part of such an exchange within a host is there


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by component, on the busiest stage of a pipeline.

    Attributes:
        other_kernels: those of the forward and backward pass that are neither matrix products nor attention.
        optimizer: the norm, AdamW, and the conversion of the weights.
        exchange: the time that communication adds to the kernels beside it, and waiting for the slowest GPU.
        bubble: waiting for other pipeline stages.
        host: the time that offloaded work adds.
        data: waiting for the loader.
        idle: waiting for the host to launch kernels.
    """

    products: float
    attention: float
    other_kernels: float
    optimizer: float
    exchange: float
    bubble: float
    host: float
    data: float
    idle: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Group:
    """The ranks of a collective operation: their number, and the distance between the numbers of two neighbours."""

    size: int
    stride: int
    machines: Machines

    @property
    def hosts(self) -> int:
        return min(self.size, -(-self.size * self.stride // self.machines.per_host))

    def exchange(self, whole: float, operations: float = 1) -> "_Exchange":
        """Return the exchange in which a ring gathers, or reduces and scatters, `whole` bytes.

        Between hosts its bytes go through the links of all the host's ranks at the same time.
        """
        if self.size == 1:
            return _Exchange(0.0, 0.0, self.machines.facts)
        facts, hosts = self.machines.facts, self.hosts
        sent = whole * (self.size - 1) / self.size
        within = sent / (facts.collectives * 1e9)
        between = sent * hosts / self.size / (self.machines.network * 1e9) if hosts > 1 else 0.0
        near, far = facts.latency
        steps = (self.size - hosts) * near + hosts * far if hosts > 1 else (self.size - 1) * near
        return _Exchange(within, max(within, between) + operations * steps * 1e-6, facts)


@dataclass(frozen=True)
class _Exchange:
    """Seconds of a collective operation, and those of them in which the links within a host are busy."""

    within: float
    seconds: float
    facts: Facts

    def __add__(self, other: "_Exchange") -> "_Exchange":
        return _Exchange(self.within + other.within, self.seconds + other.seconds, self.facts)

    def beside(self, kernels: float) -> float:
        """Return the time that the exchange adds to kernels of so many seconds that run beside it."""
        hidden = min(self.seconds, kernels)
        busy = min(self.within, hidden)
        near, far = self.facts.overlap
        return self.seconds - hidden + near * busy + far * (hidden - busy)


@dataclass(frozen=True)
class _Share:
    """A rank's share of a micro-batch on one stage: its tokens, layers and the sizes of its parts of the weights."""

    tokens: float
    layers: float
    again: float  # layers that are computed again in the backward pass
    hidden: int
    queries: float
    keys: float
    ffn: float
    vocabulary: float  # 0 on stages without the output layer

    @property
    def layer_weights(self) -> float:
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.ffn)


@dataclass(frozen=True)
class _Pass:
    """Seconds of a micro-batch on one stage, forward and backward together, and of the backward pass's kernels."""

    products: float
    attention: float
    other_kernels: float
    exchange: float  # between tensor-, sequence- and pipeline-parallel ranks
    backward: float
    idle: float  # waiting for the host, which launches kernels more slowly than the GPU computes them

    @property
    def kernels(self) -> float:
        return self.products + self.attention + self.other_kernels

    @property
    def total(self) -> float:
        return self.kernels + self.exchange + self.idle


def estimate_step(job: Job, machines: Machines, loaders: int = 0) -> StepTime:
    """Return the time of a step of a job whose choices are settled (see `planning.memory.settle`).

    Args:
        loaders: processes of each rank that load data, perhaps the rank itself; 0: data are made on the GPU.
    """
    layout, batch, facts = job.layout, job.batch, machines.facts
    first, last = _micro_batch(job, machines, 0), _micro_batch(job, machines, layout.pp - 1)
    middle = _micro_batch(job, machines, 1) if layout.pp > 2 else first
    passes = [first, *[middle] * (layout.pp - 2), last][-layout.pp :]
    stage = max(range(layout.pp), key=lambda stage: passes[stage].total)
    busiest = passes[stage]
    count = batch.sequences // layout.microbatch_size if layout.pp > 1 else batch.accumulation_steps
    # The first microbatch passes through all stages. Interleaved, a stage starts once the first of its ranges has come
    # (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
    bubble = facts.bubble * (sum(each.total for each in passes) - busiest.total) / layout.chunks
    optimizer, host, exchange = _update(job, machines, stage, busiest, count)
    late = facts.spread * (count * busiest.total + bubble) if layout.ranks > 1 else 0
    compute = count * busiest.total + bubble + optimizer
    loading = batch.sequences * batch.max_length / (loaders * facts.loader * 1e6) if loaders else 0
    return StepTime(
        products=count * busiest.products,
        attention=count * busiest.attention,
        other_kernels=count * busiest.other_kernels,
        optimizer=optimizer,
        exchange=count * busiest.exchange + exchange + late,
        bubble=bubble,
        host=host,
        data=max(loading - compute, 0),
        idle=count * busiest.idle + facts.idle / 1e3,
    )


def estimated_mfu(job: Job, step: StepTime, peak_tflops: float) -> float:
    """Return the fraction of the GPUs' peak that a job reaches by the estimate, counted as in `benchmark.py`."""
    flops = job.tokens_per_step * model_flops_per_token(job.config, job.batch.max_length)
    return flops / step.total / job.layout.ranks / (peak_tflops * 1e12)


def _share(job: Job, stage: int) -> _Share:
    config, layout = job.config, job.layout
    sequences = layout.microbatch_size if layout.pp > 1 else job.batch.batch_size
    return _Share(
        tokens=sequences * job.batch.max_length / layout.sp,
        layers=config.num_hidden_layers / layout.pp,
        again=len(recomputed_layers(config.num_hidden_layers, job.recomputed)) / layout.pp,
        hidden=config.hidden_size,
        queries=attention_size(config) / layout.tp,
        keys=config.num_key_value_heads * config.head_dim / layout.tp,
        ffn=config.intermediate_size / layout.tp,
        vocabulary=config.vocab_size / layout.tp if stage == layout.pp - 1 else 0,
    )


def _micro_batch(job: Job, machines: Machines, stage: int) -> _Pass:
    share = _share(job, stage)
    ahead, back = zip(_products(job, machines.facts, share), _attention(job, machines.facts, share), strict=True)
    other = _other_bytes(job, share, stage) / (machines.facts.memory * 1e9)
    products, attention = (sum(both) for both in zip(ahead, back, strict=True))
    idle = max(machines.facts.launch / 1e3 * share.layers - products - attention - other, 0)
    return _Pass(products, attention, other, _exchanges(job, machines, share), sum(back) + other / 2, idle)


def _products(job: Job, facts: Facts, share: _Share) -> tuple[float, float]:
    """Return the seconds of matrix products in the forward and the backward pass."""

    def seconds(rows: float, columns: float, speeds: Curve, parts: int) -> float:
        flops = 2 * share.tokens * rows * columns
        return flops / at(speeds, flops / parts / 1e9) / 1e12

    plain: Curve = ((1, facts.float32),) if job.dtype.itemsize == FP32 else facts.products
    curve = plain
    if _in_float8(job):
        curve = facts.rowwise_products if job.compute.recipe == ROWWISE else facts.float8_products
    hidden, queries, keys, ffn = share.hidden, share.queries, share.keys, share.ffn

    def layer(parts: int) -> float:
        attention = 2 * seconds(queries, hidden, curve, parts) + 2 * seconds(keys, hidden, curve, parts)
        return attention + 3 * seconds(ffn, hidden, curve, parts)

    def all_layers(parts: int) -> float:
        head = seconds(share.vocabulary, hidden, plain, parts) if share.vocabulary else 0
        return share.layers * layer(parts) + head

    parts = _parts(job)
    # No gradient needs the result of the last product.
    repeated = layer(parts) - (0 if reenters(job.layout) else seconds(hidden, ffn, curve, parts))
    forward = all_layers(parts)
    weights = 0 if job.adapters else all_layers(1)  # gradients of those that are trained; these products have no parts
    return forward, forward + weights + share.again * repeated


def _parts(job: Job) -> int:
    """Return the parts in which tensor-parallel ranks compute a product: each rank's rows, perhaps in pieces."""
    return max(PARTS, job.layout.tp) if job.layout.token_parts > 1 else 1


def _attention(job: Job, facts: Facts, share: _Share) -> tuple[float, float]:
    """Return the seconds of a fused attention kernel in the forward and the backward pass."""
    if job.config._attn_implementation == EAGER:
        return 0.0, 0.0
    slower = facts.products[-1][1] / facts.float32 if job.dtype.itemsize == FP32 else 1
    length = job.batch.max_length
    ahead, back = (at(curve, length) / slower for curve in (facts.attention, facts.attention_backward))
    tflop = 2 * share.tokens * length * share.queries / 1e12
    again = 0 if job.compute.keep_attention else share.again
    return tflop * share.layers / ahead, tflop * (again / ahead + BACKWARD_ATTENTION * share.layers / back)


def _other_bytes(job: Job, share: _Share, stage: int) -> float:
    """Return the bytes that all other kernels of a micro-batch move.

    In the forward pass of a compiled layer two norms read and write 4 h, residual additions 5 h, the rotation of
    queries and keys 2 (q + k), the activation reads 2 f and writes f. In the backward pass norms and additions move
    15 h, the rotation 2 (q + k), attention's preparation 2 q, and the activation reads 3 f and writes 3 f.
    """
    config, width = job.config, job.dtype.itemsize
    hidden, rotated = share.hidden / job.layout.token_parts, 2 * (share.queries + share.keys)
    ahead = 9 * hidden + rotated + 3 * share.ffn
    back = 15 * hidden + rotated + 2 * share.queries + 6 * share.ffn
    moved = share.tokens * width * ((share.layers + share.again) * ahead + share.layers * back)
    moved *= NOT_COMPILED[choose_fusion(job, on_gpu=True)]
    if config._attn_implementation == EAGER:
        heads = config.num_attention_heads / job.layout.tp
        moved += SCORE_BYTES * share.tokens * job.batch.max_length * heads * share.layers
    if _in_float8(job):
        moved += _quantized(job, share)
    return moved + LOSS_PASSES * width * share.tokens * share.vocabulary + _sums(job, stage)


def _quantized(job: Job, share: _Share) -> float:
    """Return the bytes moved to convert operands to float8: inputs, once more for the backward pass, and gradients.

    A gradient is written twice, with either dimension contiguous; weights only unless they are stored in float8.
    """
    inputs = 2 * share.hidden + share.queries + share.ffn
    gradients = 2 * share.hidden + share.queries + 2 * share.keys + 2 * share.ffn
    twice = QUANTIZED_BYTES + 1
    per_token = QUANTIZED_BYTES * (2 * share.layers + share.again) * inputs + twice * share.layers * gradients
    moved = share.tokens * per_token
    if not _stored_in_float8(job):
        moved += share.layer_weights * (QUANTIZED_BYTES * (share.layers + share.again) + twice * share.layers)
    return moved * (ROWWISE_FACTOR if job.compute.recipe == ROWWISE else 1)


def _in_float8(job: Job) -> bool:
    return job.compute.fp8 and converted(job, on_gpu=True)[0] > 0


def _stored_in_float8(job: Job) -> bool:
    """Return True if weights are kept in float8, and exchanged so (see `engine.float8.store_weights`)."""
    return bool(stored(job, {spec.name: spec.shape.numel() for spec in stage_specs(job.config, job.layout, 0)}, True))


def _sums(job: Job, stage: int) -> float:
    """Return the bytes moved to add a micro-batch's gradients to float32 sums."""
    if not job.accumulates:
        return 0.0
    sharded = job.layout.zero_stage and not job.exchanges_at_update
    kept = sum(_trained(job, stage)) / (job.layout.gradient_ranks if sharded else 1)
    return (job.dtype.itemsize + 2 * FP32) * kept


def _trained(job: Job, stage: int) -> list[int]:
    """Return the sizes of the weights that a rank of a stage trains, before ZeRO divides them."""
    specs = trained_specs(job.config, job.adapters) if job.adapters else stage_specs(job.config, job.layout, stage)
    return [spec.shape.numel() for spec in specs]


def _exchanges(job: Job, machines: Machines, share: _Share) -> float:
    """Return the seconds that exchanges between the ranks of one replica add to a micro-batch."""
    layout, facts, width = job.layout, machines.facts, job.dtype.itemsize
    seconds = 0.0
    if layout.token_parts > 1:
        group = _Group(layout.tp, layout.sp, machines)
        in_float8 = _in_float8(job) and job.compute.recipe != ROWWISE
        whole = share.tokens * share.hidden * (width - (FLOAT8_EXCHANGES * (width - 1) if in_float8 else 0))
        count = EXCHANGES * share.layers + REPEATED_EXCHANGES * share.again
        if group.hosts == 1:  # copied beside the products, but for the first part
            copied = whole * (layout.tp - 1) / layout.tp / (facts.copies * 1e9)
            seconds += count * (copied / _parts(job) + FIRST_PART)
        else:
            seconds += count * group.exchange(whole).seconds
    elif layout.tp > 1:  # Gemini's: all-reduces of the sums, and of the gradients, of attention and FFN
        reduced = _Group(layout.tp, 1, machines).exchange(2 * share.tokens * share.hidden * width, operations=2)
        seconds += (4 * share.layers + 2 * share.again) * reduced.seconds
    if layout.sp > 1:  # queries, keys and values at once, and attention's output
        whole = share.tokens * 2 * (share.queries + share.keys) * width
        rearranged = 4 * whole / (facts.memory * 1e9)
        passes = 2 * share.layers + share.again
        seconds += passes * (_Group(layout.sp, 1, machines).exchange(whole, operations=2).seconds + rearranged)
    if layout.pp > 1:  # forward and backward, half of it beside products; tensor-parallel ranks all send the whole
        replica = layout.tp * layout.sp * layout.pp
        speed = facts.collectives if replica <= machines.per_host else machines.network
        whole = share.tokens * share.hidden * width
        seconds += layout.chunks * whole / (speed * 1e9)
        if layout.token_parts > 1:  # which they gather first, and the gradient at the other end
            seconds += 2 * layout.chunks * _Group(layout.tp, layout.sp, machines).exchange(whole).seconds
    return seconds


def _update(job: Job, machines: Machines, stage: int, busiest: _Pass, count: int) -> tuple[float, float, float]:
    """Return the seconds of the update on the GPU, those on the host, and those that data parallelism adds."""
    layout, facts, width = job.layout, machines.facts, job.dtype.itemsize
    module, sizes = layout.traits.module, _trained(job, stage)
    parameters, in_chunks = sum(sizes), module in ("gemini", "fsdp")
    shards = layout.gradient_ranks // layout.extra_dp if layout.zero_stage else 1
    own, several = parameters / shards, layout.gradient_ranks > 1
    kept = FP32 if job.accumulates or (several and job.reduce_dtype.itemsize == FP32) else width
    moved = own * (2 * kept + 2 * MASTER_AND_MOMENTS + width)  # the norm reads gradients too
    host = 0.0
    per_weight = 1 if _stored_in_float8(job) else width
    if module == "gemini":  # gradients to float32, and master weights to the chunk
        moved += own * (2 if per_weight == width else 1) * (width + FP32)
    if per_weight < width:
        moved += own * (2 * FP32 + 1)
    offloaded = 1.0 if "optimizer" in layout.traits.on_host else job.placement.offload_optim_frac
    if offloaded:
        moved = (1 - offloaded) * moved + own * 2 * width
        host = offloaded * own / (facts.host_adam * 1e9)
        if in_chunks:  # float32 gradients and weights are copied before and after the update, not meanwhile
            host += offloaded * own * (FP32 + width) / (facts.host_link * 1e9)
    fetched = 1.0 if "weights" in layout.traits.on_host else job.placement.offload_param_frac
    host += 2 * count * fetched * own * width / (facts.host_link * 1e9)  # for the forward and the backward pass
    update = moved / (facts.memory * 1e9)
    if not several:
        return update, host, 0.0

    # Pipeline and tensor parallelism, and Gemini's copies, take neighbouring ranks, data parallelism those in between.
    copies, at_end = layout.extra_dp, job.exchanges_at_update
    group = _Group(layout.gradient_ranks // copies, layout.tp * layout.pp * copies, machines)
    operations = job.config.num_hidden_layers if in_chunks else 1 + sum(size >= zero.SMALL for size in sizes)
    narrow = layout.zero_stage > 0 and group.hosts == 1 and not at_end  # see engine/reduction.py; sums are float32
    sent = width if narrow else job.reduce_dtype.itemsize
    passes = 1 if layout.zero_stage else 2  # an all-reduce also gathers
    reduction = group.exchange(passes * sent * parameters, passes * operations)
    reduction += _Group(copies, layout.tp, machines).exchange(2 * job.reduce_dtype.itemsize * own, 2 * operations)
    summing = 0.0
    if narrow and job.reduce_dtype.itemsize > width:
        summing = (width * parameters + FP32 * own) / (facts.memory * 1e9)
    if in_chunks:
        gathering = group.exchange(per_weight * parameters, operations)
        both = gathering if at_end else gathering + reduction
        added = gathering.beside(busiest.kernels - busiest.backward) + both.beside(busiest.backward)
        return update, host, count * added + (reduction.seconds if at_end else 0) + (1 if at_end else count) * summing
    added = reduction.seconds if at_end else count * reduction.beside(busiest.backward)
    added += (1 if at_end else count) * summing
    if layout.zero_stage:
        added += group.exchange(per_weight * parameters, operations).beside(update + host)
    return update, host, added
