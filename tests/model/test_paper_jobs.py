"""Every file of jobs/paper/: valid, with the paper's token counts, and trainable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arvideo_dist.config import RunConfig
from arvideo_dist.derived import derive
from arvideo_dist.model.kinds import build_model
from arvideo_dist.settings import read_config

PAPER = Path(__file__).resolve().parents[2] / "jobs" / "paper"
# encoder tokens and decoder queries, from section 3.3.1, Table 6 and VideoMAE's 90 % tubes
TOKENS = {"videomae-k400.yaml": (160, 1408), "tokengpt-k400.yaml": (1567, 1567)}


@pytest.fixture(autouse=True)
def _no_outer_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARVIDEO_CONFIG", raising=False)


def read(name: str) -> RunConfig:
    return read_config(["--config", str(PAPER / name)])[0]


def test_the_table_names_every_file() -> None:
    assert {file.name for file in PAPER.glob("*.yaml")} == set(TOKENS)


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_tokens_and_learning_rate_are_the_papers(name: str) -> None:
    derived = derive(read(name), None)
    assert (derived.encoder_tokens, derived.decoder_queries) == TOKENS[name]
    assert (derived.peak_lr, derived.global_batch) == (pytest.approx(1.2e-3), 2048)


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_two_optimisation_steps_at_reduced_size(name: str) -> None:
    """The kind, clusters, order and masking of the file at a narrow encoder and a small clip: every parameter
    gets a gradient and the loss on the same draw falls."""
    given = read(name)
    reduced = {"encoder": "demo", "frames": 4, "image_size": 64}
    torch.manual_seed(0)
    model = build_model(
        given.model.model_validate({**given.model.model_dump(), **reduced}),
        given.decoder.model_validate({**given.decoder.model_dump(), "width": 64}),
    )
    rng = np.random.default_rng(0)
    clips = torch.from_numpy(rng.integers(0, 256, (2, 3, 4, 64, 64), dtype=np.uint8))
    drawn = [model.sequences.draw_sequence(rng) for _ in range(2)]
    context, target = (torch.from_numpy(np.stack(ids)) for ids in zip(*drawn, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(clips, context, target).loss_b.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[2] < losses[0]
