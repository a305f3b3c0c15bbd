"""What a run logs, on its way to MLflow: a queue with one sender, kept in the run's folder while MLflow is away.

    <run>/outbox/00000007-<nonce>.jsonl            entries that MLflow does not have yet, a line each, in order
    <run>/outbox/refused/00000008-<nonce>.jsonl    an entry that MLflow refused, kept for a person to look at

The step loop puts entries into the queue and never waits for MLflow. The sender repeats an entry until MLflow has
it. What waits is written to the folder when MLflow goes away, before each checkpoint becomes visible (`flush`) and
at the end; so of a process that is killed nothing is lost that the steps after its checkpoint do not give again.
The next process sends what the folder holds before anything of its own.

An entry keeps the time at which it was made. So one that MLflow has although the answer was lost is the same point
again, which its store knows (see `tracking.py`).

MLflow's own queue (`log_batch(synchronous=False)`) drops a batch whose request failed and keeps nothing on disk.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from arvideo_dist.storage import Storage, patiently, shown
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import LeaseLostError
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.tracking.runs import RunStorageError, Tracker, refuses

FOLDER = "outbox"
REFUSED = f"{FOLDER}/refused"
_LONGEST_PAUSE_S = 15.0
_MLFLOW, _STORAGE = "MLflow", "the run's storage"
_DRAIN_S = 90.0  # a run that ends while MLflow is away for a minute still sends all

_LEAVING_S = 5.0  # out of the grace period of who is told to leave; the same command sends the rest


class _Base(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )


class Points(_Base):
    """Metrics of one step; `time_ms`: when they were measured, UNIX time."""

    kind: Literal["points"] = "points"
    step: int
    time_ms: int
    metrics: dict[str, float]

    def send(self, tracker: Tracker) -> None:
        tracker.log(self.step, self.metrics, self.time_ms)


class Tag(_Base):
    kind: Literal["tag"] = "tag"
    key: str
    value: str

    def send(self, tracker: Tracker) -> None:
        tracker.tag(self.key, self.value)


class Running(_Base):
    """The run goes on: its status is RUNNING again."""

    kind: Literal["running"] = "running"

    def send(self, tracker: Tracker) -> None:
        tracker.set_running()


class File(_Base):
    """An artifact with its content."""

    kind: Literal["file"] = "file"
    name: str
    content: bytes

    def send(self, tracker: Tracker) -> None:
        tracker.log_bytes(self.name, self.content)


Entry = Annotated[Points | Tag | Running | File, Field(discriminator="kind")]
_ENTRY: TypeAdapter[Points | Tag | Running | File] = TypeAdapter(Entry)


@dataclass
class _Waiting:
    entry: Points | Tag | Running | File
    number: int  # in the order of their coming
    member: str | None  # of the run's folder that holds the entry
    done: bool = False


class QueuedTracker:
    """A `Tracker` whose methods return at once.

    At the end of its `with` block it waits, for a bounded time, until all is sent; the rest is kept. If it was
    told to `finish` or `leave` before, nothing is left to do there.
    """

    def __init__(self, tracker: Tracker, run: Storage) -> None:
        """`run`: the run's folder, through which everything is kept. Begins with what is waiting there.

        Raises OSError if the folder cannot be read for minutes.
        """
        self._tracker, self._run = tracker, run
        # Files have a lane of their own: the store of artifacts may fail while MLflow is well.
        self._points: deque[_Waiting] = deque()
        self._files: deque[_Waiting] = deque()
        self._numbers = 0
        self._in_member: Counter[str] = Counter()  # entries of each member that are not sent yet
        self._sent_members: list[str] = []  # to be deleted
        self._changed = threading.Condition()  # guards all of these
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._sent = 0
        self._members = 0
        patiently(self._restore)
        self._put(Running())
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error that restarts the workers nothing is waited for: their replay gives the same again."""
        if self._ended.is_set():
            return
        if kind is None or issubclass(kind, RunStoppedError):
            self.finish()
        else:
            self._end()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each metric at `step`; points that MLflow has already are left out."""
        values = {key: float(value) for key, value in metrics.items()}
        self._put(Points(step=step, time_ms=time.time_ns() // 1_000_000, metrics=values))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._put(Tag(key=key, value=value))

    def log_bytes(self, name: str, data: bytes) -> None:
        """A file with content `data` as artifact `name`; one of that name that still waits is not sent any more."""
        self._put(File(name=name, content=data))

    def flush(self) -> None:
        """All that waits now is in the run's folder when this returns; any thread may call it. Raises OSError."""
        with self._writing:
            with self._changed:
                new = [item for item in [*self._points, *self._files] if item.member is None]
            if not new:
                return
            new.sort(key=lambda item: item.number)
            member = self._write(FOLDER, new)
            with self._changed:
                for item in new:
                    item.member = member
                self._in_member[member] = sum(not item.done for item in new)
                if not self._in_member[member]:  # all were sent meanwhile
                    self._sent_members.append(member)
        self._delete_sent()

    def finish(self, drain_s: float = _DRAIN_S) -> None:
        """Wait up to `drain_s` seconds until all is sent; what is left then is kept in the run's folder."""
        self._await_sent(drain_s)
        self._end()
        self._keep_rest(drain_s)
        self._thread.join(1.0)  # one that waits for an answer is left to its fate: all is kept
        self._delete_sent()

    def _await_sent(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            while (self._points or self._files) and not self._ended.is_set() and time.monotonic() < until:
                activity.tick()  # MLflow that is away is no hang
                self._changed.wait(min(1.0, seconds))

    def leave(self) -> None:
        """As `finish`, of a process that may be killed soon: all is kept first, then MLflow gets a few seconds."""
        self._keep_rest(_LEAVING_S)
        self.finish(_LEAVING_S)

    def _keep_rest(self, patience_s: float) -> None:
        try:
            patiently(self.flush, patience_s)
        except LeaseLostError:  # another driver's workers log the run from its newest checkpoint on
            pass
        except OSError as error:
            self._say(f"what MLflow does not have yet could not be kept in {self._run.uri}/{FOLDER}: {error}")

    def _end(self) -> None:
        with self._changed:
            self._ended.set()
            self._changed.notify_all()

    def _restore(self) -> None:
        """Take over what the folder holds."""
        self._points.clear()
        self._files.clear()
        for name in _members(self._run):
            member = f"{FOLDER}/{name}"
            entries = _read(self._run, member)
            for entry in entries:
                self._queue(entry, member)
            self._in_member[member] = len(entries)
            self._members = max(self._members, int(name.split("-")[0]))

    def _write(self, folder: str, items: list[_Waiting]) -> str:
        self._members += 1
        member = f"{folder}/{self._members:08d}-{uuid.uuid4().hex[:8]}.jsonl"
        self._run.write_bytes(
            member, b"".join(item.entry.model_dump_json().encode() + b"\n" for item in items)
        )
        return member

    def _put(self, entry: Points | Tag | Running | File) -> None:
        with self._changed:
            if isinstance(entry, File):
                # What it replaces is not worth a request; after the first, which may be on its way now.
                for item in list(self._files)[1:]:
                    if isinstance(item.entry, File) and item.entry.name == entry.name:
                        self._files.remove(item)
                        self._was_sent(item)
            self._queue(entry, None)
            self._changed.notify_all()

    def _queue(self, entry: Points | Tag | Running | File, member: str | None) -> None:
        self._numbers += 1
        (self._files if isinstance(entry, File) else self._points).append(
            _Waiting(entry, self._numbers, member)
        )

    def _was_sent(self, item: _Waiting) -> None:
        item.done = True
        if item.member is not None:
            self._in_member[item.member] -= 1
            if not self._in_member[item.member]:
                self._sent_members.append(item.member)

    def _delete_sent(self) -> None:
        """Delete files whose entries MLflow already has; if the storage fails, some other time."""
        with self._changed:
            members, self._sent_members = self._sent_members, []
        for member in members:
            try:
                self._run.delete(member)
            except OSError:
                with self._changed:
                    self._sent_members.append(member)

    # From here on: the sender's thread.

    def _send_all(self) -> None:
        pause, away, sent_before = 0.0, "", 0  # `away`: what keeps entries waiting, as it was said
        try:
            while not self._ended.is_set():
                with self._changed:
                    self._changed.wait_for(lambda: self._points or self._files or self._ended.is_set())
                before = self._sent
                failures = [self._send(lane) for lane in (self._points, self._files)]
                failed = next((error for error in failures if error is not None), None)
                if failed is None:
                    if away and not (self._points or self._files):
                        self._say(f"{away} is back: {self._sent - sent_before} entries that waited are sent")
                    pause, away = 0.0, ""
                    continue
                sent_before = sent_before if away else before
                if isinstance(failed, RunStorageError):
                    if away != _STORAGE:
                        away = _STORAGE
                        self._say(
                            f"{away} {self._run.uri} fails: {failed}\nnothing is sent to MLflow while it cannot "
                            "tell whether another driver has taken the run; the run goes on, and what it logs waits"
                        )
                elif away != _MLFLOW:
                    away = _MLFLOW
                    self._say(
                        f"{away} is away: {shown(failed)}\nthe run goes on; what it logs is kept in "
                        f"{self._run.uri}/{FOLDER} and sent once {away} is back"
                    )
                    self._keep()
                pause = min(2 * pause or 0.5, _LONGEST_PAUSE_S)
                self._ended.wait(pause)
        except LeaseLostError:
            self._end()  # the workers hear of it from their `Watch`; those of the new driver log all this again

    def _send(self, lane: deque[_Waiting]) -> Exception | None:
        """Send what waits in a lane, in order; the error at which it stopped."""
        while not self._ended.is_set():
            with self._changed:
                if not lane:
                    return None
                item = lane[0]
            try:
                self._send_or_set_aside(item)
            except LeaseLostError:
                raise
            except Exception as error:
                return error
            with self._changed:
                lane.popleft()
                self._was_sent(item)
                self._sent += 1
                self._changed.notify_all()
            self._delete_sent()
        return None

    def _send_or_set_aside(self, item: _Waiting) -> None:
        """If MLflow refuses an entry though it takes others of this run, the entry must not block these."""
        try:
            item.entry.send(self._tracker)
        except Exception as error:
            if not refuses(error) or not self._tracker.is_active():
                raise
            try:
                with self._writing:
                    member = self._write(REFUSED, [item])
            except OSError as full:
                raise RunStorageError(str(full)) from full
            self._say(
                f"MLflow refused an entry, which is kept in {self._run.uri}/{member} and not sent "
                f"again: {shown(error)}"
            )

    def _keep(self) -> None:
        try:
            self.flush()
        except OSError as error:  # tried again before each checkpoint
            self._say(f"{self._run.uri}/{FOLDER} cannot be written either: {error}")

    def _say(self, line: str) -> None:
        print(line, flush=True)


def holds_entries(run: Storage) -> bool:
    """Whether something in a run's folder waits for MLflow."""
    return bool(_members(run))


def say_unsent(run: Storage) -> None:
    """Tell how many entries wait in a run's folder for MLflow, if there are some."""
    try:
        count = sum(len(_read(run, f"{FOLDER}/{name}")) for name in _members(run))
    except OSError as error:
        print(f"{run.uri}/{FOLDER} could not be read: {error}", flush=True)
        return
    if count:
        print(
            f"MLflow does not have {count} entries of this run yet: they are kept in {run.uri}/{FOLDER}, and the "
            "same command, given again, sends them",
            flush=True,
        )


def _members(run: Storage) -> list[str]:
    return [name for name in run.names(FOLDER) if name.endswith(".jsonl") and not name.startswith(".")]


def _read(run: Storage, member: str) -> list[Points | Tag | Running | File]:
    return [_ENTRY.validate_json(line) for line in run.read_bytes(member).splitlines()]
