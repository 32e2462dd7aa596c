"""The order in which a run reads its sequences: shuffled, mixed from slices by weight, shared among ranks.

Every order is a pure function of seed and position, in memory that no number of sequences changes.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

from torch.utils.data import Dataset, Sampler

from runtime.console import InputError


class Order(Protocol):
    """The number of the sequence at each position of a run, from 0 on over all epochs."""

    def __getitem__(self, position: int, /) -> int: ...


def splitmix64(x: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Permutation(Sequence[int]):
    """A pseudo-random permutation of range(n), keyed by (seed, epoch), in O(1) memory.

    A balanced Feistel network permutes the next power of four; values outside range(n) are sent through it again
    until they fall inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        key = splitmix64(splitmix64(seed & 0xFFFFFFFFFFFFFFFF) ^ epoch)
        self.keys = [splitmix64(key + number) for number in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # slices of it are never asked for
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} of {self.n}")
        value = self._feistel(index)
        while value >= self.n:
            value = self._feistel(value)
        return value

    def _feistel(self, value: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        return left << self.half_bits | right


_permutation = lru_cache(maxsize=256)(Permutation)


class GlobalOrder:
    """The endless order in which a run reads its sequences, the same on every rank.

    Position p is the (p % n)-th sequence of epoch p // n, so a batch may straddle two epochs and within an epoch
    each sequence comes exactly once. Without shuffling, each epoch goes through the sequences as they are stored.
    """

    def __init__(self, num_sequences: int, seed: int, shuffle: bool = True):
        self.num_sequences = num_sequences
        self.seed = seed
        self.shuffle = shuffle

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.num_sequences)
        return _permutation(self.num_sequences, self.seed, epoch)[index] if self.shuffle else index


# Touvron et al. 2023, "LLaMA" (arXiv:2302.13971) table 1: per cent of the sequences drawn, by RedPajama's names.
LLAMA_WEIGHTS = {
    "common_crawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "book": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}


class MixedOrder:
    """An endless order that draws from slices by weight, the same on every rank, in memory that no length changes.

    Each BLOCK of positions holds a slice as often as its share of the block says, in a pseudo-random arrangement that
    is a permutation of the block. So how often a slice was drawn before any position follows from the position alone,
    and with it the epoch of the slice and the place in that epoch's permutation of the slice's sequences.
    """

    BLOCK = 10_000

    def __init__(self, slices: dict[str, range], weights: dict[str, float], seed: int):
        """Draws from `slices`.

        Args:
            slices: the sequences of each slice.
            weights: of the slices to draw from, in proportion; rounded to one in BLOCK, and not to none.

        Raises:
            InputError: a weight's slice is not there, or has no whole sequence.
        """
        missing = [name for name in weights if not slices.get(name)]
        if missing:
            there = ", ".join(f"{name} ({len(sequences):,} sequences)" for name, sequences in slices.items())
            raise InputError(
                f"--slice_weights: the data have no whole sequence of {', '.join(missing)}; they have {there}"
            )
        self.names = sorted(weights)
        self.sequences = [slices[name] for name in self.names]
        self.keys = [splitmix64(splitmix64(seed) ^ number) for number in range(len(self.names) + 1)]
        total = sum(weights.values())
        shares = [max(1, round(weights[name] / total * self.BLOCK)) for name in self.names]
        shares[shares.index(max(shares))] += self.BLOCK - sum(shares)  # what rounding left over
        self.bounds = [0, *itertools.accumulate(shares)]

    def __getitem__(self, position: int) -> int:
        block, place = divmod(position, self.BLOCK)
        place = _permutation(self.BLOCK, self.keys[-1], block)[place]
        number = bisect_right(self.bounds, place) - 1
        sequences = self.sequences[number]
        drawn = block * self._share(number) + place - self.bounds[number]
        epoch, index = divmod(drawn, len(sequences))
        return sequences[_permutation(len(sequences), self.keys[number], epoch)[index]]

    def _share(self, number: int) -> int:
        return self.bounds[number + 1] - self.bounds[number]

    def describe(self, positions: int) -> str:
        """The share of each slice, and how often so many positions go through it."""
        parts = []
        for number, (name, sequences) in enumerate(zip(self.names, self.sequences, strict=True)):
            share = self._share(number) / self.BLOCK
            parts.append(f"{name} {share:.1%} ({share * positions / len(sequences):.2f})")
        return ", ".join(parts)


class ShardedSampler(Sampler[int]):
    """A data-parallel rank's share of the order: positions start + rank, start + rank + num_replicas, ... below stop.

    `start` and `stop` count sequences over all ranks from the beginning of training, across epochs. Hence a run that
    resumes at `start` on another number of ranks continues the same order. The first four arguments are those of
    `torch.utils.data.DistributedSampler`, so that `functools.partial(ShardedSampler, seed=..., start=..., stop=...)`
    can stand for it.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        *,
        seed: int,
        start: int = 0,
        stop: int,
        order: Callable[[int], Order] | None = None,
    ):
        """
        Args:
            order: gives the data set's own order of a seed, instead of GlobalOrder.
        """
        self.order = order(seed) if order else GlobalOrder(len(dataset), seed, shuffle)  # type: ignore[arg-type]
        self.positions = range(start + rank, stop, num_replicas)

    def __iter__(self) -> Iterator[int]:
        return map(self.order.__getitem__, self.positions)

    def __len__(self) -> int:
        return len(self.positions)
