"""Asynchronous saves: the training goes on while a checkpoint is copied, written and published.

    step loop    request ── forward, backward ── before_update ── update ── ... ── next request: waits for the save
    background     └─ copy ─────────────────────────▲  write and digest ── gather ── manifest ── old ones deleted

The state changes in the optimiser's update only, so the copy has the next step's forward and backward to itself;
`before_update` holds the update back until the copy is whole, and everything after works on the copy. One save is
in flight at a time. Its outcome is the same on all ranks, who learn it where they meet anyway: at the next save or
at the end.

A save that fails (a full disk, a store that does not answer) leaves the checkpoints before it as they are and
nothing of itself. The training goes on and the next save is due sooner, after a pause that grows; when
`run.max_failed_saves` have failed in a row the run stops, since it would only lose more.

Memory: every rank holds its share of the state once more on the host, 12 bytes a parameter over the number of
ranks, allocated at start (pinned on a GPU machine, where the allocator rounds up to a power of two); rank 0 holds
the frozen parameters too. Object storage may hold as much again in pieces that are on their way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage, lasts
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, checkpoint_name
from arvideo_dist.train.checkpoint.manifest import (
    CheckpointError,
    CheckpointManifest,
    FragmentEntry,
    UntrainedEntry,
    check_coverage,
    shape_of,
)
from arvideo_dist.train.checkpoint.retention import Retention, clear_leftovers, weights_step
from arvideo_dist.train.checkpoint.snapshot import Snapshot
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import LeaseLostError
from arvideo_dist.train.run.stop import RunStoppedError

Result = TypeVar("Result")

# Of the MLflow run: the newest save's failure, or that there is none.
FAILED_TAG = "arvideo.failed_checkpoint"

# Levels below training and decoding (Ray's workers are at 15 already): on a full core some two fifths of their
# share, so that a save also comes to its end.
_NICER = 4

_SLICE_S = 1.0  # of waiting for a save; well below the shortest run.hung_s

# How much later than the fastest rank the slowest may have uploaded its part.
_TIMEOUT = timedelta(hours=2)

_TOLD = 3  # kinds of failure that a message tells

# From a failed save to the next try; doubles with each failure in a row. With three tries a store may be away for a
# minute and a half, and all fit into the two minutes that workers have to leave (run.preemption_grace_s).
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 600.0


def _nothing() -> None:
    pass


def _ignore(*_: object) -> None:
    pass


class Saver:
    """Writes a run's checkpoints from all ranks; except for `due_*` its methods are collective."""

    def __init__(
        self,
        run: Storage,
        engine: Engine,
        options: RunConfigSection,
        say: Callable[[str], None],
        *,
        flush: Callable[[], None] = _nothing,
        report: Callable[[int, int, str], None] = _ignore,
        published: Callable[[int], None] = _ignore,
        last_saved: int = 0,
        damaged: Iterable[str] = (),
        failed_before: int = 0,
    ) -> None:
        """Everything is written and deleted through `run`, which may refuse. `say` gets a line from rank 0 for
        each complete checkpoint and each failed save.

        `flush`: called on each rank before a checkpoint becomes visible, for what must be on storage by then.
        `report`: called on rank 0 for each failed save (step, failures in a row, message), and with 0 failures
        for the first that succeeds after. `published`: called on rank 0 with the step of each checkpoint that has
        become visible. All three are called by the background thread. `last_saved`: the step of the checkpoint that
        the run began from, `damaged`: names of newer ones that it could not use. `failed_before`: `failures_in_all`
        of the workers before.
        """
        self._run, self._engine, self._options = run, engine, options
        self._say, self._flush, self._report, self._published = say, flush, report, published
        self._retention = Retention(run, options.keep_last, options.keep_every, damaged)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # The step loop uses its groups while the background thread uses this one.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._snapshot = Snapshot(engine)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._buffers_differ = False  # which has been said
        self._failed_at = 0.0
        self._failures = 0  # in a row
        self._best: str | None = None  # name of the checkpoint that is kept for its metric
        self.failures_in_all = failed_before
        self.last_saved = last_saved  # the newest checkpoint's step
        self._requested_at = time.monotonic()

    def due_by_step(self, step: int) -> bool:
        """Whether a checkpoint is wanted after optimiser step `step`, whatever the clock says."""
        every = (self._options.checkpoint_every_steps, self._options.keep_every)
        return any(step % number == 0 for number in every if number is not None)

    def due_by_time(self) -> bool:
        """Whether `checkpoint_every_minutes` have passed, or the pause after a failed save: rank 0's clock alone
        says so, to be agreed upon."""
        if self._rank:
            return False
        in_flight = self._thread is not None and self._thread.is_alive()
        if self._failures and not in_flight:
            return self._failures >= self._options.max_failed_saves or self._pause_left_s() <= 0
        minutes = self._options.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._requested_at >= 60 * minutes

    def request(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save the state as it is after `step`; waits first if the save before is not yet done, and
        leaves it if that one failed and the pause after it is not over.

        `state`: JSON content kept beside the tensors. Raises RunStoppedError, on all ranks, if the save before
        was the last of `max_failed_saves` in a row.
        """
        self._outcome()
        if self._failures:  # the same on all ranks once their threads have ended; their clocks are not
            over = [self._pause_left_s() <= 0]
            dist.broadcast_object_list(over, src=0, group=self._group)
            if not over[0]:
                return
        self._requested_at = time.monotonic()
        best = state.get("best")
        self._best = None if best is None else checkpoint_name(best["step"])
        # Written out here, since what `state` holds changes with the next steps.
        state = {**state, "optimizer_steps": zero_state.optimizer_steps(self._engine)}
        content = json.dumps(state, indent=1).encode()
        self._snapshot.begin()
        self._thread = threading.Thread(
            target=self._save,
            args=(step, content, weights_step(state, step)),
            name=f"save-{step}",
            daemon=True,
        )
        self._thread.start()

    def before_update(self) -> None:
        """Call it before the weights change: holds back until a save that has begun has its copy."""
        if self._thread is not None:
            activity.alone("waits for the copy of the state that is being saved")
            self._snapshot.hold()

    @property
    def failing(self) -> bool:
        """Whether the last save that has ended failed."""
        return self._failures > 0

    def finish(self, again: Callable[[], None] | None = None) -> None:
        """Wait for the save in flight; raises CheckpointError on all ranks if it failed.

        With `again`, which requests the same state once more, that is called instead, after a pause, until a save
        is whole; raises RunStoppedError as `request` does.
        """
        failure = self._outcome()
        if again is None:
            if failure is not None:
                raise failure
            return
        while self._failures:
            while (left := self._pause_left_s()) > 0:
                activity.tick()  # a pause is no hang
                time.sleep(min(left, 1.0))
            again()
            self._outcome()

    def _outcome(self) -> CheckpointError | None:
        """What became of the save in flight, once it has ended. Raises what must stop the run."""
        if self._thread is not None:
            activity.together("waits for the save in flight")
            while self._thread.is_alive():
                self._thread.join(_SLICE_S)
                if self._snapshot.uploading.is_set():
                    activity.tick()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return None
        if not isinstance(failure, CheckpointError):
            raise failure
        if self._failures >= self._options.max_failed_saves:
            raise too_many_failed(self._failures, failure, f"step {self.last_saved}") from failure
        return failure

    def _pause_left_s(self) -> float:
        return self._failed_at + pause_s(self._failures) - time.monotonic()

    # From here on: the background thread.

    def _save(self, step: int, state: bytes, weights: int | None) -> None:
        try:
            _lower_priority()
            # A new thread's device is the first one, on which it would make a context.
            if self._engine.device.type == "cuda":
                torch.cuda.set_device(self._engine.device)
            self._write(step, state, weights)
        except CheckpointError as error:
            self._failures += 1
            self.failures_in_all += 1
            self._failed_at = time.monotonic()
            self._failure = error
            if self._rank == 0:
                self._clean_up(step, error)
        except Exception as error:  # the run ends, or a rank is gone and the step loop is about to learn it
            self._failure = error
        else:
            if self._rank == 0 and self._failures:
                self._report(step, 0, "")
            self._failures, self.last_saved = 0, step

    def _clean_up(self, step: int, error: CheckpointError) -> None:
        """Rank 0, after a failed save: give back the space of what was written, and tell."""
        name = checkpoint_name(step)
        try:
            clear_leftovers(self._run, name)
        except (OSError, LeaseLostError) as left:
            self._say(f"step {step}  what the failed save left of {name} could not be deleted: {left}")
        tries = f"{self._failures} of run.max_failed_saves {self._options.max_failed_saves} in a row"
        self._say(f"step {step}  the save failed ({tries}): {error}")
        self._report(step, self._failures, str(error))

    def _write(self, step: int, state: bytes, weights: int | None) -> None:
        name = checkpoint_name(step)
        folder = f"{FOLDER}/{name}"
        replaces = False  # a damaged checkpoint of the same step
        untrained: tuple[FileEntry, UntrainedEntry] | None = None

        def prepare() -> tuple[str, str]:
            nonlocal replaces
            self._snapshot.complete()
            if self._rank == 0:
                replaces = clear_leftovers(self._run, name)
            return secrets.token_hex(4), self._snapshot.untrained.buffers_digest()

        def publish() -> None:
            if self._rank == 0:
                self._publish(folder, written, untrained, state)
                self._say(f"step {step}  checkpoint {name} is complete")
                self._published(step)
                self._retain(name, weights, replaces=replaces)

        def write() -> tuple[FileEntry, list[FragmentEntry]]:
            nonlocal untrained
            self._flush()
            if self._rank == 0 and not self._snapshot.untrained.is_empty:
                part = f"untrained-{token}.safetensors"
                untrained = self._snapshot.write_untrained(self._run, folder, part)
            part = f"part-{self._rank:05d}-of-{self._world_size:05d}-{token}.safetensors"
            return self._snapshot.write(self._run, folder, part)

        prepared = self._together(folder, prepare)
        # The token makes the names this save's own: no straggler of another attempt can write over its parts.
        token = prepared[0][0]
        self._say_if_buffers_differ([digest for _, digest in prepared])
        written = self._together(folder, write)
        self._together(folder, publish)

    def _say_if_buffers_differ(self, digests: list[str]) -> None:
        if len(set(digests)) > 1 and not self._buffers_differ:
            self._buffers_differ = True
            self._say(
                "the module's buffers differ between ranks: checkpoints hold those of rank 0, and a run that is "
                "continued from one is not the same to the bit"
            )

    def _retain(self, name: str, weights: int | None, *, replaces: bool) -> None:
        try:
            if replaces:
                clear_leftovers(self._run, name)
            self._retention.saved(name, weights, self._best)
        except OSError as error:
            # The checkpoint itself is whole, and the next one's turn comes for these too.
            self._say(f"older checkpoints than {name} could not be deleted: {error}")

    def _together(self, folder: str, action: Callable[[], Result]) -> list[Result]:
        return together(f"{self._run.uri}/{folder}", self._group, action)

    def _publish(
        self,
        folder: str,
        written: list[tuple[FileEntry, list[FragmentEntry]]],
        untrained: tuple[FileEntry, UntrainedEntry] | None,
        state: bytes,
    ) -> None:
        parameters = self._engine.module.named_parameters()
        manifest = CheckpointManifest(
            shapes={name: shape_of(parameter) for name, parameter in parameters if parameter.requires_grad},
            fragments=[fragment for _, fragments in written for fragment in fragments],
            untrained=None if untrained is None else untrained[1],
            parts=[*(entry for entry, _ in written), *([] if untrained is None else [untrained[0]])],
            state=FileEntry(name=STATE, size=len(state), sha256=hashlib.sha256(state).hexdigest()),
        )
        check_coverage(manifest)
        self._run.write_bytes(f"{folder}/{STATE}", state)
        self._run.write_bytes(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())


def pause_s(failures: int) -> float:
    """From the last of so many failed saves in a row to the next try, in seconds."""
    return min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S)


def too_many_failed(failures: int, last: CheckpointError, saved: str) -> RunStoppedError:
    """What stops the run after `run.max_failed_saves`; `saved`: what the same command goes on from."""
    return RunStoppedError(
        f"{failures} saves in a row failed (run.max_failed_saves); the last one: {last}. Mend the storage (free "
        f"space, rights, is the store up?); the same command goes on from {saved}",
        passing=last.passing,
    )


def together(where: str, group: dist.ProcessGroup, action: Callable[[], Result]) -> list[Result]:
    """Collective. Each rank's result of `action`; where it failed on some rank, the same error on all ranks.

    A lone raise would leave the others waiting. `where`: what is being saved.
    """
    outcome: Any
    try:
        outcome = action(), None
    except (RunStoppedError, LeaseLostError) as error:
        outcome = None, RunStoppedError(str(error))
    except Exception as error:
        passing = isinstance(error, OSError) and not lasts(error)
        told = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        kind = f"{type(error).__name__} {getattr(error, 'errno', None) or error}"
        outcome = None, CheckpointError(told, passing=passing, kind=kind)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group=group)
    failures = [failure for _, failure in outcomes if failure is not None]
    for failure in failures:
        if isinstance(failure, RunStoppedError):
            raise failure
    if failures:
        passing = all(failure.passing for failure in failures)
        raise CheckpointError(f"save of {where} failed: {_told(failures)}", passing=passing)
    return [result for result, _ in outcomes]


def _told(failures: list[CheckpointError]) -> str:
    """What the ranks met; one speaks for all that met the same, such as a full disk."""
    alike: dict[str, list[CheckpointError]] = {}
    for failure in failures:
        alike.setdefault(failure.kind, []).append(failure)
    lines = []
    for first, *others in list(alike.values())[:_TOLD]:
        lines.append(f"{first}, and {len(others)} more ranks alike" if others else str(first))
    if len(alike) > _TOLD:
        lines.append(f"{len(failures)} ranks in all")
    return "; ".join(lines)


def _lower_priority() -> None:
    """Of this thread, below the one that started it."""
    if sys.platform == "linux":  # where niceness belongs to a thread
        thread = threading.get_native_id()
        niceness = min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
        with contextlib.suppress(OSError):  # a save at full priority is a save all the same
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
