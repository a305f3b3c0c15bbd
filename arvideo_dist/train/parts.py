"""What a training consists of: where it stands, and what the step loop uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from arvideo_dist.config.optim import TrainConfig, ValidationConfig
from arvideo_dist.data.loader import ClipLoader
from arvideo_dist.train.checkpoint.saver import Saver
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.schedule import Plan
from arvideo_dist.train.measuring import FeatureMeasures
from arvideo_dist.train.record import Recorder
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.audit import Audit
from arvideo_dist.train.samples.bad_samples import BadSamples
from arvideo_dist.train.samples.bad_steps import BadSteps

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs


@dataclass
class State:
    """Where the run stands; the same on all ranks."""

    position: int = 0  # places consumed
    step: int = 0  # optimiser steps done
    metrics: dict[str, float] = field(default_factory=dict)  # the newest of each name
    # "step" and "value" of the largest value of the task's `best_metric`.
    best: dict[str, float] | None = None
    # `position` and `step` as of the start of these workers, and of the newest save that was asked for.
    began_at: int = 0
    saved_at: int = 0
    save_owed: bool = False


@dataclass
class Parts:
    """What the loop uses."""

    train: TrainConfig
    validation: ValidationConfig
    plan: Plan
    control: dist.ProcessGroup  # gloo, for host values
    watch: Watch
    loader: ClipLoader
    engine: Engine
    saver: Saver
    bad_samples: BadSamples
    bad_steps: BadSteps
    recorder: Recorder
    audit: Audit | None
    tracker: QueuedTracker | None  # on rank 0
    # The held-out split's metrics after a step, logged; collective.
    measure: Callable[[int], dict[str, float]]
    features: FeatureMeasures | None  # of a pretraining whose features are measured
    constants: dict[str, Any]  # of a checkpoint's state: what does not change while these workers run
    best_metric: str | None  # of the held-out split: the checkpoint of its largest value is kept
    seen: int  # the newest step of which anybody saw a checkpoint when these workers began
