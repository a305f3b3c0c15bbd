"""What a run over views keeps: its rows in parts, and saves that tell how far it is.

    <run>/scores/part-00000042-00001-9f3a.parquet       a rank's rows since its part before (`SequenceTask.rows`)
    <run>/checkpoints/step-00000042/state.json          position, and the parts that hold all places before it

The folder of the parts is the task's. A save that fails is treated as a training's (checkpoint/saver.py): the rows
stay in memory, the run goes on, and the next save is tried after a pause that grows, until `run.max_failed_saves`
have failed in a row.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, checkpoint_name
from arvideo_dist.train.checkpoint.manifest import CheckpointError, CheckpointManifest
from arvideo_dist.train.checkpoint.retention import Retention, clear_leftovers
from arvideo_dist.train.checkpoint.saver import pause_s, together, too_many_failed
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import LeaseLostError
from arvideo_dist.train.run.stop import RunStoppedError

# Rows of all ranks in memory after which a save is due, whatever the time: whole tokens are megabytes a view.
_MOST_WAITING_BYTES = 2**29
_SLICE_S = 1.0  # of a pause; well below the shortest run.hung_s


class SequenceSaves:
    """The saves of one rank."""

    def __init__(
        self,
        run: Storage,
        folder: str,
        options: RunConfigSection,
        control: dist.ProcessGroup,
        say: Callable[[str], None],
        *,
        flush: Callable[[], None],
        report: Callable[[str], None],
        start: Mapping[str, Any] | None,
    ) -> None:
        """`folder`: of the run, for the parts. `say` gets a line for each save and each failure. `flush`: called on
        rank 0 before a save becomes visible, for what must be on storage by then. `report`: called on rank 0 for
        each failed save with what failed, and for the first that succeeds after. `start`: the state of the save
        that the run goes on from.
        """
        self._run, self._folder, self._options, self._control = run, folder, options, control
        self._say, self._flush, self._report = say, flush, report
        self._retention = Retention(run, options.keep_last, None)
        self._rows: list[pa.Table] = []  # of this rank, in no part yet
        self._waiting_bytes = 0  # of these
        self._unsaved: list[dict[str, Any]] = []  # parts of this rank that no save names yet
        self._parts: list[dict[str, Any]] = [] if start is None else list(start["parts"])
        self._saved_at = time.monotonic()
        self._failures, self._failed_at = 0, 0.0  # in a row
        self.position = 0 if start is None else int(start["position"])  # of the newest save

    def add(self, rows: pa.Table) -> None:
        """Rows of this rank, for the next save: after those that were added before."""
        self._rows.append(rows)
        self._waiting_bytes += rows.nbytes

    @property
    def failing(self) -> bool:
        """Whether the newest save failed; the same on all ranks."""
        return self._failures > 0

    def due(self) -> bool:
        """Whether `checkpoint_every_minutes` have passed, many rows wait, or the pause after a failed save is over:
        by what rank 0 sees."""
        if dist.get_rank():
            return False
        if self._failures:
            return self._pause_left_s() <= 0
        if self._waiting_bytes * dist.get_world_size() >= _MOST_WAITING_BYTES:
            return True
        minutes = self._options.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, position: int, step: int, state: Mapping[str, Any]) -> None:
        """Collective. All rows that were added are on storage when this returns, unless the save failed, or one
        before it did and the pause after that is not over.

        `state`: JSON content beside position, step and parts. Raises RunStoppedError on all ranks if this was the
        last of `max_failed_saves` in a row.
        """
        activity.together("saves its rows")
        if self._failures:
            over = [self._pause_left_s() <= 0]
            dist.broadcast_object_list(over, src=0, group=self._control)
            if not over[0]:
                return
        self._saved_at = time.monotonic()
        name = checkpoint_name(step)
        try:
            self._write(name, {**state, "position": position, "step": step})
        except CheckpointError as error:
            self._failed(name, position, error)
            return
        if dist.get_rank() == 0 and self._failures:
            self._report(f"none since {name}")
        self._failures, self.position = 0, position

    def finish(self, position: int, step: int, state: Mapping[str, Any]) -> None:
        """Collective. Save until it succeeds; raises RunStoppedError as `save` does."""
        self.save(position, step, state)
        while self.position < position:
            while (left := self._pause_left_s()) > 0:
                activity.tick()  # a pause is no hang
                time.sleep(min(left, _SLICE_S))
            self.save(position, step, state)

    def read_parts(self) -> Iterable[pa.Table]:
        """The rows of all ranks up to `position`, read part by part, in the order of the parts' first places."""
        return _Parts(self._run, sorted(self._parts, key=lambda part: part.get("first", 0)))

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        where = f"{self._run.uri}/{FOLDER}/{name}"
        of_ranks = together(where, self._control, functools.partial(self._write_part, state["step"]))
        parts = [*self._parts, *(part for of_rank in of_ranks for part in of_rank)]
        together(where, self._control, functools.partial(self._publish, name, {**state, "parts": parts}))
        self._parts, self._unsaved = parts, []
        if dist.get_rank():
            return
        self._say(f"view {state['position']}  save {name} is complete")
        try:
            self._retention.saved(name, state["step"])
        except OSError as error:  # the save itself is whole, and the next one's turn comes for these too
            self._say(f"older saves than {name} could not be deleted: {error}")

    def _write_part(self, step: int) -> list[dict[str, Any]]:
        """The parts of this rank that no save names yet. What a failed save has written is not written again."""
        if self._rows:
            sink, rows = pa.BufferOutputStream(), pa.concat_tables(self._rows)
            pq.write_table(rows, sink)
            content = sink.getvalue().to_pybytes()
            name = f"{self._folder}/part-{step:08d}-{dist.get_rank():05d}-{secrets.token_hex(4)}.parquet"
            self._run.write_bytes(name, content)
            self._rows, self._waiting_bytes = [], 0
            digest = hashlib.sha256(content).hexdigest()
            first = rows["place"][0].as_py() if len(rows) else 0
            self._unsaved.append({"name": name, "size": len(content), "sha256": digest, "first": first})
        return self._unsaved

    def _publish(self, name: str, state: Mapping[str, Any]) -> None:
        if dist.get_rank():
            return
        content = json.dumps(state, indent=1).encode()
        entry = FileEntry(name=STATE, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        manifest = CheckpointManifest(shapes={}, fragments=[], parts=[], state=entry)
        self._flush()
        self._run.write_bytes(f"{FOLDER}/{name}/{STATE}", content)
        self._run.write_bytes(f"{FOLDER}/{name}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())

    def _failed(self, name: str, position: int, error: CheckpointError) -> None:
        self._failures += 1
        self._failed_at = time.monotonic()
        if dist.get_rank() == 0:
            try:
                clear_leftovers(self._run, name)
            except (OSError, LeaseLostError) as left:
                self._say(f"what the failed save left of {name} could not be deleted: {left}")
            tries = f"{self._failures} of run.max_failed_saves {self._options.max_failed_saves} in a row"
            self._say(f"view {position}  the save failed ({tries}): {error}")
            self._report(str(error))
        if self._failures >= self._options.max_failed_saves:
            raise too_many_failed(self._failures, error, f"view {self.position}") from error

    def _pause_left_s(self) -> float:
        return self._failed_at + pause_s(self._failures) - time.monotonic()


class _Parts(Iterable[pa.Table]):
    """The tables that parts hold, read one after the other each time they are gone through."""

    def __init__(self, run: Storage, parts: Sequence[Mapping[str, Any]]) -> None:
        self._run, self._parts = run, parts

    def __iter__(self) -> Iterator[pa.Table]:
        """Raises RunStoppedError if a part is damaged."""
        for part in self._parts:
            content = patiently(functools.partial(self._run.read_bytes, part["name"]))
            if hashlib.sha256(content).hexdigest() != part["sha256"]:
                raise RunStoppedError(
                    f"{self._run.uri}/{part['name']} is damaged (its sha256 differs from the save's): choose "
                    "another run.name to begin anew"
                )
            yield pq.read_table(pa.BufferReader(content))
            activity.tick()
