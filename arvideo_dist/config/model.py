"""Geometry of the clip, its tokens and clusters, the encoder and the pretraining decoder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from arvideo_dist.config.section import ALTERS, RESHAPES, PositiveInt, Section, Triple


class EncoderConfig(Section):
    """The encoder and the geometry of its clips."""

    encoder: Annotated[Literal["demo", "tiny", "small", "base", "large", "huge"], RESHAPES] = Field(
        "base", description="ViT-Ti/S/B/L/H; demo is 192 wide and 6 deep"
    )
    frames: Annotated[PositiveInt, ALTERS] = Field(16, description="frames of a clip")
    image_size: Annotated[PositiveInt, ALTERS] = Field(
        224, description="height and width of a clip in pixels"
    )
    tubelet: Annotated[Triple, RESHAPES] = Field(
        (2, 16, 16), description="P_T,P_H,P_W: frames and pixels of one cube (token)"
    )
    init_from: Annotated[str | None, ALTERS] = Field(
        None,
        description="VideoMAE weights that the encoder starts from: a transformers folder, or a .safetensors, "
        ".pth, .pt or .bin file in its layout or the original repository's; null: random",
    )

    @property
    def token_grid(self) -> Triple:
        """Tokens of a clip along time, height and width."""
        p_t, p_h, p_w = self.tubelet
        return self.frames // p_t, self.image_size // p_h, self.image_size // p_w

    @model_validator(mode="after")
    def _check_tubelet(self) -> Self:
        clip = (self.frames, self.image_size, self.image_size)
        if any(size % cube for size, cube in zip(clip, self.tubelet, strict=True)):
            raise ValueError(f"tubelet {self.tubelet} does not divide the clip {clip}")
        return self


class ModelConfig(EncoderConfig):
    """A pretraining method: geometry of its tokens and clusters (paper 3.3) beside the encoder's."""

    kind: Annotated[Literal["arvideo", "videomae", "randsac"], RESHAPES] = Field(
        "arvideo",
        description="pretraining method. arvideo with cluster 1,1,1 and order spatial_first is TokenGPT, and with "
        "tubelet 1,1,1 besides iGPT, whose tokens are pixels. videomae has no clusters and masks tubes (its paper: "
        "model.mask_ratio 0.9, decoder.width 384). randsac's decoder has learned skip connections and its clusters "
        "are squares in random order. jobs/paper/methods has the paper's settings of each",
    )
    cluster: Annotated[Triple, ALTERS] = Field((2, 7, 7), description="K_T,K_H,K_W: tokens of one cluster")
    order: Annotated[Literal["random", "spatial_first", "temporal_first"], ALTERS] = Field(
        "random", description="prediction order of the clusters"
    )
    mask_ratio: Annotated[float, ALTERS] = Field(
        0.8,
        ge=0,
        lt=1,
        description="share of each cluster's tokens (videomae: of a frame's places) that the encoder does not see",
    )
    min_context_clusters: Annotated[PositiveInt, ALTERS] = Field(
        1, description="clusters every prediction sees; 1: 1470 queries, 2: 1372 as printed in Table 5"
    )
    target_norm: Annotated[Literal["per_channel", "per_cube", "none"], ALTERS] = Field(
        "per_channel", description="normalisation of each cube's target pixels"
    )

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        grid = self.token_grid
        if self.kind == "videomae":
            self._check_videomae(grid)
            return self
        if self.kind == "randsac":
            self._check_randsac()
        if any(size % k for size, k in zip(grid, self.cluster, strict=True)):
            fits = ["|".join(str(k) for k in range(1, size + 1) if size % k == 0) for size in grid]
            raise ValueError(
                f"cluster {self.cluster} does not divide the token grid {grid}; "
                f"accepted K_T: {fits[0]}, K_H: {fits[1]}, K_W: {fits[2]}"
            )
        clusters = 1
        for size, k in zip(grid, self.cluster, strict=True):
            clusters *= size // k
        if self.min_context_clusters >= clusters:
            raise ValueError(
                f"min_context_clusters {self.min_context_clusters} leaves nothing to predict: cluster "
                f"{self.cluster} makes {clusters} clusters of the token grid {grid}"
            )
        return self

    @model_validator(mode="after")
    def _check_target_norm(self) -> Self:
        if self.target_norm == "per_channel" and self.tubelet == (1, 1, 1):
            raise ValueError(
                "target_norm per_channel takes each channel's mean and deviation over a cube's pixels, of which "
                "tubelet (1, 1, 1) has one: set target_norm to none"
            )
        return self

    def _check_randsac(self) -> None:
        if self.cluster[1] != self.cluster[2]:
            raise ValueError(f"cluster {self.cluster}: randsac's segments are squares; set K_H and K_W alike")
        if self.order != "random":
            raise ValueError(f"order {self.order}: randsac's segments are in random order; leave order unset")

    def _check_videomae(self, grid: Triple) -> None:
        own = {"cluster", "order", "min_context_clusters"}
        if changed := sorted(n for n in own if getattr(self, n) != type(self).model_fields[n].default):
            raise ValueError(f"{', '.join(changed)}: videomae has no clusters; leave what orders them unset")
        if not int(self.mask_ratio * grid[1] * grid[2]):
            raise ValueError(
                f"mask_ratio {self.mask_ratio:g} masks none of {grid[1] * grid[2]} places a frame"
            )


class DecoderConfig(Section):
    """The cross-attention decoder (paper 3.3.3, Tables 9 and 10)."""

    width: Annotated[PositiveInt, RESHAPES] = Field(512, description="embedding width")
    depth: Annotated[PositiveInt, RESHAPES] = Field(4, description="blocks")
    head_width: Annotated[PositiveInt, ALTERS] = Field(64, description="width of one attention head")
    self_attention: Annotated[bool, RESHAPES] = Field(
        False, description="queries also attend to queries of their own and earlier clusters (Table 9)"
    )
    target_ratio: Annotated[float, ALTERS] = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each predicted cluster's tokens, drawn anew for every sample, that are queries; "
        "below 1 the loss is an unbiased estimate for less work (not in the paper)",
    )

    @model_validator(mode="after")
    def _check_queries(self) -> DecoderConfig:
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        if self.self_attention and self.target_ratio < 1:
            raise ValueError(
                f"target_ratio {self.target_ratio:g} is refused together with self_attention: queries that see "
                "each other predict something else when some are left out, so the loss would be biased; set "
                "target_ratio to 1 or self_attention to false"
            )
        return self
