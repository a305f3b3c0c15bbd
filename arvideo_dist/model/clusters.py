"""Token grid to clusters, prediction orders, kept tokens and attention masks: index arithmetic only.

Paper 3.3.1 (clusters), 3.3.2 (orders), 3.3.3 (masks), 4.1 and Table 5 (kept tokens).

Everything is laid out in *prediction order*: position 0 holds the cluster that stands first in the order. So
tokens, position embeddings and targets are gathered by ids drawn per sample, while the masks are the same
static matrices for every sample.

Letters: K clusters, n tokens of a cluster, k kept tokens of a cluster, q queried tokens of a cluster,
c = min_context_clusters, N = (K - 1) k encoder tokens, M = (K - c) q decoder queries.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch

Order = Literal["random", "spatial_first", "temporal_first"]


class PredictionStep(NamedTuple):
    """Tokens that are predicted together, as lengths from the beginning of a drawn sequence.

    The step sees the first `context` encoder tokens; with it the first `targets` queries have been predicted.
    """

    context: int
    targets: int


class Clusters:
    """The clusters of one token grid and how they are predicted."""

    def __init__(
        self,
        token_grid: tuple[int, int, int],
        cluster: tuple[int, int, int],
        order: Order = "random",
        mask_ratio: float = 0.8,
        min_context_clusters: int = 1,
        target_ratio: float = 1.0,
    ) -> None:
        """`token_grid`: tokens along time, height, width; `cluster`: K_T, K_H, K_W tokens, must divide it.

        `mask_ratio`: share of each cluster's tokens that the encoder does not see. `min_context_clusters`:
        how many clusters the first prediction sees. `target_ratio`: share of each predicted cluster's tokens
        that are queried, at least one.
        """
        per_axis = [size // k for size, k in zip(token_grid, cluster, strict=True)]
        assert all(size == count * k for size, count, k in zip(token_grid, per_axis, cluster, strict=True)), (
            "validated in config.ModelConfig"
        )
        self.order = order
        self.count = math.prod(per_axis)
        self.size = math.prod(cluster)
        self.kept = self.size - int(mask_ratio * self.size)
        self.queried = max(1, round(target_ratio * self.size))
        self.min_context = min_context_clusters
        assert 1 <= min_context_clusters < self.count

        (t, h, w), (k_t, k_h, k_w) = per_axis, cluster
        ids = np.arange(math.prod(token_grid)).reshape(t, k_t, h, k_h, w, k_w)
        # Clusters along time, then height, then width: the spatial-first order of 3.3.2.
        self.members_kn = ids.transpose(0, 2, 4, 1, 3, 5).reshape(self.count, self.size)
        clusters_thw = np.arange(self.count).reshape(t, h, w)
        self._fixed_orders = {
            "spatial_first": clusters_thw.reshape(-1),
            "temporal_first": clusters_thw.transpose(1, 2, 0).reshape(-1),
        }

    @property
    def encoder_tokens(self) -> int:
        """N: kept tokens of all clusters but the last one in the order."""
        return (self.count - 1) * self.kept

    @property
    def decoder_queries(self) -> int:
        """M: queried tokens of the clusters that are predicted."""
        return (self.count - self.min_context) * self.queried

    def prediction_steps(self) -> list[PredictionStep]:
        """One for each predicted cluster, in the order of prediction."""
        return [
            PredictionStep(place * self.kept, (place - self.min_context + 1) * self.queried)
            for place in range(self.min_context, self.count)
        ]

    def draw_order(self, rng: np.random.Generator) -> np.ndarray:
        """Cluster ids [K] in prediction order: a fresh uniform permutation, or the fixed order (3.3.2)."""
        return rng.permutation(self.count) if self.order == "random" else self._fixed_orders[self.order]

    def draw_sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sample's token ids in prediction order: seen by the encoder [N], to be predicted [M] (int64).

        The kept tokens of each cluster are a uniform subset of `self.kept` of its tokens, its queried ones an
        independent uniform subset of `self.queried`: so the mean over queries estimates the mean over all of
        the cluster's tokens without bias.
        """
        ordered_kn = self.members_kn[self.draw_order(rng)]
        context_ids = _draw_subset(rng, ordered_kn[:-1], self.kept)
        target_ids = ordered_kn[self.min_context :]
        if self.queried < self.size:
            target_ids = _draw_subset(rng, target_ids, self.queried)
        return context_ids.reshape(-1), target_ids.reshape(-1)

    def encoder_mask(self) -> torch.Tensor:
        """Bool [N, N], true where row may attend to column: own cluster (both ways) and earlier ones."""
        place_n = torch.arange(self.count - 1).repeat_interleave(self.kept)
        return place_n[:, None] >= place_n[None, :]

    def decoder_mask(self) -> torch.Tensor:
        """Bool [M, N], true where query may attend to encoder token: clusters before its own only."""
        token_place_n = torch.arange(self.count - 1).repeat_interleave(self.kept)
        return self._query_places()[:, None] > token_place_n[None, :]

    def query_mask(self) -> torch.Tensor:
        """Bool [M, M], true where row may attend to column in the decoder's self-attention: queries of its
        own cluster (both ways) and of earlier ones."""
        place_m = self._query_places()
        return place_m[:, None] >= place_m[None, :]

    def _query_places(self) -> torch.Tensor:
        return torch.arange(self.min_context, self.count).repeat_interleave(self.queried)


def _draw_subset(rng: np.random.Generator, rows_kn: np.ndarray, number: int) -> np.ndarray:
    """A uniform subset of `number` entries of each row, in the row's order."""
    chosen = np.sort(rng.random(rows_kn.shape).argsort(axis=1)[:, :number], axis=1)
    return np.take_along_axis(rows_kn, chosen, axis=1)
