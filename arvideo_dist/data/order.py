"""Which sample stands at which place of the global sample sequence.

A *place* is a position (int >= 0) in the infinite sequence of samples that a run consumes. What stands
there is a pure function of (seed, place): no state, no history, nothing of world size or worker count. An
epoch is a permutation of the index rows, computed element by element by a keyed bijection (a Feistel
network on a grid of a x b >= num_samples cells, with cycle walking; Black and Rogaway 2002) instead of
being materialised: seeking takes no memory and under a millisecond also at 10^8 samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAD = -1  # stands in a micro batch if no place is left; its weight is 0

_FEISTEL_ROUNDS = 16  # fewer leave permutations of very small sets unequally likely
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MAX_BLOCK = 1000  # visits of a mixture's block, within which a data set's own order is kept only roughly
_MIXTURE_KEY = 0x6D6978  # keeps the mixture's draws apart from the epochs'


class Stream(IntEnum):
    """Independent random streams of one place."""

    WINDOW = 0
    CROP = 1
    SEQUENCE = 2
    AUGMENT = 3
    MIX = 4
    DROP = 5


def sample_generator(seed: int, place: int, stream: int) -> np.random.Generator:
    """The random generator of one place and stream: counter-based, so any place is reached at once."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, place, 0, 0]))


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64, a 64-bit bijection with full avalanche. Arrays only: they wrap silently."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    index: NDArray[np.int64], size: NDArray[np.int64] | int, key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Images of `index` (flat) under the bijection of [0, size) that each element's `key` names."""
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    # An even number of rows, because with an odd one only even permutations are reached.
    rows = (np.ceil(np.sqrt(sizes) / 2) * 2).astype(np.uint64)
    columns = (sizes + rows - np.uint64(1)) // rows
    round_constants = _GOLDEN * np.arange(1, _FEISTEL_ROUNDS + 1, dtype=np.uint64)
    x = index.astype(np.uint64)
    walking = np.arange(x.size)
    while walking.size:
        a, b, k = rows[walking], columns[walking], key[walking]
        left, right = x[walking] // b, x[walking] % b
        for round_number in range(_FEISTEL_ROUNDS):
            round_key = mix64(k + round_constants[round_number])
            if round_number % 2 == 0:
                left = (left + mix64(right ^ round_key) % a) % a
            else:
                right = (right + mix64(left ^ round_key) % b) % b
        x[walking] = left * b + right
        walking = walking[x[walking] >= sizes[walking]]  # outside: walk on along the cycle
    return x.astype(np.int64)


