"""Cubes, sinusoid positions, transformer blocks and the ViT encoder, laid out as VideoMAE's.

The layout (qkv without a key bias, LayerNorm eps 1e-6, parameter names of the original repository) lets
weights move both ways between this project and VideoMAE's checkpoints.

Letters: B clips, C channels, T frames, H x W pixels, L tokens of the grid, N tokens given, D width,
P = P_T P_H P_W C pixel values of a cube.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-6


class EncoderSize(NamedTuple):
    width: int
    depth: int
    heads: int


ENCODER_SIZES = {
    "demo": EncoderSize(192, 6, 3),
    "tiny": EncoderSize(192, 12, 3),
    "small": EncoderSize(384, 12, 6),
    "base": EncoderSize(768, 12, 12),
    "large": EncoderSize(1024, 24, 16),
    "huge": EncoderSize(1280, 32, 16),
}


def to_cubes(clips_bcthw: torch.Tensor, tubelet: tuple[int, int, int]) -> torch.Tensor:
    """Cut clips [B, C, T, H, W] into cubes [B, L, P], values ordered (p_t p_h p_w c) as in VideoMAE."""
    b, c, t, h, w = clips_bcthw.shape
    p_t, p_h, p_w = tubelet
    grid = clips_bcthw.reshape(b, c, t // p_t, p_t, h // p_h, p_h, w // p_w, p_w)
    return grid.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, p_t * p_h * p_w * c)


def from_cubes(
    cubes_blp: torch.Tensor, tubelet: tuple[int, int, int], clip: tuple[int, int, int]
) -> torch.Tensor:
    """Inverse of `to_cubes`: cubes [B, L, P] to clips [B, C, T, H, W] with `clip` = (T, H, W)."""
    (p_t, p_h, p_w), (t, h, w) = tubelet, clip
    grid = cubes_blp.reshape(cubes_blp.shape[0], t // p_t, h // p_h, w // p_w, p_t, p_h, p_w, -1)
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(cubes_blp.shape[0], -1, t, h, w)


def gather_tokens(tokens_bld: torch.Tensor, ids_bn: torch.Tensor) -> torch.Tensor:
    """Rows `ids_bn` of each sample: [B, L, D] to [B, N, D]; a table [1, L, D] serves every sample."""
    width = tokens_bld.shape[-1]
    expanded = tokens_bld.expand(ids_bn.shape[0], -1, -1)
    return expanded.gather(1, ids_bn.unsqueeze(-1).expand(-1, -1, width))


def sinusoid_positions(tokens: int, width: int) -> torch.Tensor:
    """Fixed 1-D sinusoid table [1, tokens, width] over flattened positions (Vaswani et al.; VideoMAE)."""
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    pair = torch.arange(width, dtype=torch.float64).div(2, rounding_mode="floor")
    angle = position / torch.pow(torch.tensor(10000.0, dtype=torch.float64), 2 * pair / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.to(torch.float32).unsqueeze(0)


class TubeletEmbed(nn.Module):
    """Linear projection of cubes to tokens (paper 3.3.1).

    The weight has the shape of VideoMAE's Conv3d, [D, C, P_T, P_H, P_W], but is applied to cut cubes, so that
    only the cubes that the encoder sees are embedded.
    """

    def __init__(self, tubelet: tuple[int, int, int], width: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=tubelet, stride=tubelet)

    def forward(self, cubes_bnp: torch.Tensor) -> torch.Tensor:
        """Cubes [B, N, P] in (p_t p_h p_w c) order to tokens [B, N, D]."""
        weight_dp = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(cubes_bnp, weight_dp, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention; queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_bnd: torch.Tensor, mask_nn: torch.Tensor | None = None) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x_bnd, self.qkv.weight, bias).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads, mask_nn))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context of the same width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_bmd: torch.Tensor, context_bnd: torch.Tensor, mask_mn: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(context_bnd).chunk(2, dim=-1)
        return self.proj(attend(self.q(x_bmd), k, v, self.heads, mask_mn))


def attend(
    q_bmd: torch.Tensor, k_bnd: torch.Tensor, v_bnd: torch.Tensor, heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot-product attention; `mask` [M, N] is true where a query may attend."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_bmd, k_bnd, v_bnd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block of the encoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def forward(
        self,
        x_bnd: torch.Tensor,
        mask_nn: torch.Tensor | None = None,
        branch_scales_b2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`branch_scales_b2` multiplies each sample's attention and MLP branch (drop path: 0 drops it)."""
        attended_bnd = self.attn(self.norm1(x_bnd), mask_nn)
        if branch_scales_b2 is None:
            x_bnd = x_bnd + attended_bnd
            return x_bnd + self.mlp(self.norm2(x_bnd))
        attention_b11, mlp_b11 = branch_scales_b2[:, :, None, None].unbind(1)
        x_bnd = x_bnd + attention_b11 * attended_bnd
        return x_bnd + mlp_b11 * self.mlp(self.norm2(x_bnd))


class Encoder(nn.Module):
    """ViT over any subset of a clip's tokens, in any order (paper 3.3.3)."""

    def __init__(
        self, size: EncoderSize, tubelet: tuple[int, int, int], tokens: int, *, final_norm: bool = True
    ) -> None:
        """`tokens`: L, tokens of the whole grid. A classifier pools before its norm: `final_norm=False`."""
        super().__init__()
        self.patch_embed = TubeletEmbed(tubelet, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm: nn.Module = nn.LayerNorm(size.width, eps=NORM_EPS) if final_norm else nn.Identity()
        self.register_buffer("positions", sinusoid_positions(tokens, size.width), persistent=False)
        self.positions: torch.Tensor

    def forward(
        self,
        cubes_bnp: torch.Tensor,
        ids_bn: torch.Tensor | None = None,
        mask_nn: torch.Tensor | None = None,
        branch_scales_bd2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features [B, N, D] of normalised cubes [B, N, P] that stand at grid positions `ids_bn`.

        `ids_bn=None`: the whole grid in its own order (N = L). `branch_scales_bd2`: float [B, depth, 2], what each
        block's attention and MLP branch are multiplied by (drop path).
        """
        for x_bnd in self.layers(cubes_bnp, ids_bn, mask_nn, branch_scales_bd2):  # noqa: B007 - the last one is used
            pass
        return self.norm(x_bnd)

    def layers(
        self,
        cubes_bnp: torch.Tensor,
        ids_bn: torch.Tensor | None = None,
        mask_nn: torch.Tensor | None = None,
        branch_scales_bd2: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """The output [B, N, D] of each block in turn, before the final norm."""
        positions = self.positions if ids_bn is None else gather_tokens(self.positions, ids_bn)
        x_bnd = self.patch_embed(cubes_bnp) + positions
        for number, block in enumerate(self.blocks):
            scales_b2 = None if branch_scales_bd2 is None else branch_scales_bd2[:, number]
            x_bnd = block(x_bnd, mask_nn, scales_b2)
            yield x_bnd


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, unit norms (VideoMAE; `module.apply(initialise)`).

    The tubelet embedding counts as the linear layer that it is, as in MAE.
    """
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.dim() > 2 else module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
