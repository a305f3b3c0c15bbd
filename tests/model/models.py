"""Small models with disturbed weights, and the check that every leak test makes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.vit import from_cubes, to_cubes

GEOMETRY = {"frames": 8, "image_size": 32, "tubelet": (2, 8, 8)}  # 4 x 4 x 4 tokens
PIXELS = {"frames": 4, "image_size": 4, "tubelet": (1, 1, 1), "cluster": (1, 1, 1), "target_norm": "none"}
DECODER = DecoderConfig(width=64, depth=2)
SELF_ATTENTION = DecoderConfig(width=64, depth=2, self_attention=True)
SUBSAMPLED = DecoderConfig(width=64, depth=2, target_ratio=0.4)


class Made(NamedTuple):
    model: ARVideo
    clips: torch.Tensor
    context_ids: torch.Tensor
    target_ids: torch.Tensor


def make(seed: int = 0, decoder: DecoderConfig = DECODER, **model: object) -> Made:
    """A model with every parameter disturbed (so that nothing is zero by initialisation) and two clips."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"encoder": "demo", **GEOMETRY, **model})
    arvideo = build_model(config, decoder)
    assert isinstance(arvideo, ARVideo)
    with torch.no_grad():
        for parameter in arvideo.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rng = np.random.default_rng(seed)
    drawn = [arvideo.clusters.draw_sequence(rng) for _ in range(2)]
    context_ids, target_ids = (torch.from_numpy(np.stack(ids)) for ids in zip(*drawn, strict=True))
    size = config.frames, config.image_size, config.image_size
    clips = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    return Made(arvideo, clips, context_ids, target_ids)


def check_no_leak(made: Made, precision: str) -> None:
    """Other pixels in cluster j change no prediction of clusters up to j in the order, exactly, and do change
    each later one (for which some changed tokens must be seen)."""
    arvideo, clips, context_ids, target_ids = made
    clusters, min_context = arvideo.clusters, arvideo.clusters.min_context
    in_order = order_of(made)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        before = arvideo(clips, context_ids, target_ids).predictions_bmp[0]
        assert before.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        places = {0, 1, len(in_order) // 2, len(in_order) - 2, len(in_order) - 1}
        for place in places:
            cubes = to_cubes(clips, arvideo.tubelet).clone()  # of single pixels it is a view
            cubes[0, torch.from_numpy(clusters.members_kn[in_order[place]])] ^= 0xFF
            changed = from_cubes(cubes, arvideo.tubelet, tuple(clips.shape[2:]))
            after = arvideo(changed, context_ids, target_ids).predictions_bmp[0]
            difference = (after - before).abs().amax(dim=-1).view(-1, clusters.queried).amax(dim=-1)
            up_to = max(place - min_context + 1, 0)
            assert difference[:up_to].eq(0).all(), f"cluster at place {place} leaks"
            assert difference[up_to:].gt(0).all(), f"cluster at place {place} is not used later"


def order_of(made: Made) -> list[int]:
    """The first clip's cluster ids in prediction order."""
    clusters = made.model.clusters
    cluster_of = {int(token): number for number, row in enumerate(clusters.members_kn) for token in row}
    first = [cluster_of[int(t)] for t in made.context_ids[0, :: clusters.kept]]
    return [*first, cluster_of[int(made.target_ids[0, -1])]]
