"""Every file of jobs/paper/: valid, with the paper's token counts, and trainable."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.settings import read_config
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.tasks.derived import derive

PAPER = Path(__file__).resolve().parents[2] / "jobs" / "paper"
# Encoder tokens, decoder queries and epochs by hand: of K clusters of n = k_t k_h k_w of the 8 x 14 x 14 tokens
# (Table 6), n - int(r n) are seen; all clusters but the last are read, all but the first predicted (3.3, Table 5).
# VideoMAE sees 8 x (196 - 176) tokens and predicts the others (90 % tubes).
ARVIDEO, VIDEOMAE, ELEMENTWISE, RANDSAC = (
    (15 * 20, 15 * 98), (160, 1408), (1567, 1567), (31 * 49, 31 * 49)
)  # fmt: skip
ROWS = {
    "arvideo-k400-800": (*ARVIDEO, 800),
    "arvideo-k400-1600": (*ARVIDEO, 1600),
    "arvideo-ssv2-800": (*ARVIDEO, 800),
    "arvideo-ssv2-2400": (*ARVIDEO, 2400),
    "videomae-k400-800": (*VIDEOMAE, 800),
    "videomae-k400-1600": (*VIDEOMAE, 1600),
    "videomae-ssv2-800": (*VIDEOMAE, 800),
    "videomae-ssv2-2400": (*VIDEOMAE, 2400),
    "tokengpt-k400-800": (*ELEMENTWISE, 800),
    "tokengpt-ssv2-800": (*ELEMENTWISE, 800),
    "igpt-k400-800": (*ELEMENTWISE, 800),
    "igpt-ssv2-800": (*ELEMENTWISE, 800),
    "randsac-k400-800": (*RANDSAC, 800),
    "randsac-ssv2-800": (*RANDSAC, 800),
    "ablation-arvideo": (*ARVIDEO, 200),
    "ablation-pixel": (*ELEMENTWISE, 200),
    "ablation-token": (*ELEMENTWISE, 200),
    "ablation-cluster-1x14x14": (7 * 40, 7 * 196, 200),
    "ablation-cluster-1x7x7": (31 * 10, 31 * 49, 200),
    "ablation-cluster-8x1x1": (195 * 2, 195 * 8, 200),
    "ablation-cluster-2x1x1": (783 * 1, 783 * 2, 200),
    "ablation-cluster-4x7x7": (7 * 40, 7 * 196, 200),
    "ablation-order-spatial-first": (*ARVIDEO, 200),
    "ablation-order-temporal-first": (*ARVIDEO, 200),
    "ablation-mask-75": (15 * 25, 15 * 98, 200),
    "ablation-mask-90": (15 * 10, 15 * 98, 200),
    "ablation-mask-95": (15 * 5, 15 * 98, 200),
    "ablation-decoder-self-attention": (*ARVIDEO, 200),
    "ablation-decoder-width-384": (*ARVIDEO, 200),
    "ablation-decoder-width-768": (*ARVIDEO, 200),
    "ablation-decoder-depth-2": (*ARVIDEO, 200),
    "ablation-decoder-depth-8": (*ARVIDEO, 200),
}
# What an ablation changes of ARVideo: one thing.
CHANGES = {
    "cluster-1x14x14": {"model.cluster": (1, 14, 14)},
    "cluster-1x7x7": {"model.cluster": (1, 7, 7)},
    "cluster-8x1x1": {"model.cluster": (8, 1, 1)},
    "cluster-2x1x1": {"model.cluster": (2, 1, 1)},
    "cluster-4x7x7": {"model.cluster": (4, 7, 7)},
    "order-spatial-first": {"model.order": "spatial_first"},
    "order-temporal-first": {"model.order": "temporal_first"},
    "mask-75": {"model.mask_ratio": 0.75},
    "mask-90": {"model.mask_ratio": 0.9},
    "mask-95": {"model.mask_ratio": 0.95},
    "decoder-self-attention": {"decoder.self_attention": True},
    "decoder-width-384": {"decoder.width": 384},
    "decoder-width-768": {"decoder.width": 768},
    "decoder-depth-2": {"decoder.depth": 2},
    "decoder-depth-8": {"decoder.depth": 8},
    "arvideo": {},
    "token": {"model.cluster": (1, 1, 1), "model.order": "spatial_first"},
    "pixel": {
        "model.cluster": (1, 1, 1),
        "model.order": "spatial_first",
        "model.frames": 8,
        "model.image_size": 14,
        "model.tubelet": (1, 1, 1),
        "model.target_norm": "none",
        "data.stride": 4,
    },
}


@pytest.fixture(autouse=True)
def _no_outer_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARVIDEO_CONFIG", raising=False)


def read(name: str) -> PretrainConfig:
    return read_config(PretrainConfig, ["--config", str(PAPER / f"{name}.yaml")])[0]


def test_the_tables_name_every_file() -> None:
    names = {file.stem for file in PAPER.glob("*.yaml")}
    assert names == set(ROWS)
    assert set(re.findall(r"\]\(([\w-]+)\.yaml\)", (PAPER / "README.md").read_text())) == names


@pytest.mark.parametrize("name", sorted(ROWS))
def test_tokens_schedule_and_clip_are_the_papers(name: str) -> None:
    given = read(name)
    derived = derive(given, None)
    assert (derived.encoder_tokens, derived.decoder_queries, given.train.epochs) == ROWS[name]
    assert (derived.peak_lr, derived.global_batch) == (pytest.approx(1.2e-3), 2048)
    assert given.run.name == name
    # a clip covers 64 source frames of Kinetics-400, 32 of SSv2
    assert given.model.frames * given.data.stride == (64 if "k400" in name else 32)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_an_ablation_is_arvideo_on_ssv2_but_for_what_it_ablates(name: str) -> None:
    base, given = read("arvideo-ssv2-800"), read(f"ablation-{name}")
    changed = {
        f"{section}.{field}": value
        for section, fields in given.model_dump().items()
        for field, value in fields.items()
        if value != getattr(getattr(base, section), field)
    }
    assert changed == {"run.name": f"ablation-{name}", "train.epochs": 200, **CHANGES[name]}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_two_optimisation_steps_at_reduced_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the file's geometry: every parameter gets a gradient and the loss on the same draw falls."""
    monkeypatch.setitem(ENCODER_SIZES, "demo", EncoderSize(width=64, depth=2, heads=1))
    given = read(name)
    losses = two_steps(
        given.model.model_copy(update={"encoder": "demo"}), given.decoder.model_copy(update={"width": 64})
    )
    assert losses[2] < losses[0]


@cache  # rows of other lengths and data sets are the same model
def two_steps(model_config: ModelConfig, decoder: DecoderConfig) -> list[float]:
    torch.manual_seed(0)
    model = build_model(model_config, decoder)
    rng = np.random.default_rng(0)
    size = model_config.frames, model_config.image_size, model_config.image_size
    clips = torch.from_numpy(rng.integers(0, 256, (1, 3, *size), dtype=np.uint8))
    context, target = (torch.from_numpy(ids)[None] for ids in model.sequences.draw_sequence(rng))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(3):
        loss = model(clips, context, target).loss_b.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    return losses
