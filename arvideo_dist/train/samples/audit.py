"""Which places of the sample sequence made the weights, written at the optimiser step (`run.audit`).

    <run>/audit/<generation>-<attempt>/start.json              the step that this set of workers began from
    <run>/audit/<generation>-<attempt>/rank-00000.jsonl        a line a step: {"step": 5, "places": [[64, 72]]}

Each rank writes the places of its own batches, as it got them from the loader, right after the weights changed:
stretches [first, last) of real places, padding left out. On a local or shared path a line is appended at each
step; in object storage the lines go into numbered files (`rank-00000.000000.jsonl`), at the latest before each
checkpoint. Lines that the storage does not take wait (`deferred.py`), and no checkpoint counts without them.

When workers restart or go back by themselves (`bad_steps.py`), the weights are a checkpoint's again, and another
attempt begins: `applied_places` tells the steps that are in the final weights from those that were given up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.run.lease import Guard
from arvideo_dist.train.tracking.deferred import DeferredWrites

FOLDER = "audit"
_START = "start.json"


class Audit:
    """One rank's lines of one set of workers."""

    def __init__(
        self, guard: Guard, notes: DeferredWrites, start_step: int, control: dist.ProcessGroup
    ) -> None:
        """Collective. `start_step`: optimiser steps in the weights that these workers start from."""
        self._generation, self._notes = guard.generation, notes
        self._rank = dist.get_rank()
        opened = [self._next_number(guard.storage()) if self._rank == 0 else 0]
        dist.broadcast_object_list(opened, src=0, group=control)
        self._number = opened[0]
        self._begin(start_step)

    def _next_number(self, run: Storage) -> int:
        """Of the attempt after those that are on storage."""
        prefix = f"{self._generation:08d}-"
        names = patiently(lambda: run.names(FOLDER))
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        # Not their count: of attempts that the storage did not take there may be a gap.
        return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1

    def _begin(self, step: int) -> None:
        """Waits with the lines if the disk is full: workers that start then must not be lost for it."""
        if self._rank == 0:
            self._notes.put(self._name(_START), _start(step))

    def _name(self, file: str) -> str:
        return f"{FOLDER}/{self._generation:08d}-{self._number:04d}/{file}"

    def go_back(self, step: int) -> None:
        """The weights are those after optimiser step `step` again: what is applied next is of a new attempt."""
        self._number += 1
        self._begin(step)

    def applied(self, step: int, batches: Sequence[Batch]) -> None:
        """The places of `batches` are in the weights since optimiser step `step` (the first one is 1)."""
        places = torch.cat([batch.places for batch in batches])
        line = {"step": step, "places": _stretches(places[places >= 0].tolist())}
        self._notes.append(self._name(f"rank-{self._rank:05d}.jsonl"), json.dumps(line).encode() + b"\n")


def _start(step: int) -> bytes:
    return json.dumps({"start_step": step, "world_size": dist.get_world_size()}).encode()


def applied_places(run: Storage) -> dict[int, list[int]]:
    """The places behind the newest weights: by optimiser step, sorted, as often as they were applied.

    Read from the attempts' own lines. The last attempt's steps all count; of an earlier one count those up to
    the step that the attempts after it began from, since the rest was lost with its workers.
    """
    result: dict[int, list[int]] = {}
    limit: int | None = None
    for attempt in reversed(run.names(FOLDER)):
        folder = f"{FOLDER}/{attempt}"
        if not run.exists(f"{folder}/{_START}"):  # killed before it began: it has no lines
            continue
        for name in run.names(folder):
            if Path(name).suffix != ".jsonl":
                continue
            for line in run.read_bytes(f"{folder}/{name}").decode().splitlines():
                entry = json.loads(line)
                if limit is None or entry["step"] <= limit:
                    places = [place for first, last in entry["places"] for place in range(first, last)]
                    result.setdefault(entry["step"], []).extend(places)
        start = json.loads(run.read_bytes(f"{folder}/{_START}"))["start_step"]
        limit = start if limit is None else min(limit, start)
    return {step: sorted(places) for step, places in sorted(result.items())}


def _stretches(places: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1][1] += 1
        else:
            found.append([place, place + 1])
    return found
