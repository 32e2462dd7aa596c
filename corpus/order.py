"""The order in which a run reads its sequences: shuffled, mixed by weight, or grouped by length.

Every order is a pure function of seed and position. Its memory does not grow with the number of sequences.
"""

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from runtime.console import InputError


class Order(Protocol):
    """Maps a position of the run, counted from 0 over all epochs, to the index of a sequence."""

    def __getitem__(self, position: int, /) -> int: ...


def splitmix64(x: int) -> int:
    """Hash a 64-bit number (SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Permutation(Sequence[int]):
    """A pseudo-random permutation of range(n), keyed by (seed, epoch), in O(1) memory.

    A balanced Feistel network permutes the next power of four. A value outside range(n) goes through it again until it
    falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        key = splitmix64(splitmix64(seed & 0xFFFFFFFFFFFFFFFF) ^ epoch)
        self.keys = [splitmix64(key + number) for number in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # slices are not supported
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
    """An endless order over n sequences, the same on every rank; each epoch has every sequence exactly once.

    Position p is the (p % n)-th sequence of epoch p // n, so a batch may straddle two epochs. Without shuffling, each
    epoch reads the sequences as they are stored.
    """

    def __init__(self, num_sequences: int, seed: int, shuffle: bool = True):
        self.num_sequences = num_sequences
        self.seed = seed
        self.shuffle = shuffle

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.num_sequences)
        return _permutation(self.num_sequences, self.seed, epoch)[index] if self.shuffle else index


# Percent of the sequences drawn, with RedPajama's names: table 1 of Touvron et al. 2023, "LLaMA" (arXiv:2302.13971).
LLAMA_WEIGHTS = {
    "common_crawl": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "wikipedia": 4.5,
    "book": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}


BLOCK = 10_000


def shares_of(weights: Iterable[float], block: int = BLOCK) -> list[int]:
    """Return how many of `block` draws each weight stands for: rounded, never 0, `block` in all."""
    weights = list(weights)
    shares = [max(1, round(weight / sum(weights) * block)) for weight in weights]
    shares[shares.index(max(shares))] += block - sum(shares)  # rounding's remainder
    return shares