def _keys(seed: int, *parts: NDArray[np.int64] | int) -> NDArray[np.uint64]:
    """64-bit keys of (seed, parts...), elementwise."""
    key = mix64(np.array([seed], dtype=np.uint64) + _GOLDEN)
    for part in parts:
        key = mix64(key ^ (np.atleast_1d(part).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return key


class SampleOrder:
    """The sample sequence over one data set: epoch after epoch, each sample once an epoch.

    Shuffled over the whole set, or, with `block_shards`, in blocks: the shards are shuffled and taken
    `block_shards` at a time, and the samples are shuffled inside each such block. Reads then stay within
    `block_shards` files at a time, which a shard cache or a disk's read-ahead wants; the price is that
    samples of one shard meet in the same part of an epoch."""

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: bool = True,
        *,
        shard_sizes: Sequence[int] | None = None,
        block_shards: int | None = None,
    ) -> None:
        """`shuffle=False` keeps the order of the index in every epoch. `block_shards` wants
        `shard_sizes`, the number of samples of each shard in the order of the index. Raises ValueError
        for sizes that disagree."""
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples, self.seed, self.shuffle, self.block_shards = (
            num_samples,
            seed,
            shuffle,
            block_shards,
        )
        if block_shards is not None:
            self._sizes = np.asarray(shard_sizes, dtype=np.int64)
            if block_shards < 1 or self._sizes.ndim != 1 or self._sizes.sum() != num_samples:
                raise ValueError(
                    f"block_shards {block_shards} wants the sizes of shards that hold {num_samples} samples"
                )
            self._first_rows = np.cumsum(self._sizes) - self._sizes
            self._layout = lru_cache(maxsize=2)(self._shard_layout)  # two: steps cross the ends of epochs

    def __reduce__(self) -> tuple[Callable[..., SampleOrder], tuple[object, ...]]:
        sizes = None if self.block_shards is None else self._sizes
        return _make_order, (self.num_samples, self.seed, self.shuffle, sizes, self.block_shards)

    def locate_many(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index rows [n] of `places` [n]; place // num_samples is the epoch."""
        epochs, index = np.divmod(np.asarray(places, dtype=np.int64), self.num_samples)
        if self.shuffle and self.block_shards is None:
            index = permute(index, self.num_samples, _keys(self.seed, epochs))
        elif self.shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                index[chosen] = self._rows_in_blocks(int(epoch), index[chosen])
        return index

    def _shard_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of one epoch: the shards in shuffled order, the index at which each ends, and each block ends."""
        shards = np.arange(len(self._sizes))
        shuffled = np.argsort(mix64(_keys(self.seed, epoch) + shards.astype(np.uint64)))  # bijective: no ties
        ends = np.cumsum(self._sizes[shuffled])
        assert self.block_shards is not None
        last_of_block = (
            np.append(np.arange(self.block_shards, len(shards), self.block_shards), len(shards)) - 1
        )
        return shuffled, ends, ends[last_of_block]

    def _rows_in_blocks(self, epoch: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        shuffled, ends, block_ends = self._layout(epoch)
        block = np.searchsorted(block_ends, index, side="right")
        block_start = np.where(block > 0, block_ends[block - 1], 0)
        inside = permute(index - block_start, block_ends[block] - block_start, _keys(self.seed, epoch, block))
        at = block_start + inside
        slot = np.searchsorted(ends, at, side="right")
        shard = shuffled[slot]
        return self._first_rows[shard] + at - (ends[slot] - self._sizes[shard])


def _make_order(
    num_samples: int, seed: int, shuffle: bool, sizes: Sequence[int] | None, block_shards: int | None
) -> SampleOrder:
    return SampleOrder(num_samples, seed, shuffle, shard_sizes=sizes, block_shards=block_shards)


class Located(NamedTuple):
    """What stands at a place: the `row` of data set `source`, seen for the (`epoch` + 1)-th time. The
    places of one `visit` are repeats: crops or windows of the same sample."""

    source: int
    epoch: int
    row: int
    visit: int


def mixture_shares(weights: Sequence[float]) -> list[int]:
    """Visits of each data set in a block of a mixture: the least whole numbers in the weights' proportions.

    Raises ValueError if that block is so long that the data sets' epochs would run into each other.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"data sets are mixed by weights above 0, got {list(weights)}")
    shares = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(share.denominator for share in shares))
    parts = [int(share * scale) for share in shares]
    parts = [part // math.gcd(*parts) for part in parts]
    if sum(parts) > _MAX_BLOCK:
        raise ValueError(
            f"the weights {list(weights)} are exact only over {sum(parts)} samples, at most {_MAX_BLOCK} are "
            "possible: round them, for example to two digits"
        )
    return parts


class SampleSequence:
    """The global sample sequence of a run: one or more data sets mixed by weight, each sample repeated.

    Visits: place p belongs to visit p // repeats. Mixtures: the visits come in blocks of as many as the
    weights need to be whole numbers (0.7 and 0.3: blocks of 10), and each block holds exactly its share
    of every data set, at shuffled positions. Each data set goes through its own epochs at its own pace,
    which may change within a block: there the last samples of one epoch stand among the first of the next. An
    epoch of the run is as many visits as the data sets have samples together."""

    def __init__(
        self, orders: Sequence[SampleOrder], seed: int, weights: Sequence[float] = (1.0,), repeats: int = 1
    ) -> None:
        if len(weights) != len(orders):
            raise ValueError(f"{len(orders)} data sets want as many weights, got {list(weights)}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        self._parts = np.array(mixture_shares(weights), dtype=np.int64)
        self._ends = np.cumsum(self._parts)
        self.block = int(self._ends[-1])
        self.orders, self.seed, self.repeats = list(orders), seed, repeats

    @property
    def places_per_epoch(self) -> int:
        return self.repeats * sum(order.num_samples for order in self.orders)

    def locate(self, places: Sequence[int]) -> list[Located]:
        """What stands at each of `places`; one call for many costs hardly more than for one."""
        visits = np.asarray(places, dtype=np.int64) // self.repeats
        source, at = np.zeros_like(visits), visits
        if len(self.orders) > 1:
            block, inside = np.divmod(visits, self.block)
            slot = permute(inside, self.block, _keys(self.seed, _MIXTURE_KEY, block))
            source = np.searchsorted(self._ends, slot, side="right")
            at = block * self._parts[source] + slot - (self._ends[source] - self._parts[source])
        located = [Located(0, 0, 0, 0)] * len(visits)
        for number, order in enumerate(self.orders):
            (chosen,) = np.nonzero(source == number)
            rows = order.locate_many(at[chosen])
            for i, row in zip(chosen.tolist(), rows.tolist(), strict=True):
                located[i] = Located(number, int(at[i]) // order.num_samples, row, int(visits[i]))
        return located


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro batches that every rank runs in one optimiser step."""
    return -(-global_batch // (world_size * micro_batch))


def places_of_rank(
    position: int, global_batch: int, micro_batch: int, rank: int, world_size: int, unit: int = 1
) -> list[list[int]]:
    """The micro batches of the step that starts at `position`, for one rank.

    Each rank takes one stretch of [position, position + global_batch); the stretches differ by at most one `unit`
    of places, which divides both batch sizes, so that the places of a unit always share a micro batch. Every rank
    gets the same number of lists, every list has `micro_batch` entries, PAD when places are used up.
    """
    assert not global_batch % unit
    assert not micro_batch % unit
    units = global_batch // unit
    first = position + units * rank // world_size * unit
    last = position + units * (rank + 1) // world_size * unit
    steps = accumulation_steps(global_batch, micro_batch, world_size)
    places = [*range(first, last)] + [PAD] * (steps * micro_batch - (last - first))
    return [places[i * micro_batch : (i + 1) * micro_batch] for i in range(steps)]
