"""The lease on a run's folder: one driver at a time writes a run, and one that has lost it writes nothing.

    <run>/lease/00000003-<nonce>.json    generation 3: who holds it, its heartbeat, what it asks of its workers

Each driver that takes the run raises the generation. The file of a generation is written by its holder alone,
so its heartbeat conflicts with nobody.

*Taking.* A driver writes a file of the next generation, then lists the folder. If its file is the only one
of the highest generation it holds the lease; else it removes its file and looks again. Of two that write at
once, whoever lists later sees both, so never do two win. This needs a listing that shows every file written
before it began: POSIX, S3, GCS and Azure give that, and NFS after a change by the same client.

*Expiry.* No clocks are compared. A lease is dead when its heartbeat has not changed for the lease time by the
observer's own monotonic clock; at once if the holder was a process of this very machine (same boot, same PID
namespace) that has ended.

*Fencing.* Driver and workers look for a higher generation immediately before every change of the run
(`GuardedStorage`, MLflow points). Who does not find the file of its own generation has lost its storage, as when a
mount is gone and its empty folder is left: nothing is written there either. Storage offers no write that depends on
another file, so a process that is suspended exactly between that look and its write could still publish one file;
what it could publish is a checkpoint that is whole, or points that are the same.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from arvideo_dist.processes import namespace_of, process_identity
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.threads import BlockThread

FOLDER = "lease"
_NAME = re.compile(r"(\d{8})-[0-9a-f]{32}\.json")
_ANY_FILE = re.compile(r"\.?(\d{8})-[0-9a-f]{32}\.json(\.[0-9a-f]+\.partial)?")
_BEATS_PER_LEASE = 6
_READS = 5
_LISTINGS = 2  # one may miss a file that is being replaced


class LeaseHeldError(ValueError):
    """Another driver that is alive holds the run."""


class LeaseLostError(RuntimeError):
    """This process may not change the run any more; the message names who may."""


class Holder(BaseModel):
    """Who holds a lease."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    host: str
    pid: int
    job: str | None  # Ray job submission
    process: str | None  # boot, PID namespace and start time: what makes a PID unique, if /proc tells

    @classmethod
    def this_process(cls) -> Holder:
        pid = os.getpid()
        job = os.environ.get("RAY_JOB_SUBMISSION_ID")
        return cls(host=socket.gethostname(), pid=pid, job=job, process=process_identity(pid))

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def has_ended(self) -> bool:
        """Whether the process is known to exist no more; False if this machine cannot know."""
        mine = process_identity(os.getpid())
        if self.process is None or mine is None or namespace_of(mine) != namespace_of(self.process):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return process_identity(self.pid) not in (None, self.process)  # the PID was given out again


class Record(BaseModel):
    """Content of a lease file."""

    model_config = ConfigDict(extra="forbid")
    holder: Holder
    lease_s: float
    beat: int = 0
    newest_step: int = 0  # of which a checkpoint was seen in the run's folder
    released: bool = False
    stop: str | None = None  # why the workers shall save and end
    widen: str | None = None  # the set of workers that shall save and make way for a wider one