class MixedOrder:
    """An endless order that draws from slices by weight, the same on every rank.

    Each block of BLOCK positions draws from a slice a fixed number of times, its share, in pseudo-random order. The
    position alone therefore gives the number of earlier draws from the slice, which gives the slice's epoch and the
    place in that epoch's permutation.
    """

    BLOCK = BLOCK

    def __init__(self, slices: dict[str, range], weights: dict[str, float], seed: int):
        """Compute the share of each slice.

        Args:
            slices: the sequences of each slice.
            weights: relative weights of the slices to draw from. Shares are rounded to 1 / BLOCK, and never to 0.

        Raises:
            InputError: a slice with a weight is missing, or has no whole sequence.
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
        shares = shares_of((weights[name] for name in self.names), self.BLOCK)
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
        """Return the share of each slice and, in brackets, how many epochs of it `positions` positions read."""
        parts = []
        for number, (name, sequences) in enumerate(zip(self.names, self.sequences, strict=True)):
            share = self._share(number) / self.BLOCK
            parts.append(f"{name} {share:.1%} ({share * positions / len(sequences):.2f})")
        return ", ".join(parts)


class Interleaving:
    """The number of draws from each of several data sets, at every position of an order that draws evenly by weight.

    Of BLOCK positions each data set has a fixed number, its share, spread evenly. Every stretch of positions therefore
    has the proportions of the weights, up to a sequence or so of each data set.

    Args:
        start: position at which it begins.
        before: earlier draws from each data set.
    """

    def __init__(self, weights: Mapping[str, float], start: int = 0, before: Mapping[str, int] | None = None):
        self.names, self.start = sorted(weights), start
        self.before = [(before or {}).get(name, 0) for name in self.names]
        self.shares = shares_of(weights[name] for name in self.names)
        turns = sorted(((turn + 0.5) / share, n) for n, share in enumerate(self.shares) for turn in range(share))
        self.numbers = [number for _, number in turns]  # of the data set at each place of a block
        self.places: list[list[int]] = [[] for _ in self.names]
        for place, number in enumerate(self.numbers):
            self.places[number].append(place)

    def draw(self, position: int) -> tuple[int, int]:
        """Return the number of the data set that a position draws from, and how often it was drawn from before."""
        block, place = divmod(position - self.start, BLOCK)
        number = self.numbers[place]
        return number, self.before[number] + block * self.shares[number] + bisect_left(self.places[number], place)

    def draws(self, position: int) -> dict[str, int]:
        """Return how often each data set is drawn from before a position."""
        block, place = divmod(position - self.start, BLOCK)
        return {
            name: self.before[number] + block * self.shares[number] + bisect_left(self.places[number], place)
            for number, name in enumerate(self.names)
        }


class InterleavedOrder:
    """An endless order that draws from data sets as an Interleaving says, the same on every rank.

    Each epoch of a data set has each of its sequences once. The order inside a data set depends on the seed and its
    name alone, so it goes on when the weights or the other data sets change.

    Args:
        sequences: the sequences of each data set.
        alone: the data set that the run began with, if it was the only one; it goes on in its GlobalOrder.
    """

    def __init__(self, sequences: Mapping[str, range], interleaving: Interleaving, seed: int, alone: str | None = None):
        self.interleaving = interleaving
        self.sequences = [sequences[name] for name in interleaving.names]
        self.keys = [seed if name == alone else self._key(name, seed) for name in interleaving.names]

    @staticmethod
    def _key(name: str, seed: int) -> int:
        return splitmix64(splitmix64(seed) ^ int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))

    def __getitem__(self, position: int) -> int:
        number, drawn = self.interleaving.draw(position)
        sequences = self.sequences[number]
        epoch, index = divmod(drawn, len(sequences))
        return sequences[_permutation(len(sequences), self.keys[number], epoch)[index]]


WINDOW_GROUPS = 64


class LengthGroupedOrder:
    """An endless order in groups of similar length, the same on every rank; each epoch has every sequence exactly once.

    As in GlobalOrder, a permutation keyed by (seed, epoch) shuffles the sequences. Each window of the result is sorted
    by length and cut into groups, whose order another permutation shuffles. A group is one optimizer step; its members
    and its place change from epoch to epoch. Only one window is in memory.
    """

    def __init__(self, ends: Sequence[int] | np.ndarray, seed: int, group_size: int):
        """
        Args:
            ends: the end of each sequence in the stream of all their tokens.
        """
        self.ends, self.seed, self.group_size = ends, seed, group_size
        # With fewer than four windows, a small data set would have the same groups in every epoch.
        groups = min(WINDOW_GROUPS, max(1, len(ends) // (4 * group_size)))
        self.window_size = groups * group_size
        self._cached: tuple[int, int] | None = None  # epoch and number of the window
        self._window: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, len(self.ends))
        window, place = divmod(index, self.window_size)
        if self._cached != (epoch, window):
            self._cached, self._window = (epoch, window), self._arranged(epoch, window)
        return self._window[place]

    def _arranged(self, epoch: int, window: int) -> list[int]:
        count = len(self.ends)
        permutation = Permutation(count, self.seed, epoch)
        start = window * self.window_size
        members = [permutation[index] for index in range(start, min(start + self.window_size, count))]
        members.sort(key=lambda index: self.ends[index] - (self.ends[index - 1] if index else 0))
        whole = len(members) // self.group_size
        order = Permutation(whole, splitmix64(self.seed ^ window), epoch) if whole > 1 else range(whole)
        groups = [members[group * self.group_size :][: self.group_size] for group in order]
        return [*itertools.chain.from_iterable(groups), *members[whole * self.group_size :]]
