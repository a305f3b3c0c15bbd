"""What all ranks must know alike before a step's backward pass, joined by one small host collective a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch


@dataclass(frozen=True)
class StepFacts:
    """The same on every rank."""

    total_weight: float  # of the global batch, at least 1
    bad_samples: int  # in the global batch
    save_due: bool  # some rank asked for a checkpoint after this step
    look: bool  # some rank asked that all ask whether the run shall be interrupted (`Watch`)


def agree(batches: Sequence[Batch], control: dist.ProcessGroup, *, save_due: bool, look: bool) -> StepFacts:
    """Collective. `batches`: this rank's; `save_due`, `look`: what this rank asks for."""
    weight = float(sum(batch.weights.sum() for batch in batches))
    bad = sum(len(batch.bad) for batch in batches)
    sums = torch.tensor([weight, bad, save_due, look], dtype=torch.float64)
    dist.all_reduce(sums, group=control)
    total_weight, total_bad, saves, looks = sums.tolist()
    # A global batch without a usable sample gives zero gradients, not a division by zero.
    return StepFacts(max(total_weight, 1.0), int(total_bad), saves > 0, looks > 0)
