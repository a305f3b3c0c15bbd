"""Whether a run hangs, who is to blame, and its end: a small actor on the driver's node that hears all ranks.

    ranks' threads ── beat: what it does, for how long ──▶ Monitor ── no rank advances: Hang ──▶ driver's thread
                   ◀── order to leave stacks and end ─────                                       says and notes why
    mute ranks     ◀── state and stacks are read, then SIGKILL: a task on each one's node ─────────────┘

Training is synchronous, so one rank that hangs stops all within a step, and as long as any rank advances nothing
hangs. What ends the ranks lets the driver start new ones from the latest checkpoint.

    <run>/hangs/<generation>-<time>/reason.txt        what was decided and what every rank was doing
    <run>/hangs/<generation>-<time>/rank-00001.txt    stacks of all threads of a rank and its decode workers
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from arvideo_dist.storage import shown

if TYPE_CHECKING:
    from arvideo_dist.train.lease import Guard

FOLDER = "hangs"
TAG = "arvideo.last_hang"
_NAMED_RANKS = 8  # in a line for a person; the file has all
_ANSWER_S = 2.0  # for the actor, which does nothing that takes time
_AUTOPSY_S = 60.0  # for a task on the node of a rank that is mute; where the node is gone it never runs


def seconds_between_beats(hung_s: float) -> float:
    """Between two beats of a rank. At the default 1000 ranks make 200 small calls a second."""
    return min(5.0, max(0.5, hung_s / 60))


@dataclass(frozen=True)
class Beat:
    """What one rank says of itself."""

    group: str  # the set of workers that it belongs to
    rank: int
    world_size: int
    node: str  # Ray's id
    host: str
    pid: int
    process: str | None  # `process_identity`: what makes the PID unique
    step: int  # optimiser steps done
    phase: str
    together: bool  # the phase needs the other ranks
    meetings: int  # phases begun that need the other ranks: the same number on all ranks that are equally far
    idle_s: float  # since it advanced last
    left: bool = False  # its last words

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class Order:
    """What a rank of a run that hangs shall do: leave its stacks in `folder` of the run, and end."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Hang:
    """A run that does not advance."""

    reason: str  # one line
    table: str  # a line for every rank
    guilty: tuple[int, ...]
    mute: tuple[Beat, ...]  # the last beats of ranks that say nothing any more
    live: bool  # whether any rank still says something
    folder: str = ""


def judge(
    heard: Iterable[tuple[Beat, float]], world_size: int, waited_s: float, hung_s: float
) -> Hang | None:
    """The hang, if no rank has advanced for `hung_s`.

    `heard`: each rank's last beat and the seconds since it came. `waited_s`: since the first beat of this set of
    workers, for ranks that never sent one. To blame are, the first that there are: ranks that say nothing any
    more; ranks that never said anything; ranks that have begun fewer of the phases that need all; ranks that are in
    a phase of their own while others wait for them; else all.
    """
    beats = {beat.rank: (beat, ago) for beat, ago in heard}
    present = {rank: (beat, ago) for rank, (beat, ago) in beats.items() if not beat.left}
    missing = sorted(set(range(world_size)) - beats.keys())
    idle = [beat.idle_s + ago for beat, ago in present.values()] + [waited_s] * len(missing)
    if not idle or min(idle) < hung_s:
        return None
    mute = [beat for beat, ago in present.values() if ago >= hung_s / 2]
    live = [beat for beat, ago in present.values() if ago < hung_s / 2]
    if mute:
        guilty = [beat.rank for beat in mute]
        blame = ", ".join(
            f"{beat} has sent no heartbeat for {present[beat.rank][1]:.0f} s (stopped, hung with Python's lock "
            f"held, or its node is unreachable), last {_doing(beat)}"
            for beat in mute[:_NAMED_RANKS]
        )
    elif missing:
        guilty = missing
        blame = f"{name_ranks(missing)} never sent a heartbeat since the workers began"
    else:
        behind = [beat for beat in live if beat.meetings == min(beat.meetings for beat in live)]
        if len(behind) == len(live) and any(beat.together for beat in live):
            behind = [beat for beat in live if not beat.together] or behind
        guilty = [beat.rank for beat in behind]
        blame = ", ".join(
            f"{beat} {_doing(beat)} for {present[beat.rank][0].idle_s + present[beat.rank][1]:.0f} s"
            for beat in behind[:_NAMED_RANKS]
        )
    if len(guilty) > _NAMED_RANKS and not (missing and not mute):
        blame += f", and {len(guilty) - _NAMED_RANKS} more"
    others = [beat for beat in live if beat.rank not in guilty]
    waiting: dict[str, list[int]] = {}
    for beat in others:
        waiting.setdefault(_doing(beat), []).append(beat.rank)
    rest = "".join(f"; {name_ranks(ranks)} {doing}" for doing, ranks in list(waiting.items())[:_NAMED_RANKS])
    lines = [
        f"rank {rank:5}  {beat.host}  pid {beat.pid}  step {beat.step}  {beat.phase}, "
        f"{'left' if beat.left else f'{beat.idle_s + ago:.0f} s'}, heard {ago:.0f} s ago"
        for rank, (beat, ago) in sorted(beats.items())
    ]
    return Hang(
        reason=f"no rank has made progress for run.hung_s {hung_s:g}: {blame}{rest}",
        table="\n".join([*lines, *(f"rank {rank:5}  never heard" for rank in missing)]),
        guilty=tuple(sorted(guilty)),
        mute=tuple(mute),
        live=bool(live),
    )


