"""A video classifier: the encoder over all tokens, mean pooling, a norm and a linear head (VideoMAE's fine-tuning).

Nothing here draws at a training step: what drop path and head dropout keep comes in with the batch.

Letters: B clips, C channels, T frames, H x W pixels, L tokens of the grid, D width, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels
from arvideo_dist.model.vit import Encoder, EncoderSize, initialise, to_cubes

# As in transformers' class, so that an exported classifier gives the same logits at any size of the features.
# The original repository has 1e-6.
FC_NORM_EPS = 1e-5


class Kept(NamedTuple):
    """What drop path and head dropout leave of each clip in one training pass."""

    branches: torch.Tensor  # bool [B, depth, 2]: each block's attention and MLP branch
    features: torch.Tensor  # bool [B, D]: pooled features before the head


class Classifier(nn.Module):
    """Logits of clips. All linear layers start as in pretraining, the head small (recipe: head init scale)."""

    drop_path_rates: torch.Tensor
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        size: EncoderSize,
        tubelet: tuple[int, int, int],
        tokens: int,
        classes: int,
        *,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
        head_init_scale: float = 0.001,
    ) -> None:
        """`tokens`: L. `drop_path`: rate of the last block, see `drop_path_rates`. `head_dropout`: 0 in VideoMAE's
        Kinetics-400 and SSv2 recipes, 0.5 in its UCF101 recipe."""
        super().__init__()
        self.tubelet, self.head_dropout = tubelet, head_dropout
        self.encoder = Encoder(size, tubelet, tokens, final_norm=False)
        self.fc_norm = nn.LayerNorm(size.width, eps=FC_NORM_EPS)
        self.head = nn.Linear(size.width, classes)
        self.apply(initialise)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
        rates = torch.from_numpy(drop_path_rates(drop_path, size.depth)).float()
        self.register_buffer("drop_path_rates", rates, persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD), persistent=False)

    def forward(self, clips_bcthw: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        """Logits float32 [B, K] of clips [B, 3, T, H, W] in the range of uint8, of any dtype.

        What is dropped is dropped in training mode only, and only if `kept` is given; what stays is divided by the
        probability to stay.
        """
        cubes_blp = normalise_pixels(to_cubes(clips_bcthw, self.tubelet), self.pixel_mean, self.pixel_std)
        if kept is None or not self.training:
            return self.head(self._pooled(cubes_blp, None)).float()
        branch_scales_bd2 = kept.branches / (1 - self.drop_path_rates[:, None])
        features_bd = self._pooled(cubes_blp, branch_scales_bd2)
        return self.head(features_bd * (kept.features / (1 - self.head_dropout))).float()

    def _pooled(self, cubes_blp: torch.Tensor, branch_scales_bd2: torch.Tensor | None) -> torch.Tensor:
        features_bld = self.encoder(cubes_blp, branch_scales_bd2=branch_scales_bd2)
        return self.fc_norm(features_bld.mean(dim=1))


def drop_path_rates(rate: float, depth: int) -> NDArray[np.float64]:
    """Probability [depth] that a branch of each block is dropped: 0 at the first block, `rate` at the last."""
    return np.linspace(0, rate, depth)


def draw_kept(
    rng: np.random.Generator, size: EncoderSize, drop_path: float, head_dropout: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """One clip's `Kept`: branches bool [depth, 2], features bool [D]; always the same number of draws."""
    branches = rng.random((size.depth, 2)) >= drop_path_rates(drop_path, size.depth)[:, None]
    return branches, rng.random(size.width) >= head_dropout


def layer_of(name: str, depth: int) -> int:
    """Layer of a classifier's parameter for layer decay: 0 the embedding, i + 1 block i, depth + 1 norm and head.

    `name`: as in `Classifier.named_parameters()`.
    """
    parts = name.removeprefix("encoder.").split(".")
    if parts[0] == "patch_embed":
        return 0
    return int(parts[1]) + 1 if parts[0] == "blocks" else depth + 1


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Factor of a parameter's learning rate under layer decay (BEiT, VideoMAE): 1 at the head, less below."""
    return decay ** (depth + 1 - layer_of(name, depth))


def soft_cross_entropy(logits_bk: torch.Tensor, targets_bk: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [B] (float32) of logits against class probabilities, each row of which sums to 1."""
    return -(targets_bk * logits_bk.float().log_softmax(dim=-1)).sum(dim=-1)
