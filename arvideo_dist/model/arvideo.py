"""ARVideo: block-causal encoder, cross-attention decoder, pixels of every next cluster (paper 3.3).

Letters: B clips, L tokens of the grid, N encoder tokens, M decoder queries, D width, P values of a cube,
S feature maps of the encoder: one, or one for each decoder block.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.clusters import Clusters
from arvideo_dist.model.pretraining import PretrainingModel
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
)


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
        features_sbnd: torch.Tensor,
        context_ids_bn: torch.Tensor,
        target_ids_bm: torch.Tensor,
        mask_mn: torch.Tensor,
        query_mask_mm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predicted cubes [B, M, P] for grid positions `target_ids_bm`.

        `features_sbnd`: S = 1 for features that all blocks attend to, else those of each block;
        `query_mask_mm`: for self-attention.
        """
        contexts_sbnd = self.embed(features_sbnd) + gather_tokens(self.positions, context_ids_bn)
        x_bmd = self.query_token + gather_tokens(self.positions, target_ids_bm)
        for block, context_bnd in zip(
            self.blocks, contexts_sbnd.expand(len(self.blocks), -1, -1, -1), strict=True
        ):
            x_bmd = block(x_bmd, context_bnd, mask_mn, query_mask_mm)
        return self.head(self.norm(x_bmd))


class ARVideo(PretrainingModel):
    """The paper's pretraining model."""

    def __init__(self, config: ModelConfig, decoder: DecoderConfig) -> None:
        super().__init__(config.tubelet, config.target_norm)
        self.sequences = self.clusters = make_clusters(config, decoder)
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
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.encoder_mask: torch.Tensor
        self.decoder_mask: torch.Tensor
        self.query_mask: torch.Tensor | None

    def predict(
        self, cubes_bnp: torch.Tensor, context_ids_bn: torch.Tensor, target_ids_bm: torch.Tensor
    ) -> torch.Tensor:
        features_sbnd = self.encoder(cubes_bnp, context_ids_bn, self.encoder_mask).unsqueeze(0)
        return self.decoder(features_sbnd, context_ids_bn, target_ids_bm, self.decoder_mask, self.query_mask)


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
