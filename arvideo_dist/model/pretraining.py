"""What every pretraining method has in common: cubes in, predicted cubes out, mean squared error.

Letters: B clips, L tokens of the grid, N encoder tokens, M tokens to predict, P values of a cube.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from arvideo_dist.model.clusters import PredictionStep
from arvideo_dist.model.vit import Encoder, gather_tokens, to_cubes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TARGET_EPS = 1e-6


class Output(NamedTuple):
    loss_b: torch.Tensor  # float32 mean squared error of each clip
    predictions_bmp: torch.Tensor  # predicted (normalised) cubes, in the order of the targets' ids
    targets_bmp: torch.Tensor  # what they should be


class Sequences(Protocol):
    """Which tokens a method's encoder sees and which it predicts; their numbers are the same for all clips."""

    @property
    def encoder_tokens(self) -> int: ...

    @property
    def decoder_queries(self) -> int: ...

    def draw_sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sample's token ids: seen by the encoder [N], to be predicted [M] (int64)."""

    def prediction_steps(self) -> list[PredictionStep]:
        """Which part of a drawn sequence is predicted together and from what; the same for all clips."""


class PretrainingModel(nn.Module, ABC):
    """A method: what the training loop, validation and export ask of it. Downstream only `encoder` is kept."""

    encoder: Encoder
    sequences: Sequences
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, tubelet: tuple[int, int, int], target_norm: str) -> None:
        super().__init__()
        self.tubelet = tubelet
        self.target_norm = target_norm
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD), persistent=False)

    @abstractmethod
    def predict(
        self, cubes_bnp: torch.Tensor, context_ids_bn: torch.Tensor, target_ids_bm: torch.Tensor
    ) -> torch.Tensor:
        """Predicted cubes [B, M, P] at `target_ids_bm` from normalised cubes at `context_ids_bn`."""

    def forward(
        self,
        clips_bcthw: torch.Tensor,
        context_ids_bn: torch.Tensor | None = None,
        target_ids_bm: torch.Tensor | None = None,
        context_clips_bcthw: torch.Tensor | None = None,
    ) -> Output | torch.Tensor:
        """Loss and predictions of uint8 clips [B, 3, T, H, W]; without token ids their features (`features`).

        (Both by one call, since it is the module's call around which ZeRO-3 gathers weights.)
        `context_ids_bn`, `target_ids_bm`: token ids as the method's `sequences` draw them.
        `context_clips_bcthw`: clips that the encoder sees in place of the ones to be predicted; a model that
        uses its context does worse with them.
        """
        if context_ids_bn is None or target_ids_bm is None:
            return self.features(clips_bcthw)
        cubes_blp = to_cubes(clips_bcthw, self.tubelet)
        seen_blp = cubes_blp if context_clips_bcthw is None else to_cubes(context_clips_bcthw, self.tubelet)
        seen_bnp = self._normalise(gather_tokens(seen_blp, context_ids_bn))
        predictions_bmp = self.predict(seen_bnp, context_ids_bn, target_ids_bm)
        targets_bmp = cube_targets(gather_tokens(cubes_blp, target_ids_bm), self.target_norm)
        loss_b = (predictions_bmp.float() - targets_bmp).square().mean(dim=(1, 2))
        return Output(loss_b, predictions_bmp, targets_bmp)

    def features(self, clips_bcthw: torch.Tensor) -> torch.Tensor:
        """The mean [B, D] over all tokens of what the encoder makes of uint8 clips [B, 3, T, H, W], as downstream:
        nothing is dropped and every token sees every other."""
        return self.encoder(self._normalise(to_cubes(clips_bcthw, self.tubelet))).mean(dim=1)

    def _normalise(self, cubes_bnp: torch.Tensor) -> torch.Tensor:
        return normalise_pixels(cubes_bnp, self.pixel_mean, self.pixel_std)


def normalise_pixels(
    cubes_bnp: torch.Tensor, mean_c: torch.Tensor | None = None, std_c: torch.Tensor | None = None
) -> torch.Tensor:
    """What the encoder is given of uint8 cubes: float32, colours normalised (default: by ImageNet's figures)."""
    pixels = cubes_bnp.unflatten(-1, (-1, 3)).float() / 255
    mean_c = pixels.new_tensor(IMAGENET_MEAN) if mean_c is None else mean_c
    std_c = pixels.new_tensor(IMAGENET_STD) if std_c is None else std_c
    return ((pixels - mean_c) / std_c).flatten(-2)


def cube_targets(cubes_bmp: torch.Tensor, norm: str) -> torch.Tensor:
    """Regression targets [B, M, P] (float32) of uint8 cubes in (p_t p_h p_w c) order.

    `per_channel`: each cube's channels have zero mean and unit deviation over their own pixels (VideoMAE,
    unbiased variance); `per_cube`: over all values of the cube (mae_st); `none`: pixels in [0, 1]. A flat
    cube's normalised target is 0.
    """
    pixels = cubes_bmp.float().unflatten(-1, (-1, 3)) / 255
    mean, deviation = _statistics(pixels, norm)
    return ((pixels - mean) / deviation).flatten(-2)


def restore_pixels(predictions_bmp: torch.Tensor, cubes_bmp: torch.Tensor, norm: str) -> torch.Tensor:
    """Predictions as pixels in [0, 1], with the mean and deviation of the true uint8 cubes (as MAE shows)."""
    mean, deviation = _statistics(cubes_bmp.float().unflatten(-1, (-1, 3)) / 255, norm)
    return (predictions_bmp.float().unflatten(-1, (-1, 3)) * deviation + mean).flatten(-2).clamp(0, 1)


def _statistics(pixels: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    if norm == "none":
        return pixels.new_zeros(()), pixels.new_ones(())
    dims = (-2,) if norm == "per_channel" else (-2, -1)
    deviation = pixels.var(dim=dims, unbiased=True, keepdim=True).sqrt() + TARGET_EPS
    return pixels.mean(dim=dims, keepdim=True), deviation
