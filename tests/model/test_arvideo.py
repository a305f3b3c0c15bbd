"""Invariants of the model: what predicts what, and that the loss is the one of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arvideo_dist.config.model import DecoderConfig
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.pretraining import cube_targets, restore_pixels
from arvideo_dist.model.vit import from_cubes, sinusoid_positions, to_cubes
from tests.model.models import SELF_ATTENTION, make


def test_tokens_of_one_cluster_attend_to_each_other_both_ways() -> None:
    """At the level of the encoder: changing one kept token changes every feature of its cluster."""
    arvideo, clips, context_ids, _ = make(cluster=(2, 2, 2), mask_ratio=0.5)
    kept = arvideo.clusters.kept

    def features(video: torch.Tensor) -> torch.Tensor:
        cubes = to_cubes(video, arvideo.tubelet)[:1]
        seen = arvideo._normalise(cubes[:, context_ids[0]])
        return arvideo.encoder(seen, context_ids[:1], arvideo.encoder_mask)[0]

    with torch.no_grad():
        before = features(clips)
        for slot in (0, kept - 1):
            cubes = to_cubes(clips, arvideo.tubelet)
            cubes[0, context_ids[0, kept + slot]] ^= 0xFF
            after = features(from_cubes(cubes, arvideo.tubelet, (8, 32, 32)))
            changed = (after - before).abs().amax(dim=-1) > 0
            assert not changed[:kept].any()
            assert changed[kept:].all()


@pytest.mark.parametrize("norm", ["per_channel", "per_cube", "none"])
@pytest.mark.parametrize("min_context", [1, 2])
def test_loss_equals_a_reference_with_plain_loops(min_context: int, norm: str) -> None:
    """The reference runs cluster after cluster without any mask: the encoder and decoder are given only what
    they may see. It shares the layers, not the vectorised arithmetic around them."""
    arvideo, clips, context_ids, target_ids = make(
        cluster=(2, 2, 4), mask_ratio=0.75, min_context_clusters=min_context, target_norm=norm
    )
    clusters = arvideo.clusters
    with torch.no_grad():
        losses = arvideo(clips, context_ids, target_ids).loss_b
        for clip, context, target, loss in zip(clips, context_ids, target_ids, losses, strict=True):
            errors = []
            for place in range(min_context, clusters.count):
                features = _features_by_loops(arvideo, clip, context[: place * clusters.kept])
                begin = (place - min_context) * clusters.size
                for token in target[begin : begin + clusters.size].tolist():
                    predicted = _predict_one(arvideo, features, context[: place * clusters.kept], token)
                    errors.append((predicted - _target_by_loops(clip, token, norm)).square().mean())
            assert torch.stack(errors).mean().item() == pytest.approx(loss.item(), rel=2e-5)


def _cube_pixels(clip: torch.Tensor, token: int) -> torch.Tensor:
    """Pixels [2, 8, 8, 3] in [0, 1] of one cube of a 4 x 4 x 4 grid."""
    t, h, w = token // 16, token // 4 % 4, token % 4
    cube = clip[:, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
    return cube.permute(1, 2, 3, 0).float() / 255


def _target_by_loops(clip: torch.Tensor, token: int, norm: str) -> torch.Tensor:
    pixels = _cube_pixels(clip, token).numpy().astype(np.float64)
    if norm == "per_channel":
        for channel in range(3):
            values = pixels[..., channel]
            pixels[..., channel] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    elif norm == "per_cube":
        pixels = (pixels - pixels.mean()) / (pixels.std(ddof=1) + 1e-6)
    return torch.from_numpy(pixels).float().flatten()


def _position(token: int, width: int) -> torch.Tensor:
    angles = [token / 10000 ** (2 * (i // 2) / width) for i in range(width)]
    return torch.tensor([math.sin(a) if i % 2 == 0 else math.cos(a) for i, a in enumerate(angles)])


def _features_by_loops(arvideo: ARVideo, clip: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Encoder features of the last cluster's and all earlier tokens, one growing prefix at a time: tokens of
    a cluster are computed from their own and earlier clusters only, so layers run without a mask."""
    encoder, kept = arvideo.encoder, arvideo.clusters.kept
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    tokens = []
    for token in context.tolist():
        pixels = (_cube_pixels(clip, token) - mean) / std
        # the embedding as the convolution that VideoMAE has
        embedded = encoder.patch_embed.proj(pixels.permute(3, 0, 1, 2)[None]).flatten()
        tokens.append(embedded + _position(token, len(embedded)))
    layers = [torch.stack(tokens)]
    for block in encoder.blocks:
        rows = []
        for end in range(kept, len(context) + 1, kept):
            rows.append(block(layers[-1][None, :end])[0, end - kept :])
        layers.append(torch.cat(rows))
    return encoder.norm(layers[-1])


def _predict_one(arvideo: ARVideo, features: torch.Tensor, context: torch.Tensor, token: int) -> torch.Tensor:
    decoder = arvideo.decoder
    width = decoder.query_token.numel()
    memory = torch.stack(
        [decoder.embed(row) + _position(int(t), width) for row, t in zip(features, context, strict=True)]
    )[None]
    query = (decoder.query_token + _position(token, width))[None, None]
    everything = torch.ones(1, memory.shape[1], dtype=torch.bool)
    for block in decoder.blocks:
        query = block(query, memory, everything, None)
    return decoder.head(decoder.norm(query)).flatten()


