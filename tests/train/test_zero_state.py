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


Layout = tuple[int, int]  # world size, ZeRO stage
STEPS, STOP = 6, 3
SAME = [(2, 0), (2, 1), (2, 2), (2, 3)]
OTHER = [
    ((2, 1), (1, 3)),
    ((2, 3), (1, 0)),
    ((2, 2), (3, 1)),
    ((2, 3), (3, 3)),
    ((3, 1), (2, 2)),
    ((1, 0), (2, 3)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[Layout, Layout | None], dict[str, object]]:
    """(layout, layout it resumed from or None) to what a run gave. One set of processes a world size and
    round: starting one costs seconds."""
    found = {}
    whole = [(layout, None) for layout in [*SAME, (1, 0), (3, 1)]]
    resumed = [*((layout, layout) for layout in SAME), *((after, before) for before, after in OTHER)]
    for runs in (whole, resumed):
        for world_size in (1, 2, 3):
            chosen = [run for run in runs if run[0][0] == world_size]
            found.update(run_ranks(world_size, _train_all, str(folder), chosen)[0])
    return found


def test_losses_equal_one_process_with_the_whole_batch_at_every_stage(results: dict) -> None:
    """Also with accumulation (4 places, micro batch 1), uneven places (3 ranks) and a place of weight 0."""
    reference = _train_plain()
    for layout in [*SAME, (1, 0), (3, 1)]:
        assert results[layout, None]["losses"] == pytest.approx(reference, rel=2e-6), layout


@pytest.mark.parametrize("layout", SAME)
def test_resumed_losses_are_bit_equal_in_the_same_layout(results: dict, layout: Layout) -> None:
    assert results[layout, layout]["losses"] == results[layout, None]["losses"][STOP:]
    assert results[layout, layout]["optimizer_steps"] == STEPS


@pytest.mark.parametrize(("before", "after"), OTHER)
def test_resumed_losses_agree_in_another_layout(results: dict, before: Layout, after: Layout) -> None:
    expected = results[before, None]["losses"][STOP:]
    assert results[after, before]["losses"] == pytest.approx(expected, rel=1e-5)
    assert results[after, before]["optimizer_steps"] == STEPS


@pytest.mark.parametrize("layout", SAME[1:])
def test_fragments_stand_where_deepspeed_says(results: dict, layout: Layout) -> None:
    assert results[layout, None]["differences"] == {}


def _train_all(folder: str, runs: list[tuple[Layout, Layout | None]]) -> dict:
    return {(layout, origin): _train(folder, layout, origin) for layout, origin in runs}


def _engine(model: ARVideo, stage: int) -> Engine:
    train = TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage)
    accumulation = -(-GLOBAL_BATCH // (MICRO_BATCH * dist.get_world_size()))
    return Engine(model, train, OptimConfig(), torch.device("cpu"), accumulation)


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


def _train_plain() -> list[float]:
    torch.manual_seed(7)
    model = ARVideo(MODEL, DECODER)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
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


def _train(folder: str, layout: Layout, origin: Layout | None) -> dict[str, object]:
    """Steps 0 to STEPS with a checkpoint at STOP, or steps STOP to STEPS from the checkpoint of `origin`."""
    (world_size, stage), rank = layout, dist.get_rank()
    control = dist.group.WORLD
    assert control is not None
    torch.manual_seed(7)
    model = ARVideo(MODEL, DECODER)
    if origin is None:
        engine, first = _engine(model, stage), 0
    else:
        run = Storage(f"{folder}/{origin}")
        checkpoint = Checkpoint(run, complete_checkpoints(run)[-1])
        checkpoint.verify()
        with torch.no_grad():
            for parameter in model.parameters():  # nothing of the start weights may survive
                parameter.fill_(float("nan"))
        checkpoint.load_weights(model)
        engine, first = _engine(model, stage), checkpoint.state["position"] // GLOBAL_BATCH
        checkpoint.load_optimizer(engine)
    losses = []
    for step in range(first, STEPS):
        places = places_of_rank(step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, rank, world_size)
        total = _weight_of(step)
        loss = engine.accumulate([_micro_batch(list(p), model.clusters) for p in places], total)
        engine.apply(_rate(step))
        dist.all_reduce(loss)
        losses.append(float(loss) / total)
        if origin is None and step + 1 == STOP:
            state = {"position": STOP * GLOBAL_BATCH}
            save_checkpoint(Storage(f"{folder}/{layout}"), engine, STOP, state, 2, control)
    differences = _differences_from_deepspeed(engine) if stage else {}
    return {
        "losses": losses,
        "optimizer_steps": zero_state.optimizer_steps(engine),
        "differences": differences,
    }


def _differences_from_deepspeed(engine: Engine) -> dict[str, str]:
    """Names whose fragment is not what DeepSpeed's own getters return there."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.zero_optimizer
    if engine.stage < 3:  # the links that DeepSpeed's getters follow are built for the first group only
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    ours = {f.name: (f, zero_state.state_of(engine, f)) for f in zero_state.held_fragments(engine)}
    assert ours, "every rank holds something"
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
                if not torch.equal(views[kind], values.view(-1)[fragment.start : fragment.stop]):
                    differences[f"{kind}/{name}"] = "differs"
    return differences
