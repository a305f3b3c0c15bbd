"""The run's length and its learning rate as pure functions of the position in the sample sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arvideo_dist.config.commands import TrainingConfig
from arvideo_dist.tasks.derived import Derived


def learning_rate(
    step: float, *, total_steps: float, warmup_steps: float, peak: float, final: float
) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up from 0, then cosine to `final` (VideoMAE)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Plan:
    """How far a run goes. Places are counted, not steps: the global batch may change on the way."""

    total_places: int
    global_batch: int
    warmup_steps: float  # of this global batch, as if all of the run had it
    peak_lr: float
    min_lr: float

    def rate(self, position: int) -> float:
        """Learning rate of the step that begins at `position`.

        The unit is a step of the present global batch. So a run whose batch never changes counts in whole numbers,
        and its rates are exactly those of `learning_rate` by the step.
        """
        return learning_rate(
            position / self.global_batch,
            total_steps=self.total_places / self.global_batch,
            warmup_steps=self.warmup_steps,
            peak=self.peak_lr,
            final=self.min_lr,
        )

    def next_position(self, position: int) -> int:
        """The position after the step that begins at `position`; the run's last step may be a part of a batch."""
        return min(position + self.global_batch, self.total_places)

    def steps_left(self, position: int) -> int:
        """Optimiser steps from `position` to the end."""
        return max(0, -(-(self.total_places - position) // self.global_batch))


def plan_of(config: TrainingConfig, derived: Derived, state: Mapping[str, Any] | None) -> Plan:
    """The plan of a run that goes on from a checkpoint's `state`, or begins (None).

    The configuration says the length (train.steps, or train.epochs of so many samples) unless only the global batch
    has changed: then the run keeps as many places as it was planned for. ValueError if the warm-up takes all of it.
    """
    total_places = derived.total_places
    assert total_places is not None
    assert derived.warmup_steps is not None
    if state is not None and _length(state["config"]["train"], state["derived"]["samples"]) == _length(
        config.train.model_dump(mode="json"), derived.samples
    ):
        planned = state["derived"]["total_steps"] * state["derived"]["global_batch"]
        total_places = state.get("total_places", planned)  # a checkpoint of an older release has none
    if derived.warmup_steps >= total_places / derived.global_batch:
        raise ValueError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} is {derived.warmup_steps:.0f} steps, the whole "
            f"run is {total_places / derived.global_batch:.0f}: lower optim.warmup_epochs"
        )
    return Plan(total_places, derived.global_batch, derived.warmup_steps, derived.peak_lr, derived.min_lr)


def _length(train: Mapping[str, Any], samples: int | None) -> tuple[Any, ...]:
    if train["steps"] is not None:
        return "steps", train["steps"]
    return "epochs", train["epochs"], samples
