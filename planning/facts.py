"""Facts about a GPU model and its links, from which step times are estimated: built in, or measured into a file."""

import bisect
import json
import math
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from planning.cards import Card, find_card
from runtime.console import InputError
from runtime.files import write_json

# A speed that depends on the size of the work: points of (size, speed), the sizes ascending.
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Facts:
    """Speeds of one GPU, of its links to others, and of its share of the host.

    Attributes:
        card: name of the GPU.
        products: TFLOPS of a matrix product in bf16 or fp16, by its GFLOP.
        float8_products: the same with float8 operands that are scaled as a whole; empty: the GPU has none.
        rowwise_products: the same, scaled by rows.
        float32: TFLOPS of matrix products in float32.
        attention: TFLOPS of a fused causal attention kernel's forward pass, by the sequence's tokens; half of the
            scores count.
        attention_backward: the same of its backward pass.
        memory: GB/s that element-wise kernels read and write.
        collectives: GB/s that each GPU sends in collective operations within a host.
        copies: GB/s of copies from another GPU of the host by copy engines.
        network: GB/s that each GPU sends in collective operations between hosts; 0: not measured.
        latency: microseconds of a step of a ring within a host, and between hosts.
        overlap: fraction of the time of a collective operation by which kernels that run beside it are delayed, within
            a host and between hosts.
        spread: fraction of a step by which the slowest of several GPUs is late.
        bubble: fraction of the time that pipeline stages wait for one another by which a step is longer; probably a
            GPU that waits takes less power, and computes faster before and after.
        host_link: GB/s between the GPU and host memory.
        host_adam: 10^9 parameters that a GPU's share of the host updates per second.
        loader: 10^6 tokens per second that a loader process prepares, already tokenized.
        idle: milliseconds of a step in which the GPU waits for the host.
        launch: milliseconds in which the host launches a layer's kernels, forward and backward.
        origin: words that say where the speeds come from.
    """

    card: str
    products: Curve
    float8_products: Curve
    rowwise_products: Curve
    float32: float
    attention: Curve
    attention_backward: Curve
    memory: float
    collectives: float
    copies: float
    network: float
    latency: tuple[float, float]
    overlap: tuple[float, float]
    spread: float
    bubble: float
    host_link: float
    host_adam: float
    loader: float
    idle: float
    launch: float
    origin: str


# From profiles of single kernels on an H100 and an H200 with torch 2.11 (docs/planner.md), then fitted to the rows of
# docs/results.md, all at once; attention of 32,768 tokens from a single step. Not measured, but assumed: float32,
# launch, the speed and latency between hosts, and what products lose beside a collective operation between hosts.
_H100 = Facts(
    card="H100",
    products=((1, 150), (10, 340), (100, 650), (500, 690), (2000, 672)),
    float8_products=((1, 150), (10, 500), (100, 930), (500, 1350), (2000, 1160)),
    rowwise_products=((1, 100), (10, 400), (100, 1100), (500, 1300)),
    float32=50,
    attention=((4096, 478), (32768, 640)),
    attention_backward=((4096, 399), (32768, 535)),
    memory=3160,
    collectives=345,
    copies=370,
    network=0,
    latency=(3, 8),
    overlap=(0.78, 0.2),
    spread=0.029,
    bubble=0.65,
    host_link=50,
    host_adam=3.2,
    loader=100,
    idle=6.5,
    launch=0.4,
    origin="of an H100",
)
# As published (docs/planner.md): products, memory and links; attention by flash-attn 2.
_A100 = replace(
    _H100,
    card="A100",
    products=((1, 70), (10, 150), (100, 225), (500, 254), (2000, 252)),
    float8_products=(),
    rowwise_products=(),
    float32=17,
    attention=((4096, 185),),
    attention_backward=((4096, 165),),
    memory=1680,
    collectives=225,
    copies=270,
    host_link=26,
    origin="of an A100, as others published",
)
BUILT_IN = {
    "H100": _H100,
    "H200": replace(_H100, card="H200", memory=3580, origin="of an H200"),
    "A100": _A100,
    "A800": replace(_A100, card="A800", collectives=150, copies=180),
}
SLOWEST, FASTEST = 1e-6, 1e9  # that a fact in a file may be
FLOAT8_CURVES = ("float8_products", "rowwise_products")  # empty if the GPU has no float8
CURVES = {
    **dict.fromkeys(("products", *FLOAT8_CURVES), "GFLOP"),
    **dict.fromkeys(("attention", "attention_backward"), "tokens"),
}