def _doing(beat: Beat) -> str:
    return f"in {beat.phase!r} after step {beat.step}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks in stretches: ranks 0-5, 7."""
    stretches: list[list[int]] = []
    for rank in sorted(ranks):
        if stretches and stretches[-1][1] == rank - 1:
            stretches[-1][1] = rank
        else:
            stretches.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in stretches)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


@dataclass
class _Group:
    """One set of workers, as far as it was heard."""

    name: str
    world_size: int
    began: float
    heard: dict[int, tuple[Beat, float]] = field(default_factory=dict)
    order: Order | None = None


class Monitor:
    """The actor. It keeps one beat a rank and nothing else, so it may start again at any time."""

    def __init__(self, hung_s: float, generation: int) -> None:
        self._hung_s, self._generation = hung_s, generation
        self._group: _Group | None = None
        self._past: set[str] = set()  # sets of workers that were replaced

    async def beat(self, beat: Beat) -> Order | None:
        """Hear a rank; what it shall do, if it shall end."""
        now = time.monotonic()
        if beat.group in self._past:
            return None  # a last word of one that is being ended
        if self._group is None or self._group.name != beat.group:
            if self._group is not None:
                self._past.add(self._group.name)
            self._group = _Group(beat.group, beat.world_size, now)
        self._group.heard[beat.rank] = beat, now
        return self._group.order

    async def has_heard(self, group: str) -> bool:
        """Whether a rank of this set of workers has said anything."""
        return group in self._past or (self._group is not None and self._group.name == group)

    async def next_hang(self) -> Hang:
        """Wait until the run hangs; from then on every rank of it is told to end."""
        every = seconds_between_beats(self._hung_s)
        slept = time.monotonic()
        while True:
            await asyncio.sleep(every)
            now = time.monotonic()
            late, slept = now - slept - every, now
            group = self._group
            if group is None or group.order is not None:
                continue
            if late > every:  # this process was held up itself, and heard nobody meanwhile
                group.began += late
                group.heard = {rank: (beat, at + late) for rank, (beat, at) in group.heard.items()}
            heard = [(beat, now - at) for beat, at in group.heard.values()]
            hang = judge(heard, group.world_size, now - group.began, self._hung_s)
            if hang is not None:
                when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
                folder = f"{FOLDER}/{self._generation:08d}-{when}"
                group.order = Order(folder, hang.reason)
                return replace(hang, folder=folder)


def autopsy(pid: int, identity: str | None) -> str | None:
    """Runs on the node of a rank that is mute: its state and stacks, then the process is killed; None if it had
    ended before."""
    from arvideo_dist import stacks
    from arvideo_dist.train.lease import process_identity

    try:
        process = psutil.Process(pid)
        if process_identity(pid) != identity:
            return None
        found = stacks.of_tree(pid)
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return None
    return found


