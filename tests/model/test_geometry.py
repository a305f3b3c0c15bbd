"""Clips, tubelets and clusters of other sizes by configuration alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.tasks.derived import derive
from tests.model.models import check_no_leak, make

DECODER = DecoderConfig(width=64, depth=1)
# frames, pixels a side, tubelet, cluster, token grid
GEOMETRIES = [
    (8, 112, (2, 16, 16), (2, 7, 7), (4, 7, 7)),
    (16, 160, (2, 16, 16), (4, 5, 5), (8, 10, 10)),
    (16, 384, (2, 16, 16), (2, 8, 8), (8, 24, 24)),
    (32, 224, (4, 16, 16), (2, 7, 7), (8, 14, 14)),
    (10, 128, (1, 8, 16), (5, 4, 4), (10, 16, 8)),
    (64, 112, (2, 14, 14), (8, 4, 4), (32, 8, 8)),
    (64, 384, (4, 32, 32), (4, 6, 6), (16, 12, 12)),
]


@pytest.fixture(autouse=True)
def _narrow_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODER_SIZES, "demo", EncoderSize(width=64, depth=2, heads=2))


@pytest.mark.parametrize("kind", ["arvideo", "videomae"])
@pytest.mark.parametrize(("frames", "pixels", "tubelet", "cluster", "grid"), GEOMETRIES)
def test_other_geometries_train(
    frames: int,
    pixels: int,
    tubelet: tuple[int, int, int],
    cluster: tuple[int, int, int],
    grid: tuple[int, int, int],
    kind: str,
) -> None:
    """The grid, token counts and prediction that follow, and a finite gradient for every parameter."""
    clusters = {"cluster": cluster} if kind == "arvideo" else {}
    config = ModelConfig(
        kind=kind, encoder="demo", frames=frames, image_size=pixels, tubelet=tubelet, **clusters
    )
    assert config.token_grid == grid
    size, count = math.prod(cluster), math.prod(grid) // math.prod(cluster)
    places, masked = grid[1] * grid[2], int(0.8 * grid[1] * grid[2])
    derived = derive(PretrainConfig(model=config, decoder=DECODER), None)
    assert (derived.encoder_tokens, derived.decoder_queries) == (
        ((count - 1) * (size - int(0.8 * size)), (count - 1) * size)
        if kind == "arvideo"
        else (grid[0] * (places - masked), grid[0] * masked)
    )
    torch.manual_seed(0)
    model = build_model(config, DECODER)
    rng = np.random.default_rng(0)
    clip = torch.from_numpy(rng.integers(0, 256, (1, 3, frames, pixels, pixels), dtype=np.uint8))
    context_ids, target_ids = (torch.from_numpy(ids)[None] for ids in model.sequences.draw_sequence(rng))
    output = model(clip, context_ids, target_ids)
    assert output.predictions_bmp.shape == (1, derived.decoder_queries, 3 * math.prod(tubelet))
    output.loss_b.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_leak_where_height_width_and_time_differ() -> None:
    check_no_leak(
        make(frames=10, image_size=128, tubelet=(1, 8, 16), cluster=(5, 4, 2), mask_ratio=0.5), "fp32"
    )
