"""Measurement of the facts that step times are estimated from, on this machine's cards and the links between ranks."""

import datetime
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.float8 import E4M3, E5M2, Factor, factor, multiply
from engine.job import FLOAT8_ALIGNMENT
from planning.cards import find_card
from planning.facts import BUILT_IN, Curve, Facts, facts_of
from runtime.collectives import gather
from runtime.console import local_rank, local_world_size, rank, say, world_size

FALLS_SHORT = 0.9  # of the speed expected
ALL_GATHER = 255 / 345  # over two H200, 512 MiB, of the built-in speed, which was fitted to training steps
LINK_SECONDS = 2  # at most, for all but the first two rounds of a collective operation


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured work: seconds to measure each, GFLOP of products, and MB of tensors."""

    seconds: float
    products: tuple[float, ...]
    float32: float  # GFLOP
    attention: tuple[tuple[int, int, int], ...]  # batch, heads, tokens
    tensor: int  # MB
    message: int  # MB gathered from all ranks


ON_GPU = Sizes(0.7, (1, 10, 100, 500, 2000), 100, ((2, 32, 4096), (1, 8, 32768)), 1024, 512)
ON_CPU = Sizes(0.05, (0.001, 0.01, 0.1), 1, ((1, 4, 256), (1, 1, 1024)), 64, 16)


@dataclass(frozen=True)
class Shortfall:
    """A speed that is well below the built-in one, and where."""

    place: str
    what: str
    measured: float
    expected: float
    unit: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what} {self.measured:,.0f} {self.unit}, expected {self.expected:,.0f}"


def measure() -> tuple[Facts, list[Shortfall]]:
    """Measure all facts, with the speeds of the slowest card and link, and what falls short. Collective over all ranks.

    Without other ranks on the host, or without other hosts, facts about the links between them are those of the card's
    data sheet; of an unknown card those of its link to the host.
    """
    on_gpu = torch.cuda.is_available()
    sizes, device = (ON_GPU, torch.device("cuda")) if on_gpu else (ON_CPU, torch.device("cpu"))
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    card = find_card(name)
    known = facts_of(card) if card else None
    float8 = on_gpu and torch.cuda.get_device_capability() >= (8, 9)

    say("measuring products")
    products = _curve(sizes, device, torch.bfloat16)
    tensorwise = _float8_curve(sizes, device, rowwise=False) if float8 else ()
    rowwise = _float8_curve(sizes, device, rowwise=True) if float8 else ()
    ((_, single),) = _curve(replace(sizes, products=(sizes.float32,)), device, torch.float32)
    say("measuring attention, memory and the host")
    ahead, back = zip(*(_attention(*shape, sizes, device) for shape in sizes.attention), strict=True)
    memory = _memory(sizes, device)
    link = _host_link(sizes, device)
    adam = _host_adam(sizes)
    loader = _loader()
    own = [products[-1][1], memory, ahead[0][1], link]
    everywhere = gather((f"{socket.gethostname()}, GPU {local_rank()}", own))
    slowest = [min(values) for values in zip(*(values for _, values in everywhere), strict=True)]
    single, adam, loader = map(min, zip(*gather((single, adam, loader)), strict=True))

    near = far = None
    if world_size() > 1:
        say("measuring links")
        near, far = _links(sizes, device)
    copied = [speed for speed in gather(_copies(sizes)) if speed]
    copies = min(copied, default=None)
    fallback = known.collectives if known else link
    latency = known.latency if known else BUILT_IN["H100"].latency
    overlap = known.overlap if known else BUILT_IN["H100"].overlap
    hosts = world_size() // local_world_size()
    where = f"{world_size()} x {name}" + (f" in {hosts} hosts" if hosts > 1 else "")
    assumed = "" if near else "; links as in its data sheet" if known else "; links as fast as that to the host"
    hosts_links = [
        (place.partition(",")[0], speed)
        for (place, _), speed in zip(everywhere[:: local_world_size()], near.by_host if near else (), strict=False)
    ]
    facts = Facts(
        card=card.name if card else name,
        products=_scaled(products, slowest[0] / products[-1][1]),
        float8_products=_scaled(tensorwise, slowest[0] / products[-1][1]),
        rowwise_products=_scaled(rowwise, slowest[0] / products[-1][1]),
        float32=single,
        attention=_scaled(ahead, slowest[2] / own[2]),
        attention_backward=_scaled(back, slowest[2] / own[2]),
        memory=slowest[1],
        collectives=near.speed if near else fallback,
        copies=copies or (near.speed if near else known.copies if known else link),
        network=far.speed if far else 0,
        latency=(near.latency if near else latency[0], far.latency if far else latency[1]),
        overlap=(near.overlap if near else overlap[0], far.overlap if far else overlap[1]),
        spread=BUILT_IN["H100"].spread if on_gpu else 0,
        bubble=BUILT_IN["H100"].bubble if on_gpu else 1,
        host_link=slowest[3],
        host_adam=adam,
        loader=loader,
        idle=BUILT_IN["H100"].idle if on_gpu else 0,
        launch=BUILT_IN["H100"].launch if on_gpu else 0,
        origin=f"measured on {where}, {datetime.date.today()}{assumed}",
    )
    return facts, list(_shortfalls(known, everywhere, hosts_links)) if on_gpu else []


def _scaled(curve: Curve, ratio: float) -> Curve:
    return tuple((size, speed * ratio) for size, speed in curve)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object], at_least: float) -> float:
    """Return the seconds of a call, from calls that take `at_least` so many seconds after a first one."""
    work()
    _synchronize()
    calls, started = 1, time.perf_counter()
    while True:
        for _ in range(calls):
            work()
        _synchronize()
        elapsed = time.perf_counter() - started
        if elapsed >= at_least:
            return elapsed / calls
        calls, started = max(calls + 1, min(8 * calls, int(1.2 * calls * at_least / elapsed))), time.perf_counter()


def _side(gflop: float) -> int:
    """Return the size of square matrices whose product takes so many GFLOP."""
    return max(FLOAT8_ALIGNMENT, round((gflop * 1e9 / 2) ** (1 / 3) / 64) * 64)


def _curve(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Curve:
    """Return the mean TFLOPS of the three products of a linear layer, whose operands are transposed differently."""
    points = []
    for side in map(_side, sizes.products):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        pairs = ((left, right.t()), (left, right), (left.t(), right))
        points.append(_point(side, sizes, [partial(torch.matmul, *pair) for pair in pairs]))
    return tuple(points)


def _point(side: int, sizes: Sizes, products: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Return the GFLOP of products of square matrices, and the TFLOPS at which they are computed."""
    flops = 2 * side**3
    seconds = statistics.fmean(_seconds(product, sizes.seconds / len(products)) for product in products)
    return flops / 1e9, flops / seconds / 1e12


