"""The classifier against transformers' class; drop path, dropout and layer decay against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.classifier import (
    Classifier,
    Kept,
    draw_kept,
    drop_path_rates,
    layer_of,
    layer_scale,
    soft_cross_entropy,
)
from arvideo_dist.model.layouts import load_encoder, to_encoder
from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder, EncoderSize, to_cubes

TUBELET, TOKENS, CLASSES = (2, 16, 16), 8, 7
SIZE = ENCODER_SIZES["demo"]


def clips(number: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)


def theirs_and_ours(
    classes: int = CLASSES, **options: float
) -> tuple[VideoMAEForVideoClassification, Classifier]:
    """The same disturbed weights in both."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=192, num_hidden_layers=6,
        num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    config.num_labels = classes
    theirs = VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = Classifier(SIZE, TUBELET, TOKENS, classes, **options)
    weights = theirs.state_dict()
    assert not load_encoder(ours.encoder, weights)
    ours.fc_norm.load_state_dict({kind: weights[f"fc_norm.{kind}"] for kind in ("weight", "bias")})
    ours.head.load_state_dict({kind: weights[f"classifier.{kind}"] for kind in ("weight", "bias")})
    return theirs, ours


def for_transformers(clips_bcthw: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((clips_bcthw / 255 - mean) / std).transpose(1, 2)


def gradients_of(theirs: VideoMAEForVideoClassification) -> dict[str, torch.Tensor]:
    """By the names of the classifier's parameters."""
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    renamed = {f"encoder.{name}": value for name, value in to_encoder(gradients).items()}
    for kind in ("weight", "bias"):
        renamed[f"fc_norm.{kind}"] = gradients[f"fc_norm.{kind}"]
        renamed[f"head.{kind}"] = gradients[f"classifier.{kind}"]
    return renamed


def test_logits_loss_and_gradients_equal_transformers() -> None:
    """In fp32; the gradient of every parameter, relative to its norm."""
    theirs, ours = theirs_and_ours()
    labels = torch.tensor([0, 6, 3])
    expected = theirs(for_transformers(clips()), labels=labels)
    logits = ours.train()(clips())
    loss_b = soft_cross_entropy(logits, torch.nn.functional.one_hot(labels, CLASSES).float())
    assert (logits - expected.logits).abs().max() < 1e-4
    assert loss_b.mean().item() == pytest.approx(expected.loss.item(), rel=1e-5)
    expected.loss.backward()
    loss_b.mean().backward()
    expected_gradients = gradients_of(theirs)
    ours_by_name = dict(ours.named_parameters())
    assert expected_gradients.keys() == ours_by_name.keys()
    for name, gradient in expected_gradients.items():
        assert (ours_by_name[name].grad - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("source", ["pretraining", "transformers"])
def test_weights_that_pretraining_takes_load_and_leave_their_final_norm(source: str) -> None:
    torch.manual_seed(2)
    if source == "pretraining":
        geometry = {"frames": 4, "image_size": 32, "tubelet": TUBELET, "cluster": (1, 1, 2)}
        model = ARVideo(ModelConfig(encoder="demo", **geometry), DecoderConfig(width=64, depth=1))
        weights = model.encoder.state_dict()
    else:
        weights = VideoMAEModel(theirs_and_ours()[0].config).state_dict()
        weights |= {"layernorm.weight": torch.ones(192), "layernorm.bias": torch.zeros(192)}
    classifier, encoder = Classifier(SIZE, TUBELET, TOKENS, CLASSES), Encoder(SIZE, TUBELET, TOKENS)
    assert load_encoder(classifier.encoder, weights)
    assert load_encoder(encoder, weights)
    encoder.norm = torch.nn.Identity()
    cubes = normalise_pixels(to_cubes(clips(), TUBELET))
    with torch.no_grad():
        assert torch.equal(classifier.encoder(cubes), encoder(cubes))
    assert not any(name.startswith("encoder.norm") for name, _ in classifier.named_parameters())


def test_without_ids_the_encoder_sees_the_whole_grid_in_order() -> None:
    encoder = Encoder(SIZE, TUBELET, TOKENS)
    cubes = normalise_pixels(to_cubes(clips(), TUBELET))
    with torch.no_grad():
        expected = encoder(cubes, torch.arange(TOKENS).expand(3, -1))
        assert torch.equal(encoder(cubes), expected)


def test_a_fresh_head_is_a_thousandth_of_a_normal_of_two_hundredths() -> None:
    torch.manual_seed(0)
    classifier = Classifier(EncoderSize(192, 1, 3), TUBELET, TOKENS, 1000)
    deviation = classifier.head.weight.std().item()
    assert deviation == pytest.approx(2e-5, rel=5 / math.sqrt(2 * 192_000))  # five standard errors
    assert classifier.head.bias.eq(0).all()
    assert classifier.fc_norm.weight.eq(1).all()
    torch.manual_seed(0)
    larger = Classifier(EncoderSize(192, 1, 3), TUBELET, TOKENS, 1000, head_init_scale=1)
    assert torch.allclose(larger.head.weight, 1000 * classifier.head.weight)


def slow_logits(model: Classifier, clip: torch.Tensor, kept: Kept) -> torch.Tensor:
    """One clip, block by block; a dropped branch is not computed at all."""
    x = model.encoder.patch_embed(normalise_pixels(to_cubes(clip[None], TUBELET))) + model.encoder.positions
    depth = len(model.encoder.blocks)
    for number, block in enumerate(model.encoder.blocks):
        stays = 1 - 0.4 * number / (depth - 1)
        if kept.branches[number, 0]:
            x = x + block.attn(block.norm1(x)) / stays
        if kept.branches[number, 1]:
            x = x + block.mlp(block.norm2(x)) / stays
    pooled = model.fc_norm(x.mean(dim=1))
    pooled[:, ~kept.features] = 0
    return model.head(pooled / 0.5)[0]


def drawn(number: int, drop_path: float, head_dropout: float) -> Kept:
    rng = np.random.default_rng(5)
    branches, features = zip(
        *(draw_kept(rng, SIZE, drop_path, head_dropout) for _ in range(number)), strict=True
    )
    return Kept(torch.from_numpy(np.stack(branches)), torch.from_numpy(np.stack(features)))


def test_dropped_branches_and_features_are_left_out_and_the_others_scaled() -> None:
    _, ours = theirs_and_ours(drop_path=0.4, head_dropout=0.5)
    kept = drawn(3, 0.4, 0.5)
    assert not kept.branches.all()
    with torch.no_grad():
        found = ours.train()(clips(), kept)
        for number, clip in enumerate(clips()):
            own = Kept(kept.branches[number], kept.features[number])
            assert (found[number] - slow_logits(ours, clip, own)).abs().max() < 1e-5
        plain = ours(clips())
        assert (found - plain).abs().max() > 0.01
        assert torch.equal(ours.eval()(clips(), kept), plain), "evaluation drops nothing"


def test_a_clips_logits_do_not_depend_on_what_its_neighbours_drop() -> None:
    _, ours = theirs_and_ours(drop_path=0.4)
    kept = drawn(3, 0.4, 0.0)
    others = Kept(kept.branches.clone(), kept.features)
    others.branches[1:] = ~others.branches[1:]
    with torch.no_grad():
        first, second = ours.train()(clips(), kept), ours(clips(), others)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1:], second[1:])


