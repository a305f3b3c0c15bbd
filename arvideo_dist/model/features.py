"""An encoder's features of whole clips, as downstream of pretraining: every token is there and sees every other.

Letters: B clips, T frames, H x W pixels, L tokens of the grid, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from arvideo_dist.model.layouts import load_encoder
from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels
from arvideo_dist.model.vit import Encoder, EncoderSize, to_cubes


class EncoderFeatures(nn.Module):
    """The encoder behind the normalisation of pixels."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, size: EncoderSize, tubelet: tuple[int, int, int], tokens: int) -> None:
        """`tokens`: L."""
        super().__init__()
        self.tubelet = tubelet
        self.encoder = Encoder(size, tubelet, tokens)
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD), persistent=False)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take an encoder's weights (`layouts.load_encoder`). Raises ValueError if they are of another size.

        The final norm is part of the encoder if the weights have one. A classifier's have none: its own norm comes
        after the mean and belongs to its head.
        """
        if not load_encoder(self.encoder, weights):
            self.encoder.norm = nn.Identity()

    def forward(self, clips_bcthw: torch.Tensor) -> torch.Tensor:
        """Tokens float32 [B, L, D] of clips [B, 3, T, H, W] in the range of uint8."""
        cubes_blp = normalise_pixels(to_cubes(clips_bcthw, self.tubelet), self.pixel_mean, self.pixel_std)
        tokens_bld: torch.Tensor = self.encoder(cubes_blp).float()
        return tokens_bld
