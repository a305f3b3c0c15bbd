"""Linear classifiers on frozen features, several of them as one module.

Letters: H heads, B videos, D width, K classes.
"""

from __future__ import annotations

import torch
from torch import nn


class LinearProbes(nn.Module):
    """H heads that see the same features. Each has parameters of its own, for a group of the optimiser of its own.

    All start at zero: the problem is convex, and a draw would only add noise to their comparison.
    """

    def __init__(self, heads: int, width: int, classes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(classes, width) for _ in range(heads))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(heads))

    def forward(self, features_bd: torch.Tensor) -> torch.Tensor:
        """Logits [H, B, K]."""
        weights_hkd, biases_hk = torch.stack(list(self.weights)), torch.stack(list(self.biases))
        return torch.einsum("bd,hkd->hbk", features_bd, weights_hkd) + biases_hk[:, None]
