"""The first step of a fine-tuning through the engine against transformers' class on the same clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.loader import Batch, ClipLoader
from arvideo_dist.tasks.classification import Classification
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from tests.model.test_classifier import for_transformers, gradients_of, theirs_and_ours
from tests.train.distributed import run_ranks
from tests.train.runs import make_data

CLASSES, GLOBAL_BATCH, MICRO_BATCH, WORLD_SIZE = 12, 8, 2, 2


class Step(NamedTuple):
    loss: float
    gradients: dict[str, list[tuple[int, np.ndarray]]]  # of this rank: first element and values


def _config(data: str, stage: int) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {
            "data": {"path": data, "stride": 2, "workers": 0, "val_split": None},
            "model": {
                **{"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16]},
                **{"classes": CLASSES, "drop_path": 0},
            },
            "augment": {
                **{"rand_augment_operations": 0, "flip": 0, "erase": 0, "mixup": 0, "cutmix": 0},
                "label_smoothing": 0,
            },
            "train": {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "zero_stage": stage},
            "cluster": {"device": "cpu"},
        }
    )


def _first_step(config: FinetuneConfig, micro_batch: int, rank: int, world_size: int) -> list[Batch]:
    """A rank's micro batches."""
    task = Classification(config)
    loader = ClipLoader(
        task.sources(),
        clip_frames=config.model.frames,
        image_size=config.model.image_size,
        draw=task.draw(),
        seed=0,
        position=0,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=0,
        stop_position=GLOBAL_BATCH,
        unit=task.batch_unit,
        options=loader_options(config.data, pin_memory=False),
    )
    (step,) = loader
    return step


def _steps(data: str, weights: dict[str, torch.Tensor]) -> list[Step]:
    """The first step at each ZeRO stage."""
    return [_step(_config(data, stage), weights) for stage in range(4)]


def _step(config: FinetuneConfig, weights: dict[str, torch.Tensor]) -> Step:
    task = Classification(config)
    module = task.build()
    module.load_state_dict(weights)
    groups = task.parameter_groups(module)
    batches = _first_step(config, MICRO_BATCH, dist.get_rank(), WORLD_SIZE)
    assert len(batches) == 2, "gradients are accumulated"
    engine = Engine(module, task.loss, groups, config.train, config.optim, torch.device("cpu"), len(batches))
    loss = engine.accumulate(batches, GLOBAL_BATCH)
    dist.all_reduce(loss)
    engine.apply(1e-3)
    # AdamW's first moment begins at 0, and weight decay has no part in it.
    share, gradients = 1 - config.optim.betas[0], dict[str, Any]()
    for held in zero_state.held_fragments(engine):
        moment = zero_state.state_of(engine, held)["exp_avg"].double() / share
        gradients.setdefault(held.name, []).append((held.start, moment.numpy()))
    return Step(float(loss) / GLOBAL_BATCH, gradients)


def _joined(name: str, shape: torch.Size, ranks: list[Step]) -> torch.Tensor:
    whole = np.full(shape.numel(), np.nan)
    for rank in ranks:
        for start, values in rank.gradients.get(name, []):
            whole[start : start + len(values)] = values
    return torch.from_numpy(whole).view(shape)


def test_loss_and_gradients_of_two_ranks_equal_transformers_on_the_whole_batch(tmp_path: Path) -> None:
    """fp32, no augmentation but the random crop, two micro batches a rank, at every ZeRO stage; the gradient of
    every parameter relative to its norm."""
    data = str(make_data(tmp_path / "data"))
    theirs, ours = theirs_and_ours(CLASSES)
    (batch,) = _first_step(_config(data, 0), GLOBAL_BATCH, 0, 1)
    assert batch.weights.eq(1).all()
    expected = theirs(for_transformers(batch.clips), labels=batch.inputs["label"])
    expected.loss.backward()
    of_ranks = run_ranks(WORLD_SIZE, _steps, data, ours.state_dict())
    for stage, ranks in enumerate(zip(*of_ranks, strict=True)):
        assert ranks[0].loss == pytest.approx(expected.loss.item(), rel=1e-5)
        assert set().union(*(rank.gradients for rank in ranks)) == gradients_of(theirs).keys()
        for name, gradient in gradients_of(theirs).items():
            found = _joined(name, gradient.shape, ranks)
            assert (found - gradient).norm() < 1e-5 * gradient.norm(), (stage, name)
