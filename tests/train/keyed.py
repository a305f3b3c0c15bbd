"""A small real training for tests, without data set or Ray: its batches are a pure function of the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.optim import TrainConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.data.order import places_of_rank
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.kinds import make_sequences
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.checkpoint.saver import Saver
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.schedule import learning_rate
from tests.train.engines import engine_of

Module = TypeVar("Module", bound=nn.Module)

MODEL = ModelConfig(
    encoder="demo", frames=4, image_size=16, tubelet=(2, 8, 8), cluster=(1, 1, 2), mask_ratio=0.5
)
DECODER = DecoderConfig(width=64, depth=1)
SEQUENCES = make_sequences(MODEL, DECODER)
GLOBAL_BATCH = 4
MICRO_BATCH = 1
BAD_PLACE = 5


def new_model() -> ARVideo:
    """The same weights each time; smaller than any configuration's, so that many runs take seconds."""
    torch.manual_seed(7)
    with mock.patch.dict(ENCODER_SIZES, {MODEL.encoder: EncoderSize(width=64, depth=1, heads=1)}):
        return ARVideo(MODEL, DECODER)


def new_engine(model: ARVideo, stage: int, precision: str = "fp32") -> Engine:
    train = TrainConfig(
        global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage, precision=precision
    )
    accumulation = -(-GLOBAL_BATCH // (MICRO_BATCH * dist.get_world_size()))
    return engine_of(model, train, accumulation_steps=accumulation)


def resumed_engine(run: Storage, stage: int, precision: str = "fp32") -> tuple[Engine, int]:
    """An engine from the newest complete checkpoint of `run`, and the step that it stands at."""
    engine, position = resumed(run, new_model(), lambda model: new_engine(model, stage, precision))
    return engine, position // GLOBAL_BATCH


def resumed(run: Storage, model: Module, engine_of: Callable[[Module], Engine]) -> tuple[Engine, int]:
    """The engine of `model` from the newest complete checkpoint of `run`, and its position."""
    checkpoint = Checkpoint(run, complete_checkpoints(run)[-1])
    checkpoint.verify()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing of the start weights may survive
            parameter.fill_(float("nan"))
    checkpoint.load_weights(model, dist.group.WORLD)
    engine = engine_of(model)
    checkpoint.load_optimizer(engine)
    return engine, checkpoint.state["position"]


def state_at(step: int) -> dict[str, Any]:
    return {"position": step * GLOBAL_BATCH}


def micro_batch(places: list[int]) -> Batch:
    clips, contexts, targets, weights = [], [], [], []
    for place in places:
        rng = np.random.default_rng(max(place, 0))
        clips.append(rng.integers(0, 256, (3, 4, 16, 16), dtype=np.uint8))
        context, target = SEQUENCES.draw_sequence(rng)
        contexts.append(context)
        targets.append(target)
        weights.append(0.0 if place in (-1, BAD_PLACE) else 1.0)
    return Batch(
        clips=torch.from_numpy(np.stack(clips)),
        inputs={
            "context_ids": torch.from_numpy(np.stack(contexts)),
            "target_ids": torch.from_numpy(np.stack(targets)),
        },
        weights=torch.tensor(weights),
        places=torch.tensor(places),
        bad=[],
    )


def weight_of(step: int) -> float:
    return float(GLOBAL_BATCH - (step * GLOBAL_BATCH <= BAD_PLACE < (step + 1) * GLOBAL_BATCH))


def batches_of_rank(step: int) -> tuple[list[Batch], float]:
    """This rank's micro batches of a step, and the weight of all ranks' together."""
    places = places_of_rank(
        step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, dist.get_rank(), dist.get_world_size()
    )
    return [micro_batch(list(each)) for each in places], weight_of(step)


def rate(step: int, total_steps: int) -> float:
    return learning_rate(step, total_steps=total_steps, warmup_steps=4, peak=1e-3, final=1e-5)


def train_steps(
    engine: Engine,
    first: int,
    last: int,
    total_steps: int,
    saver: Saver | None = None,
    save_after: Callable[[int], bool] = lambda step: False,
    done: Callable[[int], None] = lambda step: None,
    batches_of: Callable[[int], tuple[list[Batch], float]] = batches_of_rank,
    state_of: Callable[[int], dict[str, Any]] = state_at,
) -> list[float]:
    """Losses of steps [first, last); the saver is asked after the steps that `save_after` names."""
    losses = []
    for step in range(first, last):
        batches, weight = batches_of(step)
        loss = engine.accumulate(batches, weight)
        if saver is not None:
            saver.before_update()
        engine.apply(rate(step, total_steps))
        dist.all_reduce(loss)
        losses.append(float(loss) / weight)
        if saver is not None and save_after(step + 1):
            saver.request(step + 1, state_of(step + 1))
        done(step + 1)
    return losses
