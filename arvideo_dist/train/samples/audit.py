"""Which places of the sample sequence made the weights, written at the optimiser step (`run.audit`).

    <run>/audit/<generation>-<attempt>/start.json              the step that this set of workers began from
    <run>/audit/<generation>-<attempt>/rank-00000.jsonl        a line a step: {"step": 5, "places": [[64, 72]]}

Each rank writes the places of its own batches, as it got them from the loader, right after the weights changed:
stretches [first, last) of real places, padding left out. On a local or shared path a line is appended at each
step; object storage cannot append, so there the lines go into numbered files before each checkpoint. Lines that the
storage does not take wait for the next step, at the latest for the next checkpoint, which does not count without.

When workers restart or go back by themselves (`bad_steps.py`), the weights are a checkpoint's again, and another
attempt begins: `applied_places` tells the steps that are in the final weights from those that were given up.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.run.lease import Guard

FOLDER = "audit"
_START = "start.json"


@dataclass
class _Attempt:
    """What of an attempt is not on storage yet."""

    folder: str
    start: bytes | None = None  # of its start.json, which rank 0 writes
    lines: list[str] = field(default_factory=list)


class Audit:
    """One rank's lines of one set of workers."""

    def __init__(self, guard: Guard, start_step: int, control: dist.ProcessGroup) -> None:
        """Collective. `start_step`: optimiser steps in the weights that these workers start from."""
        self._guard, self._run = guard, guard.storage()
        self._rank = dist.get_rank()
        opened = [0]
        if self._rank == 0:
            opened = [self._open(start_step)]
        dist.broadcast_object_list(opened, src=0, group=control)
        self._number = opened[0]
        self._attempts = [_Attempt(self._folder())]  # the last one is the present one
        self._files = 0
        self._writing = threading.Lock()

    def _open(self, start_step: int) -> int:
        """Begin the attempt after those that are on storage; its number."""
        prefix = f"{self._guard.generation:08d}-"
        names = patiently(lambda: self._run.names(FOLDER))
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        # Not their count: of attempts that the storage did not take there may be a gap.
        self._number = max((int(number) for number in numbers if number.isdecimal()), default=0) + 1
        # Of one folder, however often it fails: on a full disk each try would leave an empty one.
        patiently(lambda: self._run.write_bytes(f"{self._folder()}/{_START}", _start(start_step)))
        return self._number

    def _folder(self) -> str:
        return f"{FOLDER}/{self._guard.generation:08d}-{self._number:04d}"

    def go_back(self, step: int) -> None:
        """The weights are those after optimiser step `step` again: what is applied from now on is of a new attempt.

        Raises no OSError: what the storage does not take waits as the lines of a step do.
        """
        with self._writing:
            self._number += 1
            start = _start(step) if self._rank == 0 else None
            self._attempts.append(_Attempt(self._folder(), start))
        self._try_to_flush()

    def applied(self, step: int, batches: Sequence[Batch]) -> None:
        """The places of `batches` are in the weights since optimiser step `step` (the first one is 1)."""
        places = torch.cat([batch.places for batch in batches])
        line = {"step": step, "places": _stretches(places[places >= 0].tolist())}
        with self._writing:
            self._attempts[-1].lines.append(json.dumps(line) + "\n")
        if self._run.is_local:
            self._try_to_flush()

    def _try_to_flush(self) -> None:
        try:
            self.flush()
        except OSError as error:
            print(f"rank {self._rank}: {self._folder()}: tried again later: {error}", flush=True)

    def flush(self) -> None:
        """Call before a checkpoint becomes visible, from any thread: what it holds is on storage then."""
        with self._writing:
            for attempt in list(self._attempts):
                self._write(attempt)
                if attempt is not self._attempts[-1]:
                    self._attempts.remove(attempt)

    def _write(self, attempt: _Attempt) -> None:
        if attempt.start is not None:
            self._run.write_bytes(f"{attempt.folder}/{_START}", attempt.start)
            attempt.start = None
        if not attempt.lines:
            return
        content = "".join(attempt.lines).encode()
        if self._run.is_local:
            self._guard.check()
            path = Path(self._run.path(f"{attempt.folder}/rank-{self._rank:05d}.jsonl"))
            path.parent.mkdir(exist_ok=True)  # rank 0's start.json may not be there yet
            _append(path, content)
        else:
            name = f"{attempt.folder}/rank-{self._rank:05d}.{self._files:06d}.jsonl"
            self._run.write_bytes(name, content)
            self._files += 1
        attempt.lines.clear()


def _start(step: int) -> bytes:
    return json.dumps({"start_step": step, "world_size": dist.get_world_size()}).encode()


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
