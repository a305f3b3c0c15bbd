"""Actions of persons in a clip: the encoder's tokens over time, RoIAlign over each box, and one linear layer.

VideoMAE's detector of AVA (MCG-NJU/VideoMAE-Action-Detection): tokens with the final norm, their mean over time as
a map, RoIAlign of 7 x 7 cells, the maximum over the cells, a linear head whose outputs are independent of each
other.

Letters: B clips, M boxes of a clip, D width, K actions, H x W cells of the map, S x S cells of a box.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels
from arvideo_dist.model.vit import Encoder, EncoderSize, initialise, to_cubes

CELLS = 7


class Detector(nn.Module):
    """Logits of the actions of given boxes."""

    drop_path_rates: torch.Tensor
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        size: EncoderSize,
        tubelet: tuple[int, int, int],
        token_grid: tuple[int, int, int],
        classes: int,
        *,
        drop_path: float = 0.0,
        head_init_scale: float = 0.001,
    ) -> None:
        """`token_grid`: tokens over time, height and width."""
        super().__init__()
        self.tubelet, self.token_grid = tubelet, token_grid
        self.encoder = Encoder(size, tubelet, token_grid[0] * token_grid[1] * token_grid[2])
        self.head = nn.Linear(size.width, classes)
        self.apply(initialise)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
        rates = torch.linspace(0, drop_path, size.depth)
        self.register_buffer("drop_path_rates", rates, persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD), persistent=False)

    def forward(
        self, clips_bcthw: torch.Tensor, boxes_bm4: torch.Tensor, branches_bd2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits float32 [B, M, K] of clips [B, 3, T, H, W] in the range of uint8.

        `boxes_bm4`: left, top, right, bottom as shares of the clip's width and height, from 0 to 1; rows that only
        fill up the M have some box, and logits of no meaning. `branches_bd2`: bool [B, depth, 2], which attention
        and MLP branches drop path keeps; in training mode only.
        """
        cubes_blp = normalise_pixels(to_cubes(clips_bcthw, self.tubelet), self.pixel_mean, self.pixel_std)
        scales_bd2 = None
        if branches_bd2 is not None and self.training:
            scales_bd2 = branches_bd2 / (1 - self.drop_path_rates[:, None])
        tokens_bld = self.encoder(cubes_blp, branch_scales_bd2=scales_bd2)
        map_bhwd = tokens_bld.unflatten(1, self.token_grid).mean(dim=1)
        _, height, width = self.token_grid
        cells = boxes_bm4 * boxes_bm4.new_tensor([width, height, width, height])
        return self.head(roi_align(map_bhwd, cells, CELLS).amax(dim=(2, 3))).float()


def roi_align(map_bhwd: torch.Tensor, boxes_bm4: torch.Tensor, cells: int) -> torch.Tensor:
    """Features [B, M, S, S, D] of boxes, left, top, right, bottom in cells of the map: RoIAlign (arXiv 1703.06870).

    As torchvision's with `aligned=False` and `sampling_ratio=0`, which VideoMAE's detector has: a box is at least
    one cell of the map wide and high (and here no larger than the map), each of its S x S cells is the mean of
    ceil(side / S) squared bilinear samples, and samples further than a cell outside the map are 0. Bilinear
    interpolation and the samples' grid both are products of one row and one column, so the whole is a product with
    one matrix for each side.
    """
    _, height, width, _ = map_bhwd.shape
    left, top, right, bottom = boxes_bm4.float().unbind(-1)
    rows_bmsh = _side_weights(top, bottom, cells, height).to(map_bhwd.dtype)
    columns_bmsw = _side_weights(left, right, cells, width).to(map_bhwd.dtype)
    over_rows = torch.einsum("bmsh,bhwd->bmswd", rows_bmsh, map_bhwd)
    return torch.einsum("bmtw,bmswd->bmstd", columns_bmsw, over_rows)


def _side_weights(begin_bm: torch.Tensor, end_bm: torch.Tensor, cells: int, length: int) -> torch.Tensor:
    """What each of the map's `length` rows counts in each of a box's cells [B, M, S, length], along one side."""
    side_bm = (end_bm - begin_bm).clamp(min=1)
    most = -(-length // cells)  # known without asking the device how large its boxes are
    counts_bm = (side_bm / cells).ceil().clamp(max=most)  # samples of a cell
    numbers = torch.arange(most, device=begin_bm.device)
    inside_cell = (numbers + 0.5) / counts_bm[..., None]  # [B, M, most]: places within a cell
    cell = torch.arange(cells, device=begin_bm.device)[:, None]
    places = (
        begin_bm[..., None, None] + (cell + inside_cell[..., None, :]) * (side_bm / cells)[..., None, None]
    )
    counted = (numbers < counts_bm[..., None])[..., None, :] & (places >= -1) & (places <= length)
    rows = torch.arange(length, device=begin_bm.device)
    hats = F.relu(1 - (places.clamp(0, length - 1)[..., None] - rows).abs())
    return (hats * counted[..., None]).sum(-2) / counts_bm[..., None, None]
