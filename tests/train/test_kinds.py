"""Every kind trains under ZeRO 3: partitioned parameters, in the layers and out of them, are whole when used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.optim import TrainConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.tasks.task import decay_matrices
from tests.train.distributed import run_ranks
from tests.train.engines import engine_of

CLIP = {"encoder": "demo", "frames": 4, "image_size": 16, "tubelet": (2, 8, 8)}
KINDS = {
    "randsac": (ModelConfig(kind="randsac", cluster=(1, 1, 1), **CLIP), {"self_attention": True}),
    "videomae": (ModelConfig(kind="videomae", mask_ratio=0.5, **CLIP), {}),
    "igpt": (
        ModelConfig(
            encoder="demo",
            frames=2,
            image_size=4,
            tubelet=(1, 1, 1),
            cluster=(1, 1, 1),
            order="spatial_first",
            target_norm="none",
        ),
        {},
    ),
}
STEPS, RATE = 3, 1e-4


def test_losses_of_every_kind_equal_one_process_with_the_whole_batch() -> None:
    ranks = run_ranks(2, _losses_under_zero)
    for kind in KINDS:
        expected = _losses_of_one_process(kind)
        assert expected[-1] < expected[0]
        assert ranks[0][kind] == pytest.approx(expected, rel=1e-5), kind


def _model(kind: str) -> PretrainingModel:
    torch.manual_seed(7)
    config, decoder = KINDS[kind]
    return build_model(config, DecoderConfig(width=64, depth=2, **decoder))


def _batch(kind: str, model: PretrainingModel, places: list[int]) -> Batch:
    config, samples = KINDS[kind][0], []
    for place in places:
        rng = np.random.default_rng(place)
        clip = rng.integers(0, 256, (3, config.frames, config.image_size, config.image_size), dtype=np.uint8)
        samples.append((clip, *model.sequences.draw_sequence(rng)))
    clips, contexts, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
    inputs = {"context_ids": contexts, "target_ids": targets}
    return Batch(clips, inputs, torch.ones(len(places)), torch.tensor(places), [])


def _losses_of_one_process(kind: str) -> list[float]:
    model, losses = _model(kind), []
    optimizer = torch.optim.AdamW(
        [
            {"params": group.parameters, "weight_decay": group.weight_decay}
            for group in decay_matrices(model, 0.05)
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for _ in range(STEPS):
        batch = _batch(kind, model, [0, 1])
        loss = model(batch.clips, batch.inputs["context_ids"], batch.inputs["target_ids"]).loss_b.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _losses_under_zero() -> dict[str, list[float]]:
    found = {}
    for kind in KINDS:
        train = TrainConfig(global_batch=2, micro_batch=1, zero_stage=3)
        model, losses = _model(kind), []
        engine = engine_of(model, train)
        for _ in range(STEPS):
            loss = engine.accumulate([_batch(kind, model, [dist.get_rank()])], 2.0)
            engine.apply(RATE)
            dist.all_reduce(loss)
            losses.append(float(loss) / 2)
        found[kind] = losses
    return found
