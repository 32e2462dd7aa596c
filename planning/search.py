"""Search for the layouts of a model that train fastest on given GPUs, by the estimates of time and memory."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import LlamaConfig

from attn import select_attention
from engine.job import MICRO_BATCH, STEP, Compute, Job
from engine.layout import Batch, Parallelism
from planning.machines import Machines
from planning.memory import estimate_memory, settle_for, usable
from planning.step_time import StepTime, estimate_step, estimated_mfu

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)  # sequences
RECOMPUTED = ((0.0, False), (0.25, True), (0.5, True), (0.75, True), (1.0, True), (1.0, False))  # fraction, --keep_...
BOUND = 0.1  # share of a step from which something else than compute bounds it
ALIKE = 0.05  # relative difference of two estimates that says little: their largest error


@dataclass(frozen=True)
class Wish:
    """A wish: the model to train, the GPUs, and the batch.

    Attributes:
        tokens: of an optimizer step.
        memory: of a GPU, in bytes.
        fp8: also consider float8.
    """

    config: LlamaConfig
    machines: Machines
    gpus: int
    memory: float
    max_length: int
    tokens: int
    fp8: bool

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step."""
        return self.tokens // self.max_length

    @property
    def even_tokens(self) -> int:
        """Tokens nearest to those of a step that give each GPU as many whole sequences."""
        whole = self.gpus * self.max_length
        return max(1, round(self.tokens / whole)) * whole

    def problems(self) -> list[str]:
        """Return a line for each number that fits no layout."""
        problems, per_host = [], self.machines.per_host
        if self.tokens % self.max_length or not self.sequences:
            problems.append(
                f"--batch_tokens: {self.tokens:,} is not a number of whole sequences of --max_length "
                f"{self.max_length}; give {self.even_tokens}"
            )
        if self.gpus > per_host and self.gpus % per_host:
            problems.append(f"--gpus: {self.gpus} is not divisible by --gpus_per_node {per_host}; take whole hosts")
        if self.max_length > self.config.max_position_embeddings:
            context = self.config.max_position_embeddings
            problems.append(f"--max_length: {self.max_length} is above the model's context of {context} tokens")
        return problems


@dataclass(frozen=True)
class Found:
    """A layout with the step time and the peak bytes that are estimated for it."""

    job: Job
    step: StepTime
    peak: float
    recomputation: float  # seconds of the step that recomputation takes

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens_per_step / self.step.total

    def mfu(self, peak_tflops: float) -> float:
        """Return the fraction of the GPUs' peak, as in `benchmark.py`."""
        return estimated_mfu(self.job, self.step, peak_tflops)

    @property
    def bound(self) -> str:
        """Largest loss of the step beside the work itself: link, bubble or memory; compute if it is small."""
        step = self.step
        lost = {"link": step.exchange, "bubble": step.bubble, "memory": self.recomputation + step.host}
        largest = max(lost, key=lambda name: lost[name])
        return largest if lost[largest] > BOUND * step.total else "compute"


def fastest(wish: Wish, count: int = 10) -> list[Found]:
    """Return the fastest layouts that fit, each with its best micro-batch and recomputation; the fastest first."""
    bounds = [(_least_seconds(job, wish.machines), number, job) for number, job in enumerate(_jobs(wish))]
    best: dict[object, Found] = {}
    for bound, _, job in sorted(bounds, key=lambda each: each[0]):
        known = sorted(found.step.total for found in best.values())
        if len(known) >= count and bound >= known[count - 1]:
            break
        layout = replace(job.parallelism, zero=None, microbatch_size=1, pp_style="1f1b", model_chunks=None)
        key = layout, job.compute.fp8
        if key in best and bound >= best[key].step.total:
            continue
        found = _least_recomputation(job, bound, wish)
        if found and (key not in best or found.step.total < best[key].step.total):
            best[key] = found
    return sorted(best.values(), key=lambda found: found.step.total)[:count]


def _least_seconds(job: Job, machines: Machines) -> float:
    """Return a lower bound of a step's time: nothing is recomputed, and gradients are exchanged in the faster way."""
    ways = [replace(job, exchange=replace(job.exchange, exchange=way)) for way in (MICRO_BATCH, STEP)]
    return min(estimate_step(way, machines).total for way in (ways if job.accumulates else ways[:1]))


def leanest(wish: Wish) -> tuple[Job, float] | None:
    """Return the layout that takes least memory, recomputing all, and its peak bytes; None: none divides the sizes."""
    peaks = ((job, estimate_memory(job).peak.total) for job in map(_all_recomputed, _jobs(wish)))
    return min(peaks, default=None, key=lambda each: each[1])


def _all_recomputed(job: Job) -> Job:
    return replace(job, compute=replace(job.compute, recompute=1.0))


