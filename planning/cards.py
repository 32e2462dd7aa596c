"""GPUs by name, with figures of their vendor's data sheets."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU model, with figures of its vendor's data sheet."""

    name: str
    peak_tflops: float  # dense bf16 and fp16 tensor-core operations
    memory_gb: float  # nominal, in 10^9 bytes; most have 7% more, since vendors mean GiB
    bandwidth: float = math.nan  # of its memory, in GB/s
    link: float = math.nan  # GB/s to the other GPUs of a host, one way: NVLink through a switch, else PCIe
    peak_float8_tflops: float | None = None  # dense, with sums in float32; None: it has no float8


# The first whose name is part of the device's name counts, so longer names come first.
CARDS = (
    Card("B200", 2250.0, 180, 8000, 900, 4500.0),
    Card("H100 PCIe", 756.0, 80, 2000, 64, 1513.0),
    Card("H100 NVL", 835.0, 94, 3900, 64, 1671.0),
    Card("H100", 989.0, 80, 3350, 450, 1979.0),
    Card("H200", 989.0, 141, 4800, 450, 1979.0),
    Card("H800", 989.0, 80, 3350, 200, 1979.0),
    Card("A100-SXM4-40GB", 312.0, 40, 1555, 300),
    Card("A100-PCIE-40GB", 312.0, 40, 1555, 32),
    Card("A100", 312.0, 80, 2039, 300),
    Card("A800", 312.0, 80, 2039, 200),
    Card("L40S", 362.0, 44, 864, 32, 733.0),  # of 48 GB: error correction takes the rest, also in the A10G
    Card("A10G", 70.0, 22, 600, 32),
    Card("RTX 4090", 165.2, 24, 1008, 32, 330.3),
    Card("RTX 3090", 71.0, 24, 936, 32),
)


def find_card(device_name: str) -> Card | None:
    """Return the card of a device, or None if the table lacks it."""
    return next((card for card in CARDS if card.name.lower() in device_name.lower()), None)
