"""ARVideo: block-causal encoder, cross-attention decoder, pixels of every next cluster (paper 3.3).

Letters: B clips, L tokens of the grid, N encoder tokens, M decoder queries, D width, P values of a cube.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from arvideo_dist.config import DecoderConfig, ModelConfig
from arvideo_dist.model.clusters import Clusters
from arvideo_dist.model.vit import (
    ENCODER_SIZES,
    NORM_EPS,
    Attention,
    CrossAttention,
    Encoder,
    Mlp,
    gather_tokens,
    initialise,
    sinusoid_positions,
    to_cubes,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TARGET_EPS = 1e-6


class Output(NamedTuple):
    loss_b: torch.Tensor  # float32 mean squared error of each clip
    predictions_bmp: torch.Tensor  # predicted (normalised) cubes, in prediction order
    targets_bmp: torch.Tensor  # what they should be


class DecoderBlock(nn.Module):
    """Cross-attention to earlier clusters, then an MLP (paper 3.3.3).

    Queries do not see each other, unless `self_attention` puts a masked self-attention first (Table 9).
    """

    def __init__(self, width: int, heads: int, self_attention: bool) -> None:
        super().__init__()
        if self_attention:
            self.norm0 = nn.LayerNorm(width, eps=NORM_EPS)
            self.self_attn = Attention(width, heads)
        self.self_attention = self_attention
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def forward(
        self,
        x_bmd: torch.Tensor,
        context_bnd: torch.Tensor,
        mask_mn: torch.Tensor,
        query_mask_mm: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.self_attention:
            x_bmd = x_bmd + self.self_attn(self.norm0(x_bmd), query_mask_mm)
        x_bmd = x_bmd + self.cross_attn(self.norm1(x_bmd), context_bnd, mask_mn)
        return x_bmd + self.mlp(self.norm2(x_bmd))


class Decoder(nn.Module):
    """Predicts the cubes at given positions from the encoder's features of the clusters before them."""

    def __init__(self, config: DecoderConfig, encoder_width: int, tokens: int, cube_values: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, config.width, bias=False)
        # One learned vector; 1-D, so that the optimiser's rule for weight decay leaves it alone.
        self.query_token = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(
            DecoderBlock(config.width, config.width // config.head_width, config.self_attention)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, cube_values)
        self.register_buffer("positions", sinusoid_positions(tokens, config.width), persistent=False)
        self.positions: torch.Tensor

    def forward(
        self,
        features_bnd: torch.Tensor,
        context_ids_bn: torch.Tensor,
        target_ids_bm: torch.Tensor,
        mask_mn: torch.Tensor,
        query_mask_mm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predicted cubes [B, M, P] for grid positions `target_ids_bm`; `query_mask_mm`: for self-attention."""
        context_bnd = self.embed(features_bnd) + gather_tokens(self.positions, context_ids_bn)
        x_bmd = self.query_token + gather_tokens(self.positions, target_ids_bm)
        for block in self.blocks:
            x_bmd = block(x_bmd, context_bnd, mask_mn, query_mask_mm)
        return self.head(self.norm(x_bmd))


class ARVideo(nn.Module):
    """The pretraining model. Downstream only `encoder` is kept."""

    def __init__(self, config: ModelConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.tubelet = config.tubelet
        self.target_norm = config.target_norm
        self.clusters = make_clusters(config, decoder)
        tokens = math.prod(config.token_grid)
        size = ENCODER_SIZES[config.encoder]
        self.encoder = Encoder(size, config.tubelet, tokens)
        self.decoder = Decoder(decoder, size.width, tokens, 3 * math.prod(config.tubelet))
        self.apply(initialise)
        nn.init.trunc_normal_(self.decoder.query_token, std=0.02)
        constants = {
            "encoder_mask": self.clusters.encoder_mask(),
            "decoder_mask": self.clusters.decoder_mask(),
            "query_mask": self.clusters.query_mask() if decoder.self_attention else None,
            "pixel_mean": torch.tensor(IMAGENET_MEAN),
            "pixel_std": torch.tensor(IMAGENET_STD),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.encoder_mask: torch.Tensor
        self.decoder_mask: torch.Tensor
        self.query_mask: torch.Tensor | None
        self.pixel_mean: torch.Tensor
        self.pixel_std: torch.Tensor

    def forward(
        self,
        clips_bcthw: torch.Tensor,
        context_ids_bn: torch.Tensor,
        target_ids_bm: torch.Tensor,
        context_clips_bcthw: torch.Tensor | None = None,
    ) -> Output:
        """Loss and predictions of uint8 clips [B, 3, T, H, W].

        `context_ids_bn`, `target_ids_bm`: token ids in prediction order, as `Clusters.draw_sequence` draws
        them. `context_clips_bcthw`: clips that the encoder sees in place of the ones to be predicted; a model
        that uses its context does worse with them.
        """
        cubes_blp = to_cubes(clips_bcthw, self.tubelet)
        seen_blp = cubes_blp if context_clips_bcthw is None else to_cubes(context_clips_bcthw, self.tubelet)
        features_bnd = self.encoder(
            self._normalise(gather_tokens(seen_blp, context_ids_bn)), context_ids_bn, self.encoder_mask
        )
        predictions_bmp = self.decoder(
            features_bnd, context_ids_bn, target_ids_bm, self.decoder_mask, self.query_mask
        )
        targets_bmp = cube_targets(gather_tokens(cubes_blp, target_ids_bm), self.target_norm)
        loss_b = (predictions_bmp.float() - targets_bmp).square().mean(dim=(1, 2))
        return Output(loss_b, predictions_bmp, targets_bmp)

    def _normalise(self, cubes_bnp: torch.Tensor) -> torch.Tensor:
        pixels = cubes_bnp.unflatten(-1, (-1, 3)).float() / 255
        return ((pixels - self.pixel_mean) / self.pixel_std).flatten(-2)


def make_clusters(model: ModelConfig, decoder: DecoderConfig) -> Clusters:
    """The clusters, prediction order and queries that a configuration asks for."""
    return Clusters(
        model.token_grid,
        model.cluster,
        model.order,
        model.mask_ratio,
        model.min_context_clusters,
        decoder.target_ratio,
    )


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