def _least_recomputation(job: Job, without: float, wish: Wish) -> Found | None:
    """Return the job with the least recomputation that fits, or None; `without` is its time without any."""
    if estimate_memory(_all_recomputed(job)).peak.total > usable(wish.memory):
        return None
    for fraction, keep_attention in RECOMPUTED:
        compute = replace(job.compute, recompute=fraction, keep_attention=keep_attention)
        settled = settle_for(replace(job, compute=compute), wish.memory)
        peak = estimate_memory(settled).peak.total
        if peak <= usable(wish.memory):
            step = estimate_step(settled, wish.machines)
            return Found(settled, step, peak, step.total - without)
    return None


def _jobs(wish: Wish) -> Iterator[Job]:
    """Yield every job that divides the sizes, without recomputation."""
    for parallelism, batch in _layouts(wish):
        for fp8 in (False, True) if wish.fp8 else (False,):
            config = copy.copy(wish.config)
            select_attention(config, flash_attention=True, sequence_parallel=parallelism.sp > 1)
            job = Job(config, parallelism, batch, Compute(flash_attention=True, fp8=fp8))
            if not job.problems():
                yield job


def _layouts(wish: Wish) -> Iterator[tuple[Parallelism, Batch]]:
    gpus, sequences, length = wish.gpus, wish.sequences, wish.max_length
    for plugin in ("zero2", "gemini", "zero2_cpu", "gemini_auto"):
        per_rank, rest = divmod(sequences, gpus)
        for size in _divisors(per_rank, MICRO_BATCHES) if per_rank and not rest else ():
            yield Parallelism(plugin, gpus=gpus), Batch(size, per_rank // size, length)
    within = _divisors(wish.machines.per_host)
    layers = _divisors(wish.config.num_hidden_layers)
    for tp, sp, pp in ((tp, sp, pp) for tp in within for sp in within for pp in layers):
        replicas, rest = divmod(gpus, tp * sp * pp)
        if rest or tp * sp > wish.machines.per_host or tp * sp * pp == 1 or not replicas or (pp > 1 and sp > 1):
            continue
        per_replica, rest = divmod(sequences, replicas)
        for size in _divisors(per_replica, MICRO_BATCHES) if per_replica and not rest else ():
            for zero in (0,) if replicas * sp == 1 else (1, 2) if pp == 1 else (1,):
                layout = Parallelism("hybrid_parallel", tp=tp, pp=pp, sp=sp, zero=zero, gpus=gpus)
                if pp == 1:
                    yield layout, Batch(size, per_replica // size, length)
                    continue
                batch = Batch(per_replica, 1, length)
                yield replace(layout, microbatch_size=size), batch
                for chunks in (2, 4):
                    interleaved = replace(layout, pp_style="interleaved", model_chunks=chunks)
                    yield replace(interleaved, microbatch_size=size), batch


def _divisors(number: int, of: tuple[int, ...] = ()) -> list[int]:
    """Return the numbers that divide a number: those up to it, or those in `of`."""
    return [size for size in of or range(1, number + 1) if number % size == 0]


def describe_split(job: Job) -> str:
    """Return the plugin, or the sizes of hybrid_parallel that are not 1."""
    layout = job.layout
    sizes = {"tp": layout.tp, "pp": layout.pp, "sp": layout.sp}
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return (f"{split}, interleaved" if layout.chunks > 1 else split) or layout.plugin


def flags_of(job: Job) -> str:
    """Return the flags of pretrain.py for a job of this search, without those of the model and the data."""
    asked, batch, compute = job.parallelism, job.batch, job.compute
    parts = [f"-p {asked.plugin}"]
    if asked.traits.splits:
        parts += [f"--tp {asked.tp} --pp {asked.pp}", *([f"--sp {asked.sp}"] if asked.sp > 1 else [])]
        parts.append(f"--zero {asked.zero}")
    if job.layout.pp > 1:
        parts.append(f"--microbatch_size {asked.microbatch_size}")
    if job.layout.chunks > 1:
        parts.append(f"--pp_style interleaved --model_chunks {asked.model_chunks}")
    parts.append(f"-b {batch.batch_size} -l {batch.max_length}")
    if batch.accumulation_steps > 1:
        parts.append(f"--accumulation_steps {batch.accumulation_steps}")
    parts.append(f"-x {compute.mixed_precision} -a")
    if job.recomputed:
        parts.append("-g" if job.recomputed == 1 else f"--recompute {job.recomputed:g}")
    if compute.keep_attention:
        parts.append("--keep_attention")
    if compute.fp8:
        parts.append("--fp8")
    return " ".join(parts)


def simplest(found: list[Found]) -> int:
    """Return the index of the simplest of the layouts that are as fast as the first within the estimate's error.

    Simple is to keep nothing in host memory, then to split nothing but states and weights, then few splits.
    """

    def complexity(each: Found) -> tuple[bool, bool, int]:
        layout = each.job.layout
        splits = sum(size > 1 for size in (layout.tp, layout.pp, layout.sp, layout.chunks))
        return bool(layout.traits.on_host), layout.traits.splits, splits

    close = [each for each in found if each.step.total <= (1 + ALIKE) * found[0].step.total]
    return found.index(min(close, key=complexity))
