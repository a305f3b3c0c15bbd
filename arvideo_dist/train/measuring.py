"""Measures the encoder's features on labelled videos while it is pretrained (`tasks/features.py`).

Each rank makes the features of its videos, in batches that are cut alike whatever the number of ranks; rank 0 has
them all, in the order of the videos, and does the rest. So the numbers are the same at any world size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import BadRecord, ClipSource
from arvideo_dist.tasks.draws import label_of
from arvideo_dist.tasks.features import Features, measures
from arvideo_dist.tasks.task import Forward, Probed, Task
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.evaluation import held_out_loader
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.samples.bad_samples import BadSamples

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs

PREFIX, UNTRAINED = "features/", "_untrained"


class FeatureMeasures:
    """Measures what the encoder has learned and logs it beside what an untrained one gives."""

    def __init__(
        self,
        probed: Probed,
        task: Task[Any],
        engine: Engine,
        control: dist.ProcessGroup,
        bad: BadSamples,
        tracker: QueuedTracker | None,
        say: Callable[[str], None],
    ) -> None:
        """`tracker`: on rank 0, else None."""
        self._probed, self._task, self._engine, self._control = probed, task, engine, control
        self._bad, self._tracker, self._say = bad, tracker, say
        assert probed.options.every_steps is not None
        self.every_steps = probed.options.every_steps
        self._ended = time.perf_counter()
        self.untrained: dict[str, float] = {}  # an untrained encoder's measures, once they are known

    def __call__(self, step: int) -> dict[str, float]:
        """Collective. The measures with the weights after `step`, the same on all ranks.

        Raises RunStoppedError on all ranks if too many of the videos are bad.
        """
        began = time.perf_counter()
        encoders: dict[str, Forward] = {"": self._engine.forward}
        if not self.untrained:
            encoders[UNTRAINED] = self._new_module()
        self._engine.set_training(False)
        splits = self._probed.train, self._probed.held_out
        train, held_out = (self._features(source, encoders) for source in splits)
        self._engine.set_training(True)
        activity.together("compares features")
        answer = [self._measures(train, held_out, encoders)]
        dist.broadcast_object_list(answer, src=0, group=self._control)
        found = answer[0]
        self.untrained = self.untrained or {n: v for n, v in found.items() if n.endswith(UNTRAINED)}
        found |= self.untrained
        now = time.perf_counter()
        share, self._ended = (now - began) / (now - self._ended), now
        self._say(f"step {step}  {features_line(found)}  ({now - began:.0f} s, {share:.1%} of the time)")
        if self._tracker is not None:
            self._tracker.log(step, found)
        return found

    def _new_module(self) -> nn.Module:
        """The task's module with the weights that a run of this seed would start from without `init_from`."""
        with torch.random.fork_rng():
            torch.manual_seed(self._task.config.run.seed)
            return self._task.build().to(self._engine.device).eval()

    def _features(self, source: ClipSource, encoders: Mapping[str, Forward]) -> dict[str, Features]:
        """Collective. By encoder, of a split's videos in their order; empty but on rank 0."""
        clips = min(load_manifest(source.storage, source.split).samples, self._probed.options.max_clips)
        places, labels, bad = list[Any](), list[Any](), list[BadRecord]()
        values: dict[str, list[Any]] = {name: [] for name in encoders}
        loader = held_out_loader(self._task.config, self._engine.device, source, clips, label_of)
        activity.together(f"measures features of split {source.split}")
        with torch.no_grad(), self._autocast():
            for batch in (host for step in loader for host in step):
                bad += batch.bad
                label = batch.inputs["label"].numpy()
                used = (batch.weights.numpy() > 0) & (label >= 0)  # -1: a video without a label
                places.append(batch.places.numpy()[used])
                labels.append(label[used])
                on_device = batch.to(self._engine.device)
                for name, forward in encoders.items():
                    features = self._probed.features(forward, on_device).float().cpu().numpy()
                    values[name].append(features[used])
                activity.together(f"measures features of split {source.split}")
        mine = (
            np.concatenate(places),
            np.concatenate(labels),
            {n: np.concatenate(v) for n, v in values.items()},
        )
        everyones: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyones, group=self._control, group_dst=0)
        self._bad.validated(bad, clips, "measure.every_steps")
        if everyones is None:
            return {}
        order = np.argsort(np.concatenate([each[0] for each in everyones]))
        all_labels = np.concatenate([each[1] for each in everyones])[order]
        return {
            name: Features(np.concatenate([each[2][name] for each in everyones])[order], all_labels)
            for name in encoders
        }

    def _measures(
        self, train: Mapping[str, Features], held_out: Mapping[str, Features], encoders: Mapping[str, Forward]
    ) -> dict[str, float]:
        if dist.get_rank():
            return {}
        return {
            f"{PREFIX}{measure}{name}": value
            for name in encoders
            for measure, value in measures(
                train[name], held_out[name], self._probed.options.neighbours
            ).items()
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self._engine.device.type
        if self._task.config.precision_on(device) == "bf16":
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()


def features_line(found: Mapping[str, float]) -> str:
    """For the terminal."""
    texts = []
    for name, form in (("knn_top1", ".1%"), ("ridge_top1", ".1%"), ("effective_rank", ".1f")):
        if (value := found.get(f"{PREFIX}{name}")) is not None:
            untrained = found.get(f"{PREFIX}{name}{UNTRAINED}")
            beside = "" if untrained is None else f" (untrained {untrained:{form}})"
            texts.append(f"{name.replace('_', ' ')} {value:{form}}{beside}")
    return "features: " + ("  ".join(texts) or "no video could be used")
