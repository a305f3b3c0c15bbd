"""A small real fine-tuning for tests, without Ray: the whole recipe, on real clips."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.loader import Batch, ClipSamples
from arvideo_dist.data.order import accumulation_steps, places_of_rank
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.classification import Classification
from arvideo_dist.train.engine.engine import Engine
from tests.train.keyed import resumed

GLOBAL_BATCH, MICRO_BATCH = 8, 4
SIZE = EncoderSize(width=64, depth=2, heads=2)


class Finetuning:
    """On the training split at `data`."""

    def __init__(self, data: str) -> None:
        self._config = FinetuneConfig.model_validate(
            {
                "data": {"path": data, "stride": 2, "workers": 0, "repeats": 2, "val_split": None},
                "model": {
                    **{"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16]},
                    **{"classes": 12, "drop_path": 0.3, "head_dropout": 0.2, "head_init_scale": 1.0},
                },
                "augment": {"erase": 0.5},
                "train": {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH},
                "cluster": {"device": "cpu"},
            }
        )
        self._task = Classification(self._config)
        with _size():
            self._samples = ClipSamples(
                self._task.sources(),
                clip_frames=self._config.model.frames,
                image_size=self._config.model.image_size,
                draw=self._task.draw(),
                seed=0,
                shuffle=True,
                options=loader_options(self._config.data, pin_memory=False),
            )
        self._micro_batch = functools.cache(lambda places: self._samples[list(places)])

    def new_model(self) -> Classifier:
        """The same weights each time."""
        torch.manual_seed(7)
        with _size():
            return self._task.build()

    def new_engine(self, model: Classifier, stage: int) -> Engine:
        train = self._config.train.model_copy(update={"zero_stage": stage})
        accumulation = accumulation_steps(GLOBAL_BATCH, MICRO_BATCH, dist.get_world_size())
        with _size():
            groups = self._task.parameter_groups(model)
        return Engine(
            model, self._task.loss, groups, train, self._config.optim, torch.device("cpu"), accumulation
        )

    def resumed_engine(self, run: Storage, stage: int) -> tuple[Engine, int]:
        """An engine from the newest complete checkpoint of `run`, and the step that it stands at."""
        engine, position = resumed(run, self.new_model(), lambda model: self.new_engine(model, stage))
        return engine, position // GLOBAL_BATCH

    def batches_of_rank(self, step: int) -> tuple[list[Batch], float]:
        """This rank's micro batches of a step, and the weight of all ranks' together. Collective."""
        places = places_of_rank(
            *(step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, dist.get_rank(), dist.get_world_size()),
            self._task.batch_unit,
        )
        batches = [self._micro_batch(tuple(each)) for each in places]
        weight = torch.stack([batch.weights.sum() for batch in batches]).sum()
        dist.all_reduce(weight)
        return batches, float(weight)

    def state_at(self, step: int) -> dict[str, Any]:
        return {"position": step * GLOBAL_BATCH}


def _size() -> AbstractContextManager[Any]:
    """Smaller than any configuration's, so that many runs take seconds."""
    return mock.patch.dict(ENCODER_SIZES, {"demo": SIZE})
