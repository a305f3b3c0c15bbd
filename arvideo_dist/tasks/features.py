"""What features are worth, as numbers: simple classifiers on them, and whether they have collapsed.

The loss of pretraining says little about that. Letters: N videos, D numbers of a feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PENALTIES = np.logspace(-2, 6, 9)


class Features(NamedTuple):
    """Of the videos of a split."""

    values_nd: NDArray[Any]
    labels_n: NDArray[np.int64]


def measures(train: Features, held_out: Features, neighbours: int) -> dict[str, float]:
    """`knn_top1` and `ridge_top1`: shares of held-out videos whose class is found from the training videos;
    `effective_rank` and `deviation` of the held-out features. What cannot be computed is absent.
    """
    found = {}
    if len(held_out.labels_n):
        found["effective_rank"] = effective_rank(held_out.values_nd)
        found["deviation"] = float(held_out.values_nd.astype(np.float64).std(axis=0).mean())
        if len(train.labels_n):
            found["knn_top1"] = knn_top1(train, held_out, neighbours)
        if len(np.unique(train.labels_n)) > 1:
            found["ridge_top1"] = ridge_top1(train, held_out)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def knn_top1(train: Features, held_out: Features, neighbours: int) -> float:
    """Share of `held_out` whose class most of their nearest training videos have (cosine similarity)."""
    from sklearn.neighbors import KNeighborsClassifier  # rank 0 alone needs it

    votes = KNeighborsClassifier(min(neighbours, len(train.labels_n)), metric="cosine", algorithm="brute")
    votes.fit(train.values_nd.astype(np.float64), train.labels_n)
    return float(votes.score(held_out.values_nd.astype(np.float64), held_out.labels_n))


def ridge_top1(train: Features, held_out: Features) -> float:
    """Share of `held_out` whose class a linear classifier finds: ridge regression to one-hot labels, on features of
    zero mean and unit deviation, with the penalty that does best on training videos that are left out in turn."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(_PENALTIES))
    probe.fit(train.values_nd.astype(np.float64), train.labels_n)
    return float(probe.score(held_out.values_nd.astype(np.float64), held_out.labels_n))


def effective_rank(values_nd: NDArray[Any]) -> float:
    """How many directions the features spread over: exp of the entropy of their singular values' shares (Roy and
    Vetterli 2007; RankMe, arXiv 2210.02885), of features less their mean. 0 if all are the same."""
    centred = values_nd.astype(np.float64) - values_nd.mean(axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    if singular.sum() == 0:
        return 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
