"""The VideoMAE baseline against transformers' VideoMAEForPreTraining, and its masking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.layouts import to_encoder
from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD
from arvideo_dist.model.videomae import TubeMasking, VideoMAE
from arvideo_dist.model.vit import from_cubes, to_cubes
from arvideo_dist.tasks.derived import derive

DECODER = DecoderConfig(width=64, depth=2, head_width=32)


def small(**changes: object) -> ModelConfig:
    geometry = {"encoder": "demo", "frames": 4, "image_size": 64, "tubelet": (2, 16, 16)}
    return ModelConfig(**{"kind": "videomae", "mask_ratio": 0.75, **geometry, **changes})


def theirs_and_ours(norm_pix_loss: bool) -> tuple[VideoMAEForPreTraining, VideoMAE]:
    """The same disturbed weights in both; the decoder's names are those of a block without its encoder."""
    torch.manual_seed(0)
    theirs = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=64, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=192, num_hidden_layers=6,
            num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, use_mean_pooling=False,
            decoder_hidden_size=64, decoder_num_attention_heads=2, decoder_num_hidden_layers=2,
            decoder_intermediate_size=256, norm_pix_loss=norm_pix_loss,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    ours = build_model(small(target_norm="per_channel" if norm_pix_loss else "none"), DECODER)
    assert isinstance(ours, VideoMAE)
    weights = theirs.state_dict()
    ours.encoder.load_state_dict(to_encoder(weights))
    decoder = {n.removeprefix("decoder."): v for n, v in weights.items() if n.startswith("decoder.")}
    blocks = {n.replace("decoder_layers", "encoder.layer"): v for n, v in decoder.items() if "layers" in n}
    embed = weights["videomae.embeddings.patch_embeddings.projection.weight"]
    renamed = to_encoder({"embeddings.patch_embeddings.projection.weight": embed, **blocks})
    ours.decoder.load_state_dict(
        {
            **{name: value for name, value in renamed.items() if name.startswith("blocks.")},
            **{name: value for name, value in decoder.items() if name.startswith(("norm.", "head."))},
            "embed.weight": weights["encoder_to_decoder.weight"],
            "mask_token": weights["mask_token"].flatten(),
        }
    )
    return theirs, ours


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_predictions_equal_transformers(norm_pix_loss: bool) -> None:
    theirs, ours = theirs_and_ours(norm_pix_loss)
    rng = np.random.default_rng(0)
    clips = torch.from_numpy(rng.integers(0, 256, (2, 3, 4, 64, 64), dtype=np.uint8))
    drawn = [ours.sequences.draw_sequence(rng) for _ in range(2)]
    visible, masked = (torch.from_numpy(np.stack(ids)) for ids in zip(*drawn, strict=True))
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    bool_masked_pos = torch.zeros(2, 32, dtype=torch.bool).scatter(1, masked, True)
    with torch.no_grad():
        expected = theirs(((clips / 255 - mean) / std).transpose(1, 2), bool_masked_pos=bool_masked_pos)
        output = ours(clips, visible, masked)
    assert output.loss_b.mean().item() == pytest.approx(expected.loss.item(), abs=1e-4)
    assert (output.predictions_bmp - expected.logits).abs().max() < 1e-4


def test_masked_pixels_reach_no_prediction_and_visible_ones_reach_all() -> None:
    """Exactly, in fp32 and under bf16 autocast."""
    _, ours = theirs_and_ours(True)
    rng = np.random.default_rng(0)
    clips = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 64, 64), dtype=np.uint8))
    visible, masked = (torch.from_numpy(ids)[None] for ids in ours.sequences.draw_sequence(rng))
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            before = ours(clips, visible, masked).predictions_bmp
            for ids, reaches in ((masked[0], False), (visible[0, :1], True)):
                cubes = to_cubes(clips, (2, 16, 16))
                cubes[0, ids] ^= 0xFF
                changed = from_cubes(cubes, (2, 16, 16), (4, 64, 64))
                difference = (ours(changed, visible, masked).predictions_bmp - before).abs().amax(dim=-1)
                assert (difference > 0).all() if reaches else (difference == 0).all()


def test_tubes_cover_the_same_uniform_places_at_every_time() -> None:
    masking = TubeMasking((3, 4, 4), 0.9)
    assert (masking.encoder_tokens, masking.decoder_queries) == (3 * 2, 3 * 14)
    rng, visible_count = np.random.default_rng(0), np.zeros(16)
    for _ in range(4000):
        visible, masked = masking.draw_sequence(rng)
        assert sorted([*visible, *masked]) == list(range(48))
        places = visible.reshape(3, 2)
        assert (places % 16 == places[0]).all()
        visible_count[places[0]] += 1
    share = 1 / 8  # five standard deviations
    assert np.abs(visible_count / 4000 - share).max() < 5 * math.sqrt(share * (1 - share) / 4000)


def test_base_model_has_the_papers_tokens_and_costs_what_the_reference_counts() -> None:
    """208.9 GFLOP, as transformers' class costs, which embeds masked cubes too before it drops them."""
    model, decoder = ModelConfig(kind="videomae", mask_ratio=0.9), DecoderConfig(width=384)
    derived = derive(PretrainConfig(model=model, decoder=decoder), None)
    assert (derived.encoder_tokens, derived.decoder_queries, derived.clusters) == (160, 1408, None)
    embedding_masked = 2 * 2 * 1408 * 1536 * 768 / 1e9  # forward and the weight's gradient
    assert derived.gflops_per_clip == pytest.approx(202.3, abs=0.05)
    assert derived.gflops_per_clip + embedding_masked == pytest.approx(208.9, abs=0.05)


@pytest.mark.parametrize(
    ("model", "decoder", "message"),
    [
        ({"order": "spatial_first"}, {}, "order: videomae has no clusters"),
        ({"mask_ratio": 0.05}, {}, "masks none of 16 places"),
        ({}, {"target_ratio": 0.5}, "belong to model.kind arvideo"),
        ({}, {"self_attention": True}, "belong to model.kind arvideo"),
    ],
)
def test_settings_of_other_methods_are_refused(model: dict, decoder: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(model=small(**model), decoder=DecoderConfig(**decoder))
