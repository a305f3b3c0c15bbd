"""What a rank is doing, for its `Heartbeat` to tell.

The step loop says what it begins (`alone`, `together`), long work that it advances (`tick`). That costs an
assignment, takes no lock, and waits for nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

_DETAIL_AFTER_S = 5.0  # of waiting; before that nobody asks what for


class _Phase(NamedTuple):
    name: str
    together: bool
    meetings: int
    began: float
    detail: Callable[[], str] | None


class Reading(NamedTuple):
    """What a rank does now; fields as in `monitor.Beat`."""

    step: int
    phase: str
    together: bool
    meetings: int
    idle_s: float


class Activity:
    """What this process is doing. Written by the step loop, read by the heartbeat's thread."""

    def __init__(self) -> None:
        self.step = 0  # optimiser steps done
        self.total_steps: int | None = None  # of the run, once it is known
        self.spoke_at = time.monotonic()
        self._ticked = 0.0
        self._phase = _Phase("starts", False, 0, time.monotonic(), None)

    def alone(self, name: str, detail: Callable[[], str] | None = None) -> None:
        """Begin what no other rank is needed for. `detail`: asked what exactly it waits for, if it takes long."""
        self._phase = _Phase(name, False, self._phase.meetings, time.monotonic(), detail)

    def together(self, name: str) -> None:
        """Begin what needs all ranks; all begin the same ones in the same order."""
        self._phase = _Phase(name, True, self._phase.meetings + 1, time.monotonic(), None)

    def tick(self) -> None:
        """The work in hand, or one in the background that the phase waits for, has advanced."""
        self._ticked = time.monotonic()

    def spoke(self) -> None:
        """The run has told a person something (`pulse.py`)."""
        self.spoke_at = time.monotonic()

    def reading(self) -> Reading:
        phase, ticked = self._phase, self._ticked
        idle = time.monotonic() - max(phase.began, ticked)
        name = phase.name
        if phase.detail is not None and idle > _DETAIL_AFTER_S:
            with contextlib.suppress(Exception):  # the sign of life goes before its details
                name = f"{name}: {phase.detail()}"
        return Reading(self.step, name, phase.together, phase.meetings, idle)


activity = Activity()
