"""Checkpoints by parameter name: exact under the same layout, and across ZeRO stages and world sizes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from arvideo_dist.storage import Storage
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from tests.train.distributed import make_saver, run_ranks
from tests.train.keyed import (
    GLOBAL_BATCH,
    micro_batch,
    new_engine,
    new_model,
    rate,
    resumed_engine,
    train_steps,
)


class Layout(NamedTuple):
    world_size: int
    stage: int
    precision: str = "fp32"


STEPS, STOP = 6, 3
SAME = [Layout(2, stage) for stage in range(4)]
BF16 = [Layout(2, 1, "bf16"), Layout(2, 3, "bf16")]
OTHER = [
    (Layout(2, 1), Layout(1, 3)),
    (Layout(2, 3), Layout(1, 0)),
    (Layout(2, 2), Layout(3, 1)),
    (Layout(2, 3), Layout(3, 3)),
    (Layout(3, 1), Layout(2, 2)),
    (Layout(1, 0), Layout(2, 3)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[Layout, Layout | None], dict[str, object]]:
    """(layout, layout it resumed from or None) to what a run gave. One set of processes a world size and
    round: starting one costs seconds."""
    found = {}
    whole = [(layout, None) for layout in [*SAME, *BF16, Layout(1, 0), Layout(3, 1)]]
    resumed = [*((layout, layout) for layout in SAME + BF16), *((after, before) for before, after in OTHER)]
    for runs in (whole, resumed):
        for world_size in (1, 2, 3):
            chosen = [run for run in runs if run[0][0] == world_size]
            found.update(run_ranks(world_size, _train_all, str(folder), chosen)[0])
    return found


def test_losses_equal_one_process_with_the_whole_batch_at_every_stage(results: dict) -> None:
    """Also with accumulation (4 places, micro batch 1), uneven places (3 ranks) and a place of weight 0."""
    reference = _train_plain()
    for layout in [*SAME, Layout(1, 0), Layout(3, 1)]:
        assert results[layout, None]["losses"] == pytest.approx(reference, rel=2e-6), layout


@pytest.mark.parametrize("layout", SAME + BF16)
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


def _train_plain() -> list[float]:
    model = new_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        batch = micro_batch(list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)))
        loss = (
            model(batch.clips, batch.inputs["context_ids"], batch.inputs["target_ids"]).loss_b * batch.weights
        ).sum()
        loss = loss / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train(folder: str, layout: Layout, origin: Layout | None) -> dict[str, object]:
    """Steps 0 to STEPS with a checkpoint at STOP, or steps STOP to STEPS from the checkpoint of `origin`.

    The save goes on while the steps after it do, so that it must hold the state as it was.
    """
    if origin is None:
        engine, first = new_engine(new_model(), *layout[1:]), 0
    else:
        engine, first = resumed_engine(Storage(_run_of(folder, origin)), *layout[1:])
    saver = make_saver(Storage(_run_of(folder, layout)), engine) if origin is None else None
    losses = train_steps(engine, first, STEPS, STEPS, saver, save_after=lambda step: step == STOP)
    if saver is not None:
        saver.finish()
    differences = _differences_from_deepspeed(engine) if engine.stage else {}
    return {
        "losses": losses,
        "optimizer_steps": zero_state.optimizer_steps(engine),
        "differences": differences,
    }


def _run_of(folder: str, layout: Layout) -> str:
    return f"{folder}/{'-'.join(map(str, layout))}"


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