def _float8_curve(sizes: Sizes, device: torch.device, rowwise: bool) -> Curve:
    """Return the mean TFLOPS of the three products of a linear layer in float8, whose operands are converted before."""
    points = []
    for side in map(_side, sizes.products):
        left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        first = factor(left, E4M3, 1 if rowwise else None)
        back = first if rowwise else factor(left, E5M2)
        weight = factor(right, E4M3, 1 if rowwise else None).t()
        operands = Factor(weight.values.t().contiguous().t(), weight.scale)  # as kernels take it, so not copied here
        lefts = ((first, True), (back, False), (back, False))
        products = [partial(multiply, one, operands, torch.bfloat16, fast) for one, fast in lefts]
        points.append(_point(side, sizes, products))
    return tuple(points)


def _attention(
    batch: int, heads: int, tokens: int, sizes: Sizes, device: torch.device
) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return the tokens and TFLOPS of causal attention with heads of 128, forward and backward, for the curves."""
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    dtype = half if device.type == "cuda" else torch.float32  # a fused kernel needs what the GPU has
    shape = (batch, heads, tokens, 128)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def both() -> None:
        torch.autograd.grad(forward(), (query, key, value), gradient)

    ahead, whole = _seconds(forward, sizes.seconds), _seconds(both, sizes.seconds)
    tflop = 2 * batch * heads * tokens**2 * 128 / 1e12
    return (tokens, tflop / ahead), (tokens, 2.5 * tflop / max(whole - ahead, whole / 4))


def _memory(sizes: Sizes, device: torch.device) -> float:
    """Return the GB/s of an addition, which reads two tensors and writes one."""
    first, second, out = (torch.ones(sizes.tensor * 2**20 // 4, device=device) for _ in range(3))
    return 3 * first.nbytes / _seconds(lambda: torch.add(first, second, out=out), sizes.seconds) / 1e9


def _host_link(sizes: Sizes, device: torch.device) -> float:
    """Return the GB/s of copies from pinned host memory to the device, on all ranks of the host at once."""
    on_host = torch.ones(sizes.tensor * 2**18 // 4, pin_memory=device.type == "cuda")
    on_device = torch.empty_like(on_host, device=device)
    _meet()
    return on_host.nbytes / _seconds(lambda: on_device.copy_(on_host, non_blocking=True), sizes.seconds) / 1e9


def _host_adam(sizes: Sizes) -> float:
    """Return the 10^9 parameters that AdamW on the host updates per second, on all ranks of the host at once."""
    weight = torch.ones(sizes.tensor * 2**18 // 4, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight], fused=True)
    _meet()
    return weight.numel() / _seconds(adam.step, sizes.seconds) / 1e9


def _loader() -> float:
    """Return the 10^6 tokens per second that one process reads from tokenized data, in sequences in random order."""
    length, sequences = 4096, 4096
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * length * sequences)
        tokens = np.memmap(file, np.uint16, mode="r", shape=(sequences, length))
        order = iter(np.random.default_rng(0).integers(sequences, size=2**20).tolist())
        return length / _seconds(lambda: torch.from_numpy(tokens[next(order)].astype(np.int64)), 0.1) / 1e6


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


@dataclass(frozen=True)
class _Link:
    """GB/s that each rank sends in a collective operation, microseconds of a step, and the time lost beside it."""

    speed: float
    latency: float
    overlap: float
    by_host: tuple[float, ...] = ()  # speed in each host


def _links(sizes: Sizes, device: torch.device) -> tuple[_Link | None, _Link | None]:
    """Measure the links within a host, if it has several ranks, and between hosts, if there are several. Collective."""
    per_host, ranks = local_world_size(), world_size()
    groups = [dist.new_group(list(range(first, first + per_host))) for first in range(0, ranks, per_host)]
    everyone = dist.new_group()
    hosts = len(groups)
    near = far = None
    if per_host > 1:
        every, tiny, lost = _gathering(groups[rank() // per_host], sizes, device)
        sent = sizes.message * 2**20 * (per_host - 1) / per_host
        by_host = tuple(sent / max(every[first : first + per_host]) / 1e9 for first in range(0, ranks, per_host))
        near = _Link(min(by_host), tiny / (per_host - 1) * 1e6, lost, by_host)
    if hosts > 1:
        every, tiny, lost = _gathering(everyone, sizes, device)
        seconds = max(every)
        within = (near.latency if near else 0) * (ranks - hosts) / 1e6
        # What a ring sends leaves a host through the links of all its ranks; see `_Group.exchange` in step_time.py.
        sent = sizes.message * 2**20 * (ranks - 1) / ranks
        speed = sent * hosts / ranks / seconds / 1e9
        if near:  # see `_Exchange.beside` in step_time.py
            busy = min(sent / (near.speed * 1e9), seconds)
            lost = min(max(lost * seconds - near.overlap * busy, 0) / max(seconds - busy, 1e-9), 1)
        far = _Link(speed, max(tiny - within, 0) / hosts * 1e6, lost)
    return near, far


def _gathering(group: ProcessGroup | None, sizes: Sizes, device: torch.device) -> tuple[list[float], float, float]:
    """Return every rank's seconds of an all-gather, those of a tiny one, and the fraction that products beside it lose.

    Collective over all ranks.
    """
    ranks = dist.get_world_size(group)
    whole = torch.empty(sizes.message * 2**20 // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    part, tiny = torch.empty(len(whole) // ranks, dtype=whole.dtype, device=device), torch.empty(1, device=device)
    few = torch.empty(ranks, device=device)

    def repeated(work: Callable[[], object], rounds: int) -> list[float]:
        _meet()
        _synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        _synchronize()
        return gather((time.perf_counter() - started) / rounds)

    def timed(work: Callable[[], object], rounds: int = 10) -> list[float]:
        work()
        once = max(repeated(work, 1))  # a slow network could take minutes
        return repeated(work, max(1, min(rounds, int(LINK_SECONDS / once))))

    every = timed(lambda: dist.all_gather_into_tensor(whole, part, group=group))
    seconds, least = max(every), max(timed(lambda: dist.all_gather_into_tensor(few, tiny, group=group)))
    if device.type == "cpu":
        return every, least, 1.0
    side = _side(sizes.products[-2])
    left, right = (torch.randn(side, side, device=device, dtype=whole.dtype) for _ in range(2))
    alone = max(timed(lambda: left @ right, rounds=20))
    count = max(1, round(seconds / alone)) + 1

    def beside() -> None:
        work = dist.all_gather_into_tensor(whole, part, group=group, async_op=True)
        for _ in range(count):
            left @ right
        work.wait()

    lost = (max(timed(beside)) - count * alone) / seconds
    return every, least, min(max(lost, 0.0), 1.0)


def _copies(sizes: Sizes) -> float | None:
    """Return the GB/s of copies from the next GPU of the host, on all ranks at once; None if this process sees one."""
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2 or local_world_size() < 2:
        return None
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    source = torch.ones(sizes.tensor * 2**18 // 4, device=other)
    target = torch.empty_like(source, device="cuda")
    _meet()
    return source.nbytes / _seconds(lambda: target.copy_(source, non_blocking=True), sizes.seconds) / 1e9


def _shortfalls(
    known: Facts | None, everywhere: list[tuple[str, list[float]]], links: list[tuple[str, float]]
) -> Iterator[Shortfall]:
    """Yield the speeds that are well below those built in for this card, if it is known, or below the median of all.

    Args:
        everywhere: each rank's place and its speeds.
        links: each host's name and the speed of its collective operations.
    """
    kinds = (("matrix products", "TFLOPS"), ("memory", "GB/s"), ("attention", "TFLOPS"), ("link to the host", "GB/s"))
    built_in = (known.products[-1][1], known.memory, known.attention[0][1], known.host_link) if known else (0, 0, 0, 0)
    of_all = zip(*(values for _, values in everywhere), strict=True)
    usual = [max(speed, statistics.median_high(values)) for speed, values in zip(built_in, of_all, strict=True)]
    for place, values in everywhere:
        for measured, speed, (what, unit) in zip(values, usual, kinds, strict=True):
            if measured < FALLS_SHORT * speed:
                yield Shortfall(place, what, measured, speed, unit)
    of_hosts = max(
        ALL_GATHER * known.collectives if known else 0, statistics.median_high([speed for _, speed in links] or [0])
    )
    for host, speed in links:
        if speed < FALLS_SHORT * of_hosts:
            yield Shortfall(host, "collective operations within the host", speed, of_hosts, "GB/s")
