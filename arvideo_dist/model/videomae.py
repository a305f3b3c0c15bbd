"""VideoMAE (Tong et al., 2022): tubes of tokens are masked, a decoder with self-attention restores them.

Letters as in pretraining.py; W width of the decoder.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.clusters import PredictionStep
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.model.vit import (
    ENCODER_SIZES,
    NORM_EPS,
    Block,
    Encoder,
    gather_tokens,
    initialise,
    sinusoid_positions,
)


class TubeMasking:
    """The same places of every time step are masked, so that no token shows what stands there earlier."""

    def __init__(self, token_grid: tuple[int, int, int], mask_ratio: float) -> None:
        self.times, self.places = token_grid[0], token_grid[1] * token_grid[2]
        self.masked = int(mask_ratio * self.places)  # VideoMAE's rounding

    @property
    def encoder_tokens(self) -> int:
        return self.times * (self.places - self.masked)

    @property
    def decoder_queries(self) -> int:
        return self.times * self.masked

    def prediction_steps(self) -> list[PredictionStep]:
        """One: all masked tokens at once, from all visible ones."""
        return [PredictionStep(self.encoder_tokens, self.decoder_queries)]

    def draw_sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Visible and masked token ids (int64), both ascending."""
        masked = np.zeros(self.places, dtype=bool)
        masked[rng.permutation(self.places)[: self.masked]] = True
        tubes = np.tile(masked, self.times)
        return np.flatnonzero(~tubes), np.flatnonzero(tubes)


class VideoMAEDecoder(nn.Module):
    """Visible features and one learned vector at each masked position, through plain blocks."""

    def __init__(self, config: DecoderConfig, encoder_width: int, tokens: int, cube_values: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, config.width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        heads = config.width // config.head_width
        self.blocks = nn.ModuleList(Block(config.width, heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, cube_values)
        self.register_buffer("positions", sinusoid_positions(tokens, config.width), persistent=False)
        self.positions: torch.Tensor

    def forward(
        self, features_bnd: torch.Tensor, visible_ids_bn: torch.Tensor, masked_ids_bm: torch.Tensor
    ) -> torch.Tensor:
        """Predicted cubes [B, M, P] at `masked_ids_bm`."""
        visible_bnw = self.embed(features_bnd) + gather_tokens(self.positions, visible_ids_bn)
        masked_bmw = self.mask_token + gather_tokens(self.positions, masked_ids_bm)
        x = torch.cat([visible_bnw, masked_bmw], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -masked_ids_bm.shape[1] :]))


class VideoMAE(PretrainingModel):
    """The masked autoencoder that the paper compares with, in the same training stack."""

    def __init__(self, config: ModelConfig, decoder: DecoderConfig) -> None:
        super().__init__(config.tubelet, config.target_norm)
        self.sequences = TubeMasking(config.token_grid, config.mask_ratio)
        tokens, size = math.prod(config.token_grid), ENCODER_SIZES[config.encoder]
        self.encoder = Encoder(size, config.tubelet, tokens)
        self.decoder = VideoMAEDecoder(decoder, size.width, tokens, 3 * math.prod(config.tubelet))
        self.apply(initialise)
        nn.init.trunc_normal_(self.decoder.mask_token, std=0.02)

    def predict(
        self, cubes_bnp: torch.Tensor, context_ids_bn: torch.Tensor, target_ids_bm: torch.Tensor
    ) -> torch.Tensor:
        return self.decoder(self.encoder(cubes_bnp, context_ids_bn), context_ids_bn, target_ids_bm)