def test_decoder_self_attention_equals_a_reference_with_plain_loops() -> None:
    """Each cluster's queries are given the queries up to their own cluster and the tokens before it, layer by
    layer, without any mask."""
    arvideo, clips, context_ids, target_ids = make(decoder=SELF_ATTENTION, cluster=(2, 2, 4), mask_ratio=0.75)
    clusters, decoder = arvideo.clusters, arvideo.decoder
    with torch.no_grad():
        expected = arvideo(clips, context_ids, target_ids).predictions_bmp[0]
        features = _features_by_loops(arvideo, clips[0], context_ids[0])
        positions = decoder.positions[0]
        memory = (decoder.embed(features) + positions[context_ids[0]])[None]
        queries = (decoder.query_token + positions[target_ids[0]])[None]
        for block in decoder.blocks:
            rows = []
            for place in range(1, clusters.count):
                end = place * clusters.size
                x = queries[:, :end]
                x = x + block.self_attn(block.norm0(x))
                x = x[:, -clusters.size :]
                everything = torch.ones(clusters.size, place * clusters.kept, dtype=torch.bool)
                x = x + block.cross_attn(block.norm1(x), memory[:, : place * clusters.kept], everything)
                rows.append(x + block.mlp(block.norm2(x)))
            queries = torch.cat(rows, dim=1)
        assert torch.allclose(decoder.head(decoder.norm(queries))[0], expected, atol=1e-5)


def test_subsampled_loss_and_gradient_converge_to_the_full_ones() -> None:
    """With order and context fixed, the mean over 320 draws of the queries is within 5 standard errors of the
    loss over all tokens; so is the mean gradient along ten random directions."""
    fixed = {"cluster": (2, 4, 4), "order": "spatial_first", "mask_ratio": 0.0}
    full, clips, context_ids, target_ids = make(**fixed)
    part = make(decoder=DecoderConfig(width=64, depth=2, target_ratio=0.1), **fixed)[0]
    part.load_state_dict(full.state_dict())
    assert part.clusters.queried == 3
    directions = [[torch.randn_like(p) for p in full.parameters()] for _ in range(10)]

    def measure(model: ARVideo, count: int, targets: torch.Tensor) -> torch.Tensor:
        batch = clips[:1].expand(count, -1, -1, -1, -1)
        loss = model(batch, context_ids[:1].expand(count, -1), targets).loss_b.mean()
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        along = [sum((g * d).sum() for g, d in zip(gradient, way, strict=True)) for way in directions]
        return torch.stack([loss.detach(), *along]).double()

    expected = measure(full, 1, target_ids[:1])
    rng = np.random.default_rng(1)
    means = []
    for _ in range(20):
        drawn = np.stack([part.clusters.draw_sequence(rng)[1] for _ in range(16)])
        means.append(measure(part, 16, torch.from_numpy(drawn)))
    observed = torch.stack(means)
    standard_error = observed.std(dim=0) / 20**0.5
    assert ((observed.mean(dim=0) - expected).abs() < 5 * standard_error).all()
    assert standard_error[0] < 0.02 * expected[0], "precise enough to see a bias"


def test_another_clips_context_changes_predictions_and_not_targets() -> None:
    arvideo, clips, context_ids, target_ids = make(cluster=(2, 2, 2))
    with torch.no_grad():
        own = arvideo(clips, context_ids, target_ids)
        other = arvideo(clips, context_ids, target_ids, clips.flip(0))
    assert torch.equal(own.targets_bmp, other.targets_bmp)
    assert not torch.equal(own.predictions_bmp, other.predictions_bmp)


@pytest.mark.parametrize("norm", ["per_channel", "per_cube", "none"])
def test_restored_targets_are_the_pixels(norm: str) -> None:
    cubes = torch.randint(0, 256, (2, 5, 384), dtype=torch.uint8)
    assert torch.allclose(restore_pixels(cube_targets(cubes, norm), cubes, norm), cubes / 255, atol=1e-5)


def test_flat_cube_has_target_zero() -> None:
    assert cube_targets(torch.full((1, 1, 384), 77, dtype=torch.uint8), "per_channel").eq(0).all()


def test_cubes_are_cut_and_put_together_in_videomae_order() -> None:
    clips = torch.randint(0, 256, (2, 3, 4, 16, 24), dtype=torch.uint8)
    cubes = to_cubes(clips, (2, 8, 8))
    assert cubes.shape == (2, 2 * 2 * 3, 2 * 8 * 8 * 3)
    token, p_t, p_h, p_w, channel = (1 * 2 + 1) * 3 + 2, 1, 5, 3, 2
    assert cubes[1, token, ((p_t * 8 + p_h) * 8 + p_w) * 3 + channel] == clips[1, channel, 3, 13, 19]
    assert torch.equal(from_cubes(cubes, (2, 8, 8), (4, 16, 24)), clips)


def test_position_table_equals_its_formula() -> None:
    table = sinusoid_positions(50, 12)[0]
    for token in (0, 1, 49):
        assert torch.allclose(table[token], _position(token, 12), atol=1e-6)
