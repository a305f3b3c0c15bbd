"""Checkpoints by parameter name: exact under the same layout, and across ZeRO stages and world sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config import DecoderConfig, ModelConfig, OptimConfig, TrainConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.data.order import places_of_rank
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.storage import Storage
from arvideo_dist.train import zero_state
from arvideo_dist.train.checkpoint import Checkpoint, complete_checkpoints, save_checkpoint
from arvideo_dist.train.engine import Engine
from tests.train.distributed import run_ranks

MODEL = ModelConfig(
    encoder="demo", frames=4, image_size=16, tubelet=(2, 8, 8), cluster=(1, 1, 2), mask_ratio=0.5
)
DECODER = DecoderConfig(width=64, depth=1)
GLOBAL_BATCH = 4
MICRO_BATCH = 1


def test_losses_equal_one_process_with_the_whole_batch_at_every_stage() -> None:
    """Also with accumulation (4 places, micro batch 1) and with a place of weight 0."""
    reference = _train_plain(6)
    for world_size, stage in ((2, 0), (2, 1), (2, 2), (2, 3), (3, 1)):
        losses = run_ranks(world_size, _train, None, stage, 0, 6)[0]["losses"]
        assert losses == pytest.approx(reference, rel=2e-6), f"stage {stage}, world size {world_size}"


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 0), (2, 0)), ((2, 2), (2, 2)), ((2, 3), (2, 3)), ((2, 1), (1, 3)), ((3, 3), (2, 1)), ((1, 0), (2, 3))],
)
def test_resumed_losses_equal_the_uninterrupted_ones(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """`before`, `after`: (world size, ZeRO stage) of the first three and the last three steps."""
    uninterrupted = run_ranks(*_call(before, tmp_path / "whole", 0, 6))[0]["losses"]
    first = run_ranks(*_call(before, tmp_path / "run", 0, 3))[0]
    second = run_ranks(*_call(after, tmp_path / "run", 3, 6))[0]
    resumed = first["losses"] + second["losses"]
    if before == after:
        assert resumed == uninterrupted
    else:
        assert resumed == pytest.approx(uninterrupted, rel=1e-5)
    assert second["optimizer_steps"] == 6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fragments_stand_where_deepspeed_says(stage: int) -> None:
    for differences in run_ranks(2, _compare_with_deepspeed, stage):
        assert differences == {}


def _call(layout: tuple[int, int], folder: Path, first: int, last: int) -> tuple[object, ...]:
    world_size, stage = layout
    return world_size, _train, str(folder), stage, first, last


def _engine(stage: int, world_size: int) -> Engine:
    torch.manual_seed(7)
    train = TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage)
    accumulation = -(-GLOBAL_BATCH // (MICRO_BATCH * world_size))
    return Engine(ARVideo(MODEL, DECODER), train, OptimConfig(), torch.device("cpu"), accumulation)


def _micro_batch(places: list[int], clusters: object) -> Batch:
    clips, contexts, targets, weights = [], [], [], []
    for place in places:
        rng = np.random.default_rng(max(place, 0))
        clips.append(rng.integers(0, 256, (3, 4, 16, 16), dtype=np.uint8))
        context, target = clusters.draw_sequence(rng)  # type: ignore[attr-defined]
        contexts.append(context)
        targets.append(target)
        weights.append(0.0 if place in (-1, 5) else 1.0)  # 5: a bad sample
    return Batch(
        clips=torch.from_numpy(np.stack(clips)),
        context_ids=torch.from_numpy(np.stack(contexts)),
        target_ids=torch.from_numpy(np.stack(targets)),
        weights=torch.tensor(weights),
        places=torch.tensor(places),
        bad=[],
    )


def _rate(step: int) -> float:
    return 1e-3 * (step + 1) / 6


def _weight_of(step: int) -> float:
    return float(GLOBAL_BATCH - (step * GLOBAL_BATCH <= 5 < (step + 1) * GLOBAL_BATCH))


def _train_plain(steps: int) -> list[float]:
    torch.manual_seed(7)
    model = ARVideo(MODEL, DECODER)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        batch = _micro_batch(list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)), model.clusters)
        loss = (model(batch.clips, batch.context_ids, batch.target_ids).loss_b * batch.weights).sum()
        loss = loss / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train(folder: str | None, stage: int, first: int, last: int) -> dict[str, object]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    control = dist.group.WORLD
    assert control is not None
    engine = _engine(stage, world_size)
    if first:
        run = Storage(str(folder))
        model = ARVideo(MODEL, DECODER)
        checkpoint = Checkpoint(run, complete_checkpoints(run)[-1])
        checkpoint.verify()
        checkpoint.load_weights(model)
        train = TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage)
        accumulation = -(-GLOBAL_BATCH // (MICRO_BATCH * world_size))
        engine = Engine(model, train, OptimConfig(), torch.device("cpu"), accumulation)
        checkpoint.load_optimizer(engine)
    clusters = engine.module.clusters
    losses = []
    for step in range(first, last):
        places = places_of_rank(step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, rank, world_size)
        total = _weight_of(step)
        loss = engine.accumulate([_micro_batch(list(p), clusters) for p in places], total)
        engine.apply(_rate(step))
        dist.all_reduce(loss)
        losses.append(float(loss) / total)
    if folder is not None:
        save_checkpoint(Storage(folder), engine, last, {"position": last * GLOBAL_BATCH}, 2, control)
    return {"losses": losses, "optimizer_steps": zero_state.optimizer_steps(engine)}


def _compare_with_deepspeed(stage: int) -> dict[str, str]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine = _engine(stage, world_size)
    for step in range(2):
        places = places_of_rank(step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, rank, world_size)
        clusters = engine.module.clusters
        engine.accumulate([_micro_batch(list(p), clusters) for p in places], _weight_of(step))
        engine.apply(_rate(step))
    zero = engine.zero_optimizer
    if stage < 3:  # the links that DeepSpeed's getters follow are built for the first group only
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    ours = {f.name: (f, zero_state.state_of(engine, f)) for f in zero_state.held_fragments(engine)}
    differences = {}
    for name, parameter in engine.module.named_parameters():  # collective: every rank asks for every name
        full = {
            "weight": safe_get_full_fp32_param(parameter),
            "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        }
        if name in ours:
            fragment, views = ours[name]
            for kind, values in full.items():
                expected = values.view(-1)[fragment.start : fragment.stop]
                if not torch.equal(views[kind], expected):
                    differences[f"{kind}/{name}"] = "differs"
    assert ours, "every rank holds something"
    return differences
