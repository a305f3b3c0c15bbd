"""Losses and gradients that are not finite, for tests of what a run does about them; no option of the product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from arvideo_dist.train.engine.engine import Engine


@contextmanager
def poisoned(places: Mapping[int, str]) -> Iterator[None]:
    """Training meets, at each of `places`, `nan` or `inf` as loss, or a `gradient` that is Inf after a finite loss.

    On whichever rank has the place. An `inf` has a finite gradient of its own, as an overflowed square can have.
    """
    original = Engine.accumulate

    def poison(loss_b: torch.Tensor, batch: Any) -> torch.Tensor:
        for slot, place in enumerate(batch.places.tolist()):
            here = torch.arange(len(loss_b), device=loss_b.device) == slot
            kind = places.get(place)
            if kind == "nan":
                loss_b = torch.where(here, loss_b * torch.nan, loss_b)
            elif kind == "inf":
                loss_b = loss_b + torch.where(here, torch.inf, 0.0)
            elif kind == "gradient":
                loss_b.register_hook(lambda gradient, here=here: torch.where(here, torch.inf, gradient))
        return loss_b

    def accumulate(self: Engine, batches: Sequence[Any], total_weight: float) -> torch.Tensor:
        loss = self._loss
        with mock.patch.object(self, "_loss", lambda forward, batch: poison(loss(forward, batch), batch)):
            return original(self, batches, total_weight)

    with mock.patch.object(Engine, "accumulate", accumulate):
        yield