def test_branches_are_dropped_at_rates_that_grow_from_zero() -> None:
    draws = 20_000
    rates = drop_path_rates(0.4, SIZE.depth)
    assert rates.tolist() == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4])
    kept = drawn(draws, 0.4, 0.5)
    dropped = 1 - kept.branches.double().mean(dim=0).numpy()
    assert dropped[0].max() == 0
    deviation = np.sqrt(rates * (1 - rates) / draws)[:, None]
    assert (np.abs(dropped - rates[:, None]) <= 5 * deviation).all()
    features = kept.features.double().mean(dim=0).numpy()
    assert np.abs(features - 0.5).max() < 5 * math.sqrt(0.25 / draws)
    # Branches fall independently of each other.
    both = (~kept.branches[:, 5, 0] & ~kept.branches[:, 5, 1]).double().mean().item()
    assert both == pytest.approx(0.16, abs=5 * math.sqrt(0.16 * 0.84 / draws))
    assert drawn(4, 0.0, 0.0).branches.all()
    assert drawn(4, 0.0, 0.0).features.all()


def test_the_expected_block_output_is_that_without_drop_path() -> None:
    """Exactly: the mean over both outcomes of a branch, weighted by their probabilities."""
    _, ours = theirs_and_ours()
    block, rate = ours.encoder.blocks[0], 0.3
    x = torch.randn(1, TOKENS, 192, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    block = block.double()
    with torch.no_grad():
        plain, attended = block(x), block.attn(block.norm1(x))
        kept, gone = (
            block(x, None, torch.tensor([[s, 0.0]], dtype=torch.float64)) for s in (1 / (1 - rate), 0.0)
        )
        assert torch.allclose((1 - rate) * kept + rate * gone, x + attended, atol=1e-12)
        assert torch.equal(block(x, None, torch.ones(1, 2).double()), plain)


def test_layer_decay_is_videomaes() -> None:
    """Values of its assigner for 12 blocks and decay 0.75, and which parameters they go to."""
    values = [0.75 ** (13 - layer) for layer in range(14)]
    with torch.device("meta"):
        names = [n for n, _ in Classifier(ENCODER_SIZES["base"], TUBELET, TOKENS, CLASSES).named_parameters()]
    expected = {}
    for name in names:
        if "patch_embed" in name:
            expected[name] = 0
        elif "blocks." in name:
            expected[name] = int(name.split("blocks.")[1].split(".")[0]) + 1
        else:
            expected[name] = 13
    assert {name: layer_of(name, 12) for name in names} == expected
    assert {layer_of(name, 12) for name in names} == set(range(14))
    assert {name: layer_scale(name, 12, 0.75) for name in names} == pytest.approx(
        {name: values[layer] for name, layer in expected.items()}
    )
    assert layer_scale("encoder.patch_embed.proj.weight", 12, 0.75) == pytest.approx(0.023757, abs=1e-6)
    assert layer_scale("encoder.blocks.11.norm1.weight", 12, 0.75) == 0.75
    assert layer_scale("fc_norm.bias", 12, 0.75) == layer_scale("head.weight", 12, 0.75) == 1
    assert layer_scale("encoder.blocks.0.attn.q_bias", 12, 1.0) == 1


def test_soft_cross_entropy_is_the_mean_surprise_of_each_row() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    expected = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        expected.append(-sum(t * math.log(math.exp(v) / total) for v, t in zip(row, target, strict=True)))
    assert soft_cross_entropy(logits, targets).tolist() == pytest.approx(expected, rel=1e-6)
    assert soft_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_the_loss_may_run_under_bf16_autocast() -> None:
    _, ours = theirs_and_ours(drop_path=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours.train()(clips(), drawn(3, 0.4, 0.0))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
