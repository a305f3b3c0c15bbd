"""RandSAC (Hua et al., 2022, arXiv 2203.12054) on video: square segments of tokens in random order, predicted
in parallel within a segment and one segment after the other, by a decoder with skip connections to the encoder.

Published: tokens form segments, squares among other shapes; a fresh random order serialises them; masks make
the prediction parallel within and sequential between segments; the decoder is a Transformer's, with learnable
skip connections to the encoder's layers. Chosen here if the sources are silent or speak of images only:

- A segment of a video is a cluster with K_H = K_W, on a fixed grid; `jobs/paper` has K_T = 1, squares of one time
  step, 7 x 7. Blobs and hierarchies of segments are left out.
- Each decoder block attends to its own mean of all encoder blocks' outputs, weighted by a softmax of learned
  numbers that begin equal; the encoder's norm comes after the mean.
- Masks, positions, targets and loss are ARVideo's. `jobs/paper` drops no tokens (`mask_ratio` 0), and its decoder
  has self-attention as a Transformer's has.

Letters as in arvideo.py; E blocks of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.arvideo import ARVideo


class SkipConnections(nn.Module):
    """One weighted mean of the encoder's layers for each of `maps` decoder blocks."""

    def __init__(self, layers: int, maps: int) -> None:
        super().__init__()
        self.layers = layers
        # 1-D, so that the optimiser's rule for weight decay leaves it alone.
        self.logits = nn.Parameter(torch.zeros(maps * layers))

    def forward(self, layers_bnd: Iterable[torch.Tensor]) -> torch.Tensor:
        """Means [S, B, N, D] of E layers [B, N, D]."""
        weights_se = self.logits.unflatten(0, (-1, self.layers)).softmax(dim=-1)
        means_sbnd = torch.einsum("se,ebnd->sbnd", weights_se, torch.stack(list(layers_bnd)))
        # As the blocks' own sums under autocast: a CPU's LayerNorm sums its gradients in its input's precision.
        return means_sbnd.float()


class RandSAC(ARVideo):
    """The autoregressive image model that the paper compares with, on video and in the same training stack."""

    def __init__(self, config: ModelConfig, decoder: DecoderConfig) -> None:
        super().__init__(config, decoder)
        self.skip = SkipConnections(len(self.encoder.blocks), decoder.depth)

    def predict(
        self, cubes_bnp: torch.Tensor, context_ids_bn: torch.Tensor, target_ids_bm: torch.Tensor
    ) -> torch.Tensor:
        layers = self.encoder.layers(cubes_bnp, context_ids_bn, self.encoder_mask)
        features_sbnd = self.encoder.norm(self.skip(layers))
        return self.decoder(features_sbnd, context_ids_bn, target_ids_bm, self.decoder_mask, self.query_mask)