def at(curve: Curve, size: float) -> float:
    """Return the speed for work of a size: linear in the size's logarithm, and constant outside of the curve."""
    right = bisect.bisect([point for point, _ in curve], size)
    if right in (0, len(curve)):
        return curve[min(right, len(curve) - 1)][1]
    (before, low), (after, high) = curve[right - 1 : right + 1]
    return low + (high - low) * math.log(size / before) / math.log(after / before)


def facts_of(card: Card, file: Path | None = None) -> Facts | None:
    """Return the facts in a file, else the built-in ones; a GPU that was not measured gets an H100's, scaled.

    They are scaled by the data sheets' ratios; None if the card is not in the table of data sheets.

    Raises:
        InputError: the file cannot be read or is not one of facts.
    """
    if file:
        return replace(read_facts(file), origin=f"in {file}")
    if card.name in BUILT_IN:
        return BUILT_IN[card.name]
    known, basis = find_card(card.name), find_card(_H100.card)
    if known is None:
        return None
    assert basis is not None
    speed, memory, link = (getattr(known, name) / getattr(basis, name) for name in ("peak_tflops", "bandwidth", "link"))

    def scaled(curve: Curve) -> Curve:
        return tuple((size, tflops * speed) for size, tflops in curve)

    float8 = known.peak_float8_tflops is not None
    return replace(
        _H100,
        card=known.name,
        origin="of an H100, scaled by data sheets",
        products=scaled(_H100.products),
        float8_products=scaled(_H100.float8_products) if float8 else (),
        rowwise_products=scaled(_H100.rowwise_products) if float8 else (),
        float32=_H100.float32 * speed,
        attention=scaled(_H100.attention),
        attention_backward=scaled(_H100.attention_backward),
        memory=_H100.memory * memory,
        collectives=_H100.collectives * link,
        copies=_H100.copies * link,
    )


def write_facts(file: Path, facts: Facts) -> None:
    """Write facts as JSON. Raises OSError."""
    write_json(file, asdict(facts))


def read_facts(file: Path) -> Facts:
    """Return the facts in a JSON file, as `write_facts` writes it.

    Raises:
        InputError: the file cannot be read, lacks a fact, has an unknown one, or one that is not a positive speed.
    """
    remedy = "write one with scripts/doctor.py --measure"
    try:
        if file.exists() and not file.is_file():  # a pipe can be read only once
            raise InputError(f"--facts: {file} is not a regular file; {remedy}")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--facts: {file} cannot be read as JSON ({error}); {remedy}") from error
    names = [field.name for field in fields(Facts)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        wrong = sorted(set(names) ^ set(found)) if isinstance(values, dict) else found
        raise InputError(f"--facts: {file} is not a file of facts: missing or unknown are {wrong}; {remedy}")
    facts = Facts(**{name: _tuples(value) for name, value in values.items()})
    if problem := next(filter(None, (_problem(name, getattr(facts, name)) for name in names)), None):
        raise InputError(f"--facts: {file}: {problem}; {remedy}")
    return facts


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _problem(name: str, value: Any) -> str | None:
    """Return what is wrong with a fact's value, or None."""
    may_be_zero = name in ("network", "latency", "overlap", "spread", "bubble", "idle", "launch")
    largest = 1 if name in ("overlap", "spread", "bubble") else FASTEST  # these are fractions

    def is_speed(number: Any) -> bool:
        right = isinstance(number, int | float) and not isinstance(number, bool)
        return right and (SLOWEST <= number <= largest or (may_be_zero and number == 0))

    if name in ("card", "origin"):
        return None if isinstance(value, str) and value and value.isprintable() else f"{name} is not a printable text"
    if name in CURVES:
        points = isinstance(value, tuple) and all(isinstance(point, tuple) and len(point) == 2 for point in value)
        if not points or not all(map(is_speed, (number for point in value for number in point))):
            return f"{name} is not a list of pairs of {CURVES[name]} and TFLOPS"
        sizes = [size for size, _ in value]
        if sizes != sorted(set(sizes)) or (not value and name not in FLOAT8_CURVES):
            return f"the sizes of {name} do not ascend"
        return None
    pair = name in ("latency", "overlap")
    numbers = value if pair and isinstance(value, tuple) else (value,)
    if len(numbers) != (2 if pair else 1) or not all(map(is_speed, numbers)):
        text = reprlib.repr(value)
        return f"{name} is {text}, not {'two positive numbers' if pair else 'a positive number'} up to {largest:g}"
    return None