class Guard:
    """One generation of a run's lease, as driver and workers look at it. Pickles to its two strings."""

    def __init__(self, run_address: str, name: str) -> None:
        self.run_address, self.name = run_address, name
        self._run = Storage(run_address)

    def __reduce__(self) -> tuple[type[Guard], tuple[str, str]]:
        return Guard, (self.run_address, self.name)

    @property
    def run_uri(self) -> str:
        """The run's folder, for people."""
        return self._run.uri

    @property
    def generation(self) -> int:
        return _generation(self.name)

    def check(self) -> None:
        """Raises LeaseLostError if a higher generation exists, OSError if this one's own file is not."""
        for _ in range(_LISTINGS):
            newest = _newest(self._run)
            if newest and _generation(newest[0]) > self.generation:
                found = _read(self._run, newest[0])
                holder = found.holder if found else "another driver"
                raise LeaseLostError(
                    f"run {self.run_uri} was taken over by {holder} (generation {_generation(newest[0])}, this one "
                    f"is {self.generation}): nothing more is written here"
                )
            if self.name in newest:
                return
            # An NFS client may show an older listing for a minute, but asks its server for a name.
            if self._run.is_local and self._run.exists(f"{FOLDER}/{self.name}"):
                return
        raise OSError(
            f"{self.run_uri}/{FOLDER} on {socket.gethostname()} does not hold this driver's own {self.name}: the "
            "store is taken to be away, and nothing is written. Is it mounted?"
        )

    def record(self) -> Record | None:
        """What the driver has written last, its wishes among it; None if the lease is another's by now."""
        return _read(self._run, self.name)

    def storage(self) -> GuardedStorage:
        """The run's folder, for changes under this generation."""
        return GuardedStorage(self)


class GuardedStorage(Storage):
    """A run's folder in which nothing is changed once a higher generation exists (LeaseLostError), nor if the
    folder is not the run's (OSError)."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard.run_address)
        self.guard = guard

    def _before_change(self) -> None:
        self.guard.check()


class Lease(BlockThread):
    """A lease that this driver holds: renewed by a thread, given back on exit from the `with` block."""

    def __init__(self, guard: Guard, record: Record, newest_step: Callable[[Storage], int]) -> None:
        """`newest_step`: of the complete checkpoints of a run, 0 for none; asked at each heartbeat."""
        self.guard = guard
        self._record, self._newest_step_of = record, newest_step
        self._seen, self._seeing = record.newest_step, threading.Lock()
        self.stop_reason: str | None = None  # why the run was asked to stop, if it was
        self._widen: str | None = None
        super().__init__("lease")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with contextlib.suppress(LeaseLostError):  # whose it is now has been said
            try:
                self._write(released=True)
            except OSError as failure:
                print(
                    f"the lease of {self.guard.run_uri} was not given back: {failure}\nthe next start on "
                    f"another machine waits {self._record.lease_s:g} s for it",
                    file=sys.stderr,
                )

    def ask_to_stop(self, reason: str) -> None:
        """Let the workers save and end at their next step."""
        self.stop_reason = reason
        self.wake()

    def saw(self, step: int) -> int:
        """Somebody saw a checkpoint of `step`; returns the newest step that anybody has seen, 0 for none."""
        with self._seeing:
            self._seen = max(self._seen, step)
            return self._seen

    def ask_to_widen(self, workers: str) -> None:
        """Let the set of workers of this name, and no later one, save and make way for a wider one."""
        self._widen = workers
        self.wake()

    def is_held(self) -> bool:
        """Whether no other driver has the run. OSError if its storage does not tell for the lease time."""
        try:
            patiently(self.guard.check, self._record.lease_s)
        except LeaseLostError:
            return False
        return True

    def _keep(self) -> None:
        failing = False
        while self._pause(self._record.lease_s / _BEATS_PER_LEASE):
            try:
                self._write()
            except LeaseLostError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                return
            except OSError as error:
                # Tried again, and said once; if it lasts, another driver may take the run.
                if not failing:
                    print(f"the lease of {self.guard.run_uri} was not renewed: {error}", file=sys.stderr)
                failing = True
            else:
                failing = False

    def _write(self, *, released: bool = False) -> None:
        with contextlib.suppress(OSError):  # a store that fails for a moment costs no heartbeat
            self.saw(self._newest_step_of(Storage(self.guard.run_address)))
        update: dict[str, Any] = {"beat": self._record.beat + 1, "released": released}
        update |= {"stop": self.stop_reason, "widen": self._widen, "newest_step": self.saw(0)}
        self._record = self._record.model_copy(update=update)
        content = self._record.model_dump_json(indent=1).encode()
        self.guard.storage().write_bytes(f"{FOLDER}/{self.guard.name}", content)


def acquire(run: Storage, lease_s: float, newest_step: Callable[[Storage], int] = lambda run: 0) -> Lease:
    """Take the run's lease, waiting up to the holder's lease time to learn whether that one is alive.

    `lease_s`: seconds without a heartbeat after which others may take it. `newest_step`: of the complete
    checkpoints of a run, 0 for none. Raises LeaseHeldError, which names the holder.
    """
    record = Record(holder=Holder.this_process(), lease_s=lease_s)
    free: set[str] = set()
    while True:
        newest = _newest(run)
        if judge := [name for name in newest if name not in free]:
            # Files may have come and gone meanwhile, so only a listing without an unknown one counts.
            free.update(name for name in judge if _wait_until_free(run, name))
            continue
        seen = max(recorded_step(run), newest_step(run))
        record = record.model_copy(update={"newest_step": max(record.newest_step, seen)})
        generation = _generation(newest[0]) + 1 if newest else 1
        mine = f"{generation:08d}-{uuid.uuid4().hex}.json"
        run.write_bytes(f"{FOLDER}/{mine}", record.model_dump_json(indent=1).encode())
        if _newest(run) == [mine]:
            _clear_older(run, generation)
            return Lease(Guard(run.address, mine), record, newest_step)
        run.delete(f"{FOLDER}/{mine}")
        time.sleep(random.uniform(0.2, 1.0))  # so that two who meet do not meet for ever


def _clear_older(run: Storage, generation: int) -> None:
    """Delete files of earlier generations, and what killed holders left of them. Never of one that took over while
    this process was held up."""
    for name in run.names(FOLDER):
        match = _ANY_FILE.fullmatch(name)
        if match is not None and int(match[1]) < generation:
            run.delete(f"{FOLDER}/{name}")


def recorded_step(run: Storage) -> int:
    """The newest step of which the holders of the run's lease saw a checkpoint, 0 for none."""
    found = [_read(run, name) for name in _newest(run)]
    return max((record.newest_step for record in found if record is not None), default=0)


