"""The order in which sequences are trained on: which of them is sample g of the run.

    order = Shuffled(len(sequences), seed)
    order(g)                                 # the place of sample g

A function of seed and g alone, so any step can be the first at no cost, and neither the number of
ranks nor the size of micro-batches matters.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from train.config import Config

Order = Callable[[int], int]
"""Maps a sample's number, counted from the start of the run, to a place in the data."""

BLOCK = 1 << 16
"""Samples of a mixture of which each source has its exact share."""


def in_turn(n: int) -> Order:
    """All places from 0 to n, again and again."""
    return lambda g: g % n


class Shuffled:
    """All places from 0 to n, and again in another order, epoch after epoch: sample g is at place
    g % n of permutation g // n."""

    def __init__(self, n: int, seed: int, *more: int) -> None:
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch, *more)).permutation(n)

        self.n = n
        self._permutation = lru_cache(maxsize=2)(permutation)  # a batch can reach over the end

    def __call__(self, g: int) -> int:
        epoch, place = divmod(g, self.n)
        return int(self._permutation(epoch)[place])


class Mixed:
    """Places in several concatenated sources, whose sizes need not fit their weights: a source that
    is used up starts again, in another order.

    Each BLOCK of samples has as many of each source as its weight says, shuffled. So the numbers of
    a source's samples are known without counting earlier ones.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.shares = shares(weights)
        self.ends = np.cumsum(self.shares)
        self.firsts = np.cumsum([0, *sizes])
        self.blocks = Shuffled(BLOCK, seed)
        self.sources: list[Order] = [Shuffled(n, seed, i) for i, n in enumerate(sizes, 1)]

    def __call__(self, g: int) -> int:
        place = self.blocks(g)
        source = int(np.searchsorted(self.ends, place, side="right"))
        share, end = self.shares[source], int(self.ends[source])
        number = g // BLOCK * share + place - (end - share)
        return int(self.firsts[source]) + self.sources[source](number)


class Spread:
    """Like Mixed, but not random: each source's samples are evenly spread and in their own order,
    so the first few have the same shares. For validation."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        self.sizes, self.shares = sizes, shares(weights)
        self.firsts = np.cumsum([0, *sizes])
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self.shares])
        self.sources = np.repeat(np.arange(len(sizes)), self.shares)
        order = np.argsort(places, kind="stable")
        self.numbers = np.concatenate([np.arange(n) for n in self.shares])[order]
        self.sources = self.sources[order]

    def __call__(self, g: int) -> int:
        block, place = divmod(g, BLOCK)
        source = int(self.sources[place])
        number = block * self.shares[source] + int(self.numbers[place])
        return int(self.firsts[source]) + number % self.sizes[source]


def shares(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a BLOCK, to which they sum; the largest remainders are rounded up.

    0 for a weight that is below 1/BLOCK of all and not rounded up.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    whole = np.floor(exact).astype(np.int64)
    missing = BLOCK - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole.tolist()


class Samples(Sampler[list[int]]):
    """Places in the data, a micro-batch of one rank at a time, forever."""

    def __init__(
        self, config: Config, order: Order, rank: int, world_size: int, start_step: int
    ) -> None:
        self.config, self.order = config, order
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.start_step):
            for numbers in sample_numbers(self.config, step, self.rank, self.world_size):
                yield [self.order(g) for g in numbers]


def sample_numbers(config: Config, step: int, rank: int, world_size: int) -> Iterator[range]:
    """The run's sample numbers in each of a rank's micro-batches of one step."""
    size = config.train.micro_batch
    for micro in range(config.accumulation(world_size)):
        first = step * config.global_batch(world_size) + (micro * world_size + rank) * size
        yield range(first, first + size)
