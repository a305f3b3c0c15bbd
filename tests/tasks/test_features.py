"""Measures of features: what scikit-learn says of the same votes and fits, and hand-made cases of collapse."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from arvideo_dist.tasks.features import Features, effective_rank, knn_top1, measures, ridge_top1


def clouds(seed: int, videos: int, spread: float = 1.0) -> Features:
    """Five classes around five points in 16 dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, videos)
    centres = np.random.default_rng(0).normal(size=(5, 16))
    return Features((centres[labels] + spread * rng.normal(size=(videos, 16))).astype(np.float32), labels)


@pytest.mark.parametrize("neighbours", [1, 7, 500])
def test_the_nearest_by_cosine_vote(neighbours: int) -> None:
    train, held_out = clouds(1, 200), clouds(2, 100)
    unit = [f.values_nd / np.linalg.norm(f.values_nd, axis=1, keepdims=True) for f in (train, held_out)]
    nearest = np.argsort(-unit[1].astype(np.float64) @ unit[0].T, axis=1, kind="stable")[:, :neighbours]
    votes = np.stack([np.bincount(train.labels_n[row], minlength=5) for row in nearest])
    expected = (votes.argmax(1) == held_out.labels_n).mean()
    assert knn_top1(train, held_out, neighbours) == pytest.approx(expected)


def test_the_ridge_probe_is_the_best_of_its_penalties_on_standardised_features() -> None:
    train, held_out = clouds(3, 300, spread=2.0), clouds(4, 200, spread=2.0)
    mean, deviation = train.values_nd.mean(0, dtype=np.float64), train.values_nd.std(0, dtype=np.float64)
    scores = []
    for penalty in np.logspace(-2, 6, 9):
        probe = RidgeClassifier(penalty).fit((train.values_nd - mean) / deviation, train.labels_n)
        scores.append(probe.score((held_out.values_nd - mean) / deviation, held_out.labels_n))
    assert ridge_top1(train, held_out) in scores
    assert ridge_top1(train, held_out) >= np.median(scores) > 0.4


def test_effective_rank_counts_the_directions_that_features_spread_over() -> None:
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(64, 64)))[0]
    for directions in (1, 4, 32):
        signs = np.concatenate([np.eye(directions), -np.eye(directions)])
        values = 3.0 + signs @ basis[:directions]
        assert effective_rank(values) == pytest.approx(directions)
    assert effective_rank(np.ones((10, 4))) == 0


def test_what_cannot_be_computed_is_absent() -> None:
    none = Features(np.zeros((0, 4)), np.zeros(0, dtype=np.int64))
    one_class = Features(np.random.default_rng(6).normal(size=(8, 4)), np.zeros(8, dtype=np.int64))
    assert measures(one_class, none, 3) == {}
    assert sorted(measures(none, one_class, 3)) == ["deviation", "effective_rank"]
    assert sorted(measures(one_class, one_class, 3)) == ["deviation", "effective_rank", "knn_top1"]
    assert measures(one_class, one_class, 3)["knn_top1"] == 1


def test_features_that_have_collapsed_deviate_by_nothing() -> None:
    same = Features(np.ones((6, 4)), np.array([0, 1, 2, 0, 1, 2]))
    assert measures(same, same, 2)["deviation"] == 0
