"""What all ranks must know alike: their data before they begin, and some facts before each step's backward pass."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch
from arvideo_dist.train.health.monitor import name_ranks
from arvideo_dist.train.run.stop import RunStoppedError

Result = TypeVar("Result")

_NAMED_HOSTS = 8


def agree_on_data(digests: Sequence[str], precision: str, control: dist.ProcessGroup) -> None:
    """Collective. RunStoppedError on all ranks if they would not train on the same.

    `digests`: of the data sets as this rank reads them (`changes.data_digests`): nodes may have copies of their
    own, one of them older or half written. `precision`: that this rank computes in.
    """
    mine = f"{precision}, index sha256 {', '.join(digest[:16] for digest in digests)}", socket.gethostname()
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine, group=control)
    sides: dict[str, list[int]] = {}
    for rank, (what, _) in enumerate(everyones):
        sides.setdefault(what, []).append(rank)
    if len(sides) == 1:
        return
    lines = []
    for what, ranks in sides.items():
        hosts = sorted({everyones[rank][1] for rank in ranks})
        more = f" and {len(hosts) - _NAMED_HOSTS} more" if len(hosts) > _NAMED_HOSTS else ""
        lines.append(f"{name_ranks(ranks)} on {', '.join(hosts[:_NAMED_HOSTS])}{more}: {what}")
    raise RunStoppedError(
        "\n  ".join(["the ranks do not read the same data or compute in another precision:", *lines])
        + "\nMake the copies of the data set on these hosts the same, or put it on storage that all share; then "
        "give the same command"
    )


def agree_to_stop(
    action: Callable[[], Result], control: dist.ProcessGroup, *refusals: type[Exception]
) -> Result:
    """Collective. This rank's result of `action`; RunStoppedError on all ranks if any raises one of `refusals`.

    For what each rank reads by itself, such as weights in a folder that one node does not have: a restart would
    meet the same, and a rank that stops alone would leave the others waiting.
    """
    refused: str | None = None
    try:
        result = action()
    except refusals as error:
        refused = str(error)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, refused, group=control)
    by_reason: dict[str, list[int]] = {}
    for rank, reason in enumerate(everyones):
        if reason is not None:
            by_reason.setdefault(reason, []).append(rank)
    if not by_reason:
        return result
    reason, ranks = next(iter(by_reason.items()))
    raise RunStoppedError(reason if len(ranks) == len(everyones) else f"{name_ranks(ranks)}: {reason}")


@dataclass(frozen=True)
class StepFacts:
    """The same on every rank."""

    total_weight: float  # of the global batch
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
    return StepFacts(total_weight, int(total_bad), saves > 0, looks > 0)
