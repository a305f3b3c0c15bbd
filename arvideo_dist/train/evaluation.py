"""Measures a held-out split with the weights as they are: nothing is updated, every rank learns the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from arvideo_dist.config.commands import TrainingConfig
from arvideo_dist.config.sources import validation_options
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import BadRecord, Batch, ClipLoader, ClipSource, Draw
from arvideo_dist.tasks.picture import png
from arvideo_dist.tasks.task import Task
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.samples.bad_samples import BadSamples
from arvideo_dist.train.tracking.deferred import DeferredWrites

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs


@dataclass
class Validation:
    """What the held-out split said."""

    metrics: dict[str, float]  # the same on all ranks; one that nothing was read for is absent
    picture: NDArray[np.uint8] | None  # on rank 0, if the task makes one and that rank read a clip
    bad: list[BadRecord]  # of this rank


def validate(
    engine: Engine, task: Task[Any], steps: Iterable[list[Batch]], control: dist.ProcessGroup
) -> Validation:
    """Collective. The task's metrics over all clips of `steps` on all ranks, and `bad_validation_samples`: clips
    that could not be used, which have no part in the others."""
    engine.set_training(False)
    sums: dict[str, torch.Tensor] = {}
    picture, bad = None, list[BadRecord]()
    activity.together("validates, batch 0")
    with torch.no_grad():
        hosts = (host_batch for step in steps for host_batch in step)
        for number, host_batch in enumerate(hosts, start=1):
            bad += host_batch.bad
            wants_picture = picture is None and dist.get_rank() == 0
            measured = task.measure(engine.forward, host_batch.to(engine.device), picture=wants_picture)
            sums = {name: sums[name] + value if sums else value for name, value in measured.sums.items()}
            picture = measured.picture if picture is None else picture
            activity.together(f"validates, batch {number}")  # ZeRO-3 gathers weights for each
    engine.set_training(True)
    activity.together("joins the validation of all ranks")
    assert sums, "the validation loader gives every rank at least one batch"
    sums["bad_validation_samples"] = torch.tensor(float(len(bad)), dtype=torch.float64)
    totals = _add_over_ranks(sums, control)
    metrics = {"bad_validation_samples": float(totals.pop("bad_validation_samples")), **task.metrics(totals)}
    # A model that has diverged: MLflow would make 1.8e308 of Inf.
    return Validation({n: value for n, value in metrics.items() if math.isfinite(value)}, picture, bad)


class Validator:
    """Measures the held-out split of a task while it trains, logs and says what it found."""

    def __init__(
        self,
        task: Task[Any],
        engine: Engine,
        control: dist.ProcessGroup,
        bad: BadSamples,
        notes: DeferredWrites,
        tracker: QueuedTracker | None,
        say: Callable[[str], None],
    ) -> None:
        """`tracker`: on rank 0, else None."""
        self._task, self._engine, self._control = task, engine, control
        self._bad, self._notes, self._tracker, self._say = bad, notes, tracker, say

    def __call__(self, step: int) -> dict[str, float]:
        """Collective. The metrics with the weights after `step`, the same on all ranks; none if there is no such
        split. Raises RunStoppedError on all ranks if too many of its samples are bad."""
        source = self._task.validation_source()
        if source is None:
            return {}
        clips = min(
            load_manifest(source.storage, source.split).samples, self._task.config.validation.max_clips
        )
        loader = held_out_loader(
            self._task.config, self._engine.device, source, clips, self._task.draw_of_validation()
        )
        result = validate(self._engine, self._task, loader, self._control)
        activity.alone("writes the validation")
        if self._tracker is not None:
            self._tracker.log(step, result.metrics)
            if result.picture is not None:
                name, picture = f"pictures/step-{step:08d}.png", png(result.picture)
                self._tracker.log_bytes(name, picture)
                self._notes.put(name, picture)
        self._say(f"step {step}  {validation_line(self._task, result.metrics)}")
        activity.together("joins the bad samples of the validation")
        self._bad.validated(result.bad, clips)
        return result.metrics


def held_out_loader(
    config: TrainingConfig, device: torch.device, source: ClipSource, clips: int, draw: Draw
) -> ClipLoader:
    """The first `clips` videos of a split, one clip of each, in batches cut alike whatever the number of ranks."""
    return ClipLoader(
        [source],
        clip_frames=config.model.frames,
        image_size=config.model.image_size,
        draw=draw,
        seed=config.run.seed,
        position=0,
        global_batch=config.train.micro_batch * dist.get_world_size(),
        micro_batch=config.train.micro_batch,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        workers=min(config.data.workers, 2),
        stop_position=clips,
        shuffle=False,
        options=validation_options(config.data, pin_memory=device.type == "cuda"),
    )


def _add_over_ranks(sums: dict[str, torch.Tensor], control: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    joined = torch.cat([value.flatten() for value in sums.values()])
    dist.all_reduce(joined, group=control)
    pieces = joined.split([value.numel() for value in sums.values()])
    return {name: piece.view_as(sums[name]) for name, piece in zip(sums, pieces, strict=True)}


def validation_line(task: Task[Any], metrics: dict[str, float]) -> str:
    """For the terminal."""
    parts = [task.validation_line(metrics)]
    if "loss/val" not in metrics:
        parts.insert(0, "no loss/val: no clip of the validation could be used, or the loss is not finite")
    if bad := metrics["bad_validation_samples"]:
        parts.append(f"bad validation samples {bad:.0f}")
    return "  ".join(filter(None, parts))
