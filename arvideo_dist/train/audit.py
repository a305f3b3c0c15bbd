"""Which places of the sample sequence made the weights, written at the optimiser step (`run.audit`).

    <run>/audit/<generation>-<attempt>/start.json              the step that this set of workers began from
    <run>/audit/<generation>-<attempt>/rank-00000.jsonl        a line a step: {"step": 5, "places": [[64, 72]]}

Each rank writes the places of its own batches, as it got them from the loader, right after the weights changed:
stretches [first, last) of real places, padding left out. On a local or shared path a line is appended at each
step; object storage cannot append, so there the lines go into numbered files before each checkpoint. Lines that the
storage does not take wait for the next step, at the latest for the next checkpoint, which does not count without.

When workers restart, the weights go back to a checkpoint, and steps after it are replayed: `applied_places` tells
the steps that are in the final weights from those that were lost with the workers.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.lease import Guard

FOLDER = "audit"
_START = "start.json"


class Audit:
    """One rank's lines of one attempt (one set of workers)."""

    def __init__(self, guard: Guard, start_step: int, control: dist.ProcessGroup) -> None:
        """Collective. `start_step`: optimiser steps in the weights that this attempt starts from."""
        self._guard, self._run = guard, guard.storage()
        self._rank = dist.get_rank()
        opened = [""]
        if self._rank == 0:
            opened = [self._open(guard.generation, start_step)]
        dist.broadcast_object_list(opened, src=0, group=control)
        self._folder = opened[0]
        self._lines: list[str] = []
        self._files = 0
        self._writing = threading.Lock()

    def _open(self, generation: int, start_step: int) -> str:
        prefix = f"{generation:08d}-"
        names = patiently(lambda: self._run.names(FOLDER))
        folder = f"{FOLDER}/{prefix}{sum(name.startswith(prefix) for name in names) + 1:04d}"
        start = json.dumps({"start_step": start_step, "world_size": dist.get_world_size()}).encode()
        # Of one folder, however often it fails: on a full disk each try would leave an empty one.
        patiently(lambda: self._run.write_bytes(f"{folder}/{_START}", start))
        return folder

    def applied(self, step: int, batches: Sequence[Batch]) -> None:
        """The places of `batches` are in the weights since optimiser step `step` (the first one is 1)."""
        places = torch.cat([batch.places for batch in batches])
        line = {"step": step, "places": _stretches(places[places >= 0].tolist())}
        with self._writing:
            self._lines.append(json.dumps(line) + "\n")
        if self._run.is_local:
            try:
                self.flush()
            except OSError as error:
                print(f"rank {self._rank}: {self._folder}: tried again at the next step: {error}", flush=True)

    def flush(self) -> None:
        """Call before a checkpoint becomes visible, from any thread: what it holds is on storage then."""
        with self._writing:
            if not self._lines:
                return
            content = "".join(self._lines).encode()
            if self._run.is_local:
                self._guard.check()
                _append(Path(self._run.path(f"{self._folder}/rank-{self._rank:05d}.jsonl")), content)
            else:
                name = f"{self._folder}/rank-{self._rank:05d}.{self._files:06d}.jsonl"
                self._run.write_bytes(name, content)
                self._files += 1
            self._lines.clear()


def _append(path: Path, content: bytes) -> None:
    """All of `content` or, where that raises OSError, nothing of it."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, "only a part was written", str(path))
        except OSError:
            file.truncate(before)
            raise


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
