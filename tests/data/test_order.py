"""The global sample sequence: each epoch a permutation, a pure function of (seed, place)."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_dist.data.order import (
    PAD,
    SampleOrder,
    SampleSequence,
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


SHARD_SIZES = (7, 1, 12, 5, 9, 3)


@given(st.integers(1, 8), st.integers(0, 2**40), st.integers(0, 10**6))
def test_shard_blocks_hold_every_row_once_and_few_shards_at_a_time(block: int, seed: int, epoch: int) -> None:
    total = sum(SHARD_SIZES)
    order = SampleOrder(total, seed, shard_sizes=SHARD_SIZES, block_shards=block)
    rows = order.locate_many(epoch * total + np.arange(total))
    assert np.array_equal(np.sort(rows), np.arange(total))
    shards = np.repeat(np.arange(len(SHARD_SIZES)), SHARD_SIZES)[rows]
    firsts = {shard: int(np.flatnonzero(shards == shard)[0]) for shard in range(len(SHARD_SIZES))}
    lasts = {shard: int(np.flatnonzero(shards == shard)[-1]) for shard in range(len(SHARD_SIZES))}
    for at in range(total):
        assert sum(firsts[shard] <= at <= lasts[shard] for shard in firsts) <= block


def test_shard_blocks_are_shuffled_inside_and_among_each_other() -> None:
    order = SampleOrder(4000, seed=1, shard_sizes=[100] * 40, block_shards=4)
    epochs = [order.locate_many(epoch * 4000 + np.arange(4000)) for epoch in range(2)]
    first_blocks = [set((rows[:400] // 100).tolist()) for rows in epochs]
    assert [len(block) for block in first_blocks] == [4, 4]
    assert first_blocks[0] != first_blocks[1]
    inside = epochs[0][:400]
    assert abs(np.corrcoef(inside[:-1], inside[1:])[0, 1]) < 0.2


def test_an_order_with_blocks_survives_pickling() -> None:
    order = SampleOrder(37, 3, shard_sizes=SHARD_SIZES, block_shards=2)
    copy = pickle.loads(pickle.dumps(order))
    assert np.array_equal(copy.locate_many(np.arange(100)), order.locate_many(np.arange(100)))


def test_32_epochs_of_a_70_30_mixture_have_exact_counts() -> None:
    sizes = (35, 15)
    sequence = SampleSequence([SampleOrder(n, seed=n) for n in sizes], seed=9, weights=(0.7, 0.3))
    assert sequence.places_per_epoch == 50
    located = sequence.locate(range(32 * 50))
    for source, size in enumerate(sizes):
        rows = Counter(at.row for at in located if at.source == source)
        assert rows == dict.fromkeys(range(size), 32)  # each sample of each set 32 times
        epochs = [at.epoch for at in located if at.source == source]
        assert epochs == [n // size for n in range(32 * size)]  # one pass after the other
    for block in range(160):
        assert Counter(at.source for at in located[block * 10 : block * 10 + 10]) == {0: 7, 1: 3}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 10**9))
def test_a_mixtures_blocks_hold_exact_shares_wherever_one_starts(
    weights: list[int], repeats: int, start: int
) -> None:
    orders = [SampleOrder(11 + i, seed=i) for i in range(len(weights))]
    sequence = SampleSequence(orders, 0, [float(w) for w in weights], repeats)
    shares = np.array(weights) // np.gcd.reduce(weights)
    assert sequence.block == shares.sum()
    places = start * sequence.block * repeats + np.arange(sequence.block * repeats)
    located = sequence.locate(places.tolist())
    counted = Counter(at.source for at in located)
    assert [counted[source] for source in range(len(weights))] == (shares * repeats).tolist()
    for i in range(0, len(located), repeats):  # the repeats of a visit are neighbours
        assert len(set(located[i : i + repeats])) == 1


@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_an_epoch_with_repeats_has_each_sample_that_often(repeats: int) -> None:
    sequence = SampleSequence([SampleOrder(13, seed=2)], seed=2, repeats=repeats)
    assert sequence.places_per_epoch == 13 * repeats
    for epoch in range(3):
        located = sequence.locate(range(epoch * 13 * repeats, (epoch + 1) * 13 * repeats))
        assert Counter(at.row for at in located) == dict.fromkeys(range(13), repeats)
        assert {at.epoch for at in located} == {epoch}


def test_epochs_of_a_mixtures_sets_overlap_by_one_block_at_most() -> None:
    sizes, weights = (1000, 500), (0.87, 0.13)
    sequence = SampleSequence([SampleOrder(n, seed=n) for n in sizes], seed=9, weights=weights)
    located = sequence.locate(range(50 * sequence.block))
    for source, size in enumerate(sizes):
        visits = [at for at in located if at.source == source]
        share = round(weights[source] * 100)
        for n, at in enumerate(visits):
            assert abs(at.epoch * size + size // 2 - n) <= size // 2 + share
        rows = Counter(at.row for at in visits)
        assert set(rows.values()) <= {len(visits) // size, len(visits) // size + 1}


def test_weights_that_are_whole_numbers_only_over_a_long_stretch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exact only over 15874631 samples.*round them"):
        SampleSequence([SampleOrder(1000, 0), SampleOrder(500, 0)], 0, (0.5874631, 1.0))


@pytest.mark.parametrize(("weights", "repeats"), [((1.0, 0.0), 1), ((1.0,), 1), ((1.0, 1.0), 0)])
def test_impossible_sequences_are_refused(weights: tuple[float, ...], repeats: int) -> None:
    with pytest.raises(ValueError, match=r"weights above 0|as many weights|repeats must be"):
        SampleSequence([SampleOrder(3, 0), SampleOrder(4, 0)], 0, weights, repeats)
