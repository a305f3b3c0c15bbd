"""Invariants of clusters, orders, kept tokens and masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arvideo_dist.model.clusters import Clusters

GRID = (8, 14, 14)
SHAPES = [(1, 1, 1), (2, 7, 7), (1, 14, 14), (8, 1, 1), (4, 7, 7), (2, 2, 7)]


def test_default_geometry_has_300_encoder_tokens_and_1470_queries() -> None:
    clusters = Clusters(GRID, (2, 7, 7))
    assert (clusters.count, clusters.size, clusters.kept) == (16, 98, 20)
    assert (clusters.encoder_tokens, clusters.decoder_queries) == (300, 1470)


def test_two_context_clusters_give_the_1372_queries_of_table_5() -> None:
    clusters = Clusters(GRID, (2, 7, 7), min_context_clusters=2)
    assert (clusters.encoder_tokens, clusters.decoder_queries) == (300, 1372)


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (2, 1), (8, 2), (98, 20), (196, 40)])
def test_kept_tokens_follow_the_rounding_rule(size: int, kept: int) -> None:
    assert Clusters((2, 1, size), (1, 1, size), mask_ratio=0.8).kept == kept


@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_partition_the_grid_into_neighbouring_blocks(shape: tuple[int, int, int]) -> None:
    clusters = Clusters(GRID, shape)
    assert sorted(clusters.members_kn.reshape(-1)) == list(range(math.prod(GRID)))
    for members in clusters.members_kn:
        for axis, extent in zip(np.unravel_index(members, GRID), shape, strict=True):
            assert axis.max() - axis.min() == extent - 1


def test_spatial_first_goes_through_space_before_time_and_temporal_first_the_other_way() -> None:
    rng = np.random.default_rng(0)
    spatial = Clusters(GRID, (2, 7, 7), "spatial_first").draw_order(rng)
    temporal = Clusters(GRID, (2, 7, 7), "temporal_first").draw_order(rng)
    members = Clusters(GRID, (2, 7, 7)).members_kn
    time_of = np.unravel_index(members[:, 0], GRID)[0] // 2
    assert list(time_of[spatial]) == sorted(time_of)
    assert list(time_of[temporal]) == [0, 1, 2, 3] * 4
    assert sorted(temporal) == list(range(16))


def test_random_order_is_a_fresh_uniform_permutation() -> None:
    """Chi-squared of where each of 4 clusters stands, and of all 24 permutations, over 12,000 draws."""
    clusters = Clusters((2, 2, 1), (1, 1, 1))
    rng = np.random.default_rng(0)
    draws = [tuple(clusters.draw_order(rng)) for _ in range(12_000)]
    assert all(sorted(draw) == [0, 1, 2, 3] for draw in draws[:100])
    counts = np.array(list({draw: draws.count(draw) for draw in set(draws)}.values()))
    assert len(counts) == 24
    assert ((counts - 500) ** 2 / 500).sum() < 49.7  # 99.9 % quantile of chi-squared with 23 degrees


def test_sequence_keeps_a_uniform_subset_of_each_cluster_and_predicts_whole_clusters() -> None:
    clusters = Clusters((2, 4, 4), (2, 2, 2), mask_ratio=0.5, min_context_clusters=1)
    rng = np.random.default_rng(0)
    seen = np.zeros(32)
    cluster_of = np.empty(32, dtype=int)
    for number, members in enumerate(clusters.members_kn):
        cluster_of[members] = number
    for _ in range(4000):
        context, target = clusters.draw_sequence(rng)
        order = [*cluster_of[context[::4]], cluster_of[target[-1]]]
        assert sorted(order) == [0, 1, 2, 3]
        assert list(cluster_of[context]) == list(np.repeat(order[:-1], 4))
        assert list(cluster_of[target]) == list(np.repeat(order[1:], 8))
        assert len(set(context)) == 12
        assert sorted(target[:8]) == list(np.sort(clusters.members_kn[order[1]]))
        seen[context] += 1
    # each token: its cluster is not last (3/4) and it is kept (1/2); 5 standard deviations
    assert np.abs(seen / 4000 - 0.375).max() < 5 * math.sqrt(0.375 * 0.625 / 4000)


def test_queries_are_a_uniform_subset_of_each_predicted_cluster_independent_of_the_context() -> None:
    clusters = Clusters((2, 4, 4), (2, 2, 2), "spatial_first", mask_ratio=0.5, target_ratio=0.4)
    assert (clusters.queried, clusters.decoder_queries) == (3, 9)
    rng = np.random.default_rng(0)
    queried, both = np.zeros(32), np.zeros(32)
    for _ in range(4000):
        context, target = clusters.draw_sequence(rng)
        for row, members in zip(target.reshape(3, 3), clusters.members_kn[1:], strict=True):
            assert set(row) <= set(members)
            assert len(set(row)) == 3
        queried[target] += 1
        both[np.intersect1d(context, target)] += 1
    predicted, seen_too = clusters.members_kn[1:].reshape(-1), clusters.members_kn[1:-1].reshape(-1)
    for counts, share in ((queried[predicted], 3 / 8), (both[seen_too], 3 / 16)):  # 5 standard deviations
        assert np.abs(counts / 4000 - share).max() < 5 * math.sqrt(share * (1 - share) / 4000)


def test_all_targets_leave_the_draws_as_they_are_without_subsampling() -> None:
    """The context of a place does not depend on how many of its targets are queried."""
    context, target = Clusters(GRID, (2, 7, 7)).draw_sequence(np.random.default_rng(3))
    part = Clusters(GRID, (2, 7, 7), target_ratio=0.2)
    part_context, part_target = part.draw_sequence(np.random.default_rng(3))
    assert np.array_equal(context, part_context)
    assert len(part_target) == 15 * 20
    assert set(part_target) <= set(target)


@pytest.mark.parametrize("min_context", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 7), (4, 7, 7)])
def test_masks_equal_their_definition(shape: tuple[int, int, int], min_context: int) -> None:
    grid = (4, 14, 14) if shape != (1, 1, 1) else (2, 3, 3)
    clusters = Clusters(grid, shape, min_context_clusters=min_context)
    encoder, decoder = clusters.encoder_mask(), clusters.decoder_mask()
    token_place = np.repeat(np.arange(clusters.count - 1), clusters.kept)
    query_place = np.repeat(np.arange(min_context, clusters.count), clusters.size)
    expected_encoder = [[b <= a for b in token_place] for a in token_place]
    expected_decoder = [[b < a for b in token_place] for a in query_place]
    assert torch.equal(encoder, torch.tensor(np.array(expected_encoder)))
    assert torch.equal(decoder, torch.tensor(np.array(expected_decoder)))
    expected_query = [[b <= a for b in query_place] for a in query_place]
    assert torch.equal(clusters.query_mask(), torch.tensor(np.array(expected_query)))
    assert decoder.any(dim=1).all(), "every query sees something"