def _wait_until_free(run: Storage, name: str) -> bool:
    """True once the holder of `name` has given it back or is dead, False if the file is gone (its writer
    stepped back, and another may hold the lease now); LeaseHeldError once the holder shows life."""
    first = _read(run, name)
    if first is None or first.released or first.holder.has_ended():
        return first is not None
    print(
        f"run {run.uri} is held by {first.holder}: taken over if it gives no sign of life for "
        f"{first.lease_s:g} s",
        flush=True,
    )
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began  # before the look, so that a slow look counts for the holder
        now = _read(run, name)
        if now is None or now.released or now.holder.has_ended():
            return now is not None
        if now.beat != first.beat:
            raise LeaseHeldError(
                f"run {run.uri} is being written by {now.holder} (generation {_generation(name)}), which is "
                "alive: let it end or stop it, or choose another run.name"
            )
        if waited >= first.lease_s:
            return True
        time.sleep(min(1.0, first.lease_s / _BEATS_PER_LEASE))


def _names(run: Storage) -> list[str]:
    return [name for name in run.names(FOLDER) if _NAME.fullmatch(name)]


def _newest(run: Storage) -> list[str]:
    """Files of the highest generation: one, but for drivers that are taking the lease now."""
    names = _names(run)
    return [name for name in names if _generation(name) == _generation(names[-1])]


def _generation(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _read(run: Storage, name: str) -> Record | None:
    """Content of a lease file; None if its writer stepped back or it was superseded."""
    for tries_left in reversed(range(_READS)):
        try:
            return Record.model_validate_json(run.read_bytes(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            # An object that its holder replaces between pyarrow's look at its size and its read does this.
            if not tries_left:
                raise OSError(f"{run.uri}/{FOLDER}/{name} cannot be read: {error}") from error
            time.sleep(0.1)
    raise AssertionError("the last try returns or raises")
