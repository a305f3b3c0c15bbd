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
import datetime
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


FOLDER = "hangs"
_NAMED_RANKS = 8  # in a line for a person; the file has all


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
