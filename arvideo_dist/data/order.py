"""Which sample stands at which place of the global sample sequence.

A *place* is a position (int >= 0) in the infinite sequence of samples that a run consumes. What stands
there is a pure function of (seed, place): no state, no history, nothing of world size or worker count. An
epoch is a permutation of the index rows, computed element by element by a keyed bijection (a Feistel
network on a grid of a x b >= num_samples cells, with cycle walking; Black and Rogaway 2002) instead of
being materialised: seeking takes no memory and under a millisecond also at 10^8 samples.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

PAD = -1  # stands in a micro batch where no place is left; its weight is 0

_FEISTEL_ROUNDS = 16  # fewer leave permutations of very small sets unequally likely
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """Independent random streams of one place."""

    WINDOW = 0
    CROP = 1
    SEQUENCE = 2


def sample_generator(seed: int, place: int, stream: int) -> np.random.Generator:
    """The random generator of one place and stream: counter-based, so any place is reached at once."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, place, 0, 0]))


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64, a 64-bit bijection with full avalanche. Arrays only: they wrap silently."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of `index` under the bijection of [0, size) that each element's `key` names."""
    rows = np.uint64(int(np.ceil(np.sqrt(size) / 2)) * 2)  # even, else only even permutations are reached
    columns = np.uint64(-(-size // int(rows)))
    round_constants = _GOLDEN * np.arange(1, _FEISTEL_ROUNDS + 1, dtype=np.uint64)
    x = index.astype(np.uint64)
    walking = np.arange(x.size)
    while walking.size:
        left, right = x[walking] // columns, x[walking] % columns
        for round_number in range(_FEISTEL_ROUNDS):
            round_key = mix64(key[walking] + round_constants[round_number])
            if round_number % 2 == 0:
                left = (left + mix64(right ^ round_key) % rows) % rows
            else:
                right = (right + mix64(left ^ round_key) % columns) % columns
        x[walking] = left * columns + right
        walking = walking[x[walking] >= np.uint64(size)]  # outside: walk on along the cycle
    return x.astype(np.int64)


class SampleOrder:
    """The sample sequence over one index: epoch after epoch, each sample once an epoch."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        """`shuffle=False` keeps the order of the index in every epoch."""
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle

    def locate(self, place: int) -> tuple[int, int]:
        """(epoch, index row) of one place."""
        return place // self.num_samples, int(self.locate_many(np.array([place]))[0])

    def locate_many(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index rows of `places` (any shape, each >= 0)."""
        flat = np.asarray(places, dtype=np.int64).ravel()
        epochs, index = np.divmod(flat, self.num_samples)
        if self.shuffle:
            seed_key = mix64(np.full(flat.shape, self.seed, dtype=np.uint64) + _GOLDEN)
            index = permute(index, self.num_samples, mix64(seed_key ^ epochs.astype(np.uint64) * _GOLDEN))
        return index.reshape(np.shape(places))


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro batches that every rank runs in one optimiser step."""
    return -(-global_batch // (world_size * micro_batch))


def places_of_rank(
    position: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> list[list[int]]:
    """The micro batches of the step that starts at `position`, for one rank.

    Each rank takes one stretch of [position, position + global_batch); the stretches differ by at most one
    place. Every rank gets the same number of lists, every list has `micro_batch` entries, PAD where places
    are used up.
    """
    first = position + global_batch * rank // world_size
    last = position + global_batch * (rank + 1) // world_size
    steps = accumulation_steps(global_batch, micro_batch, world_size)
    places = [*range(first, last)] + [PAD] * (steps * micro_batch - (last - first))
    return [places[i * micro_batch : (i + 1) * micro_batch] for i in range(steps)]