class HangWatch:
    """The driver's side, a context within `ray.init`: starts the monitor; says, notes and ends what hangs."""

    def __init__(self, hung_s: float, guard: Guard, note: Callable[[str, str], None]) -> None:
        """`note(tag, value)`: called in a thread with each hang's reason; what it raises is printed."""
        import ray

        self._guard, self._note = guard, note
        self._set = 0  # number of the set of workers that the driver has started last
        self._name = ""  # what its ranks call it
        self._reason: tuple[int, str] | None = None  # why a set was ended
        self._ended = threading.Event()
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=_on(_this_node()))(Monitor)
        self.monitor = actor.remote(hung_s, guard.generation)
        self._thread = threading.Thread(target=self._keep, name="hang watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        self._ended.set()
        if ray.is_initialized():  # else the call would start Ray
            with contextlib.suppress(Exception):  # Ray may be what was lost
                ray.kill(self.monitor)  # which ends the thread's waiting
        self._thread.join(5)

    def new_workers(self) -> str:
        """The driver starts another set, of the name that is returned.

        What is found out of an older one is no reason for the end of this one.
        """
        self._set += 1  # while `_end_mute` may still wait for a node of the older one that is unreachable
        self._name = uuid.uuid4().hex
        return self._name

    def have_begun(self) -> bool:
        """Whether the workers of the newest set run; True where nobody knows."""
        import ray

        try:
            return bool(ray.get(self.monitor.has_heard.remote(self._name), timeout=_ANSWER_S))
        except Exception:
            return True

    def reason(self) -> str | None:
        """Why the workers were ended, if that was a hang."""
        of_set, reason = self._reason or (None, None)
        return reason if of_set == self._set else None

    def _keep(self) -> None:
        import ray

        while not self._ended.is_set():
            try:
                hang = ray.get(self.monitor.next_hang.remote())
            except ray.exceptions.RayError:  # it starts again
                self._ended.wait(1)
                continue
            of_set = self._set
            ends = {} if hang.live else self._end_mute(hang)
            if ends and all(found is None for found in ends.values()):
                continue  # they had been killed, and new workers wait for room: no hang, however long that takes
            reason = f"{hang.reason}; stacks are in {self._guard.run_uri}/{hang.folder}"
            self._reason = of_set, reason
            print(f"the run hangs: {reason}", flush=True)
            self._write(hang.folder, "reason.txt", f"{hang.reason}\n\n{hang.table}\n")
            for beat, found in (ends or self._end_mute(hang)).items():
                text = found or "its process or its node has ended\n"
                print(f"{beat}: {text.splitlines()[0]}", flush=True)
                name = f"rank-{beat.rank:05d}.txt"
                self._write(hang.folder, name, f"{hang.reason}\n\nrank {beat.rank}\n\n{text}")
            try:
                self._note(TAG, reason)
            except Exception as error:
                print(f"the hang was not noted in MLflow: {shown(error)}", flush=True)

    def _end_mute(self, hang: Hang) -> dict[Beat, str | None]:
        """What an autopsy found of each mute rank, whose process has ended after it."""
        import ray

        tasks = {
            ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=_on(beat.node))(autopsy).remote(
                beat.pid, beat.process
            ): beat
            for beat in hang.mute
        }
        if not tasks:
            return {}
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_AUTOPSY_S)
        found: dict[Beat, str | None] = {}
        for task, beat in tasks.items():
            if task not in done:
                found[beat] = f"its node {beat.node} did not answer within {_AUTOPSY_S:g} s\n"
                continue
            try:
                found[beat] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                found[beat] = f"its process may not have ended: {error}\n"
            except ray.exceptions.RayError:  # Ray knows that the node is gone
                found[beat] = None
        return found

    def _write(self, folder: str, name: str, text: str) -> None:
        """In a thread of its own: the store may be what hangs, and the ranks must be ended all the same."""

        def write() -> None:
            with contextlib.suppress(Exception):  # what it says was printed
                self._guard.storage().write_bytes(f"{folder}/{name}", text.encode())

        threading.Thread(target=write, name="hang report", daemon=True).start()


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()
