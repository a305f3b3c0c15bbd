"""The global sample sequence: each epoch a permutation, a pure function of (seed, place)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_dist.data.order import (
    PAD,
    SampleOrder,
    Stream,
    accumulation_steps,
    places_of_rank,
    sample_generator,
)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**33))
def test_every_epoch_holds_every_row_once(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    rows = order.locate_many(epoch * num_samples + np.arange(num_samples))
    assert np.array_equal(np.sort(rows), np.arange(num_samples))


def test_locating_one_place_agrees_with_locating_many() -> None:
    order = SampleOrder(37, seed=3)
    rows = order.locate_many(np.arange(100))
    assert [order.locate(place) for place in range(100)] == [(p // 37, rows[p]) for p in range(100)]


def test_without_shuffle_every_epoch_keeps_the_index_order() -> None:
    rows = SampleOrder(5, seed=1, shuffle=False).locate_many(np.arange(12))
    assert rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_epochs_and_seeds_give_different_permutations() -> None:
    epochs = SampleOrder(1000, seed=0).locate_many(np.arange(3000)).reshape(3, 1000)
    other = SampleOrder(1000, seed=1).locate_many(np.arange(1000))
    for a, b in [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)]:
        assert np.count_nonzero(a == b) < 10  # 1 expected of two independent permutations


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 6])
def test_small_sets_see_every_permutation_equally_often(num_samples: int) -> None:
    epochs = 24_000
    rows = SampleOrder(num_samples, seed=7).locate_many(np.arange(epochs * num_samples))
    seen = Counter(map(tuple, rows.reshape(epochs, num_samples).tolist()))
    possible = int(np.prod(np.arange(1, num_samples + 1)))
    expected = epochs / possible
    assert len(seen) == possible
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < possible - 1 + 6 * np.sqrt(2 * (possible - 1))


def test_neighbours_of_a_large_set_are_uncorrelated() -> None:
    rows = SampleOrder(100_003, seed=5).locate_many(np.arange(100_003)).astype(float)
    for lag in (1, 2, 317, 318):  # 317: the Feistel grid's width
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 0.015


@given(st.integers(0, 2**62), st.integers(0, 10**12))
def test_generators_are_keyed_by_seed_place_and_stream(seed: int, place: int) -> None:
    def first(*key: int) -> int:
        return int(sample_generator(*key).integers(2**63))

    assert first(seed, place, Stream.CROP) == first(seed, place, Stream.CROP)
    others = {
        first(seed, place, Stream.WINDOW),
        first(seed, place + 1, Stream.CROP),
        first(seed + 1, place, Stream.CROP),
    }
    assert first(seed, place, Stream.CROP) not in others
    assert len(others) == 3


@given(st.integers(0, 10**9), st.integers(1, 300), st.integers(1, 9), st.integers(1, 9))
def test_ranks_share_a_step_exactly_once(position: int, global_batch: int, micro: int, world: int) -> None:
    ranks = [places_of_rank(position, global_batch, micro, rank, world) for rank in range(world)]
    steps = accumulation_steps(global_batch, micro, world)
    assert all(len(rank) == steps and all(len(batch) == micro for batch in rank) for rank in ranks)
    dealt = [place for rank in ranks for batch in rank for place in batch if place != PAD]
    assert sorted(dealt) == list(range(position, position + global_batch))
    counts = [sum(place != PAD for batch in rank for place in batch) for rank in ranks]
    assert max(counts) - min(counts) <= 1
