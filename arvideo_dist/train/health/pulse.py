"""A line at least every minute: what the run is doing while no other line is due.

Rank 0's thread reads what the step loop says anyway (`activity.py`): it asks neither the device nor another rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from arvideo_dist.threads import BlockThread
from arvideo_dist.train.health.activity import Activity

EVERY_S = 60.0


class Pulse(BlockThread):
    """Says a line if the run has said none for `every_s` seconds, until the `with` block ends."""

    def __init__(self, activity: Activity, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._activity, self._say, self._every_s = activity, say, every_s
        super().__init__("pulse")

    def _keep(self) -> None:
        self._activity.spoke()
        while self._pause(self._left_s()):
            if self._left_s() <= 0:
                self._activity.spoke()
                self._say(pulse_line(self._activity))

    def _left_s(self) -> float:
        return max(0.0, self._activity.spoke_at + self._every_s - time.monotonic())


def pulse_line(activity: Activity) -> str:
    """For the terminal."""
    reading = activity.reading()
    steps = f"step {reading.step}" + ("" if activity.total_steps is None else f"/{activity.total_steps}")
    since = f", for {reading.idle_s:.0f} s" if reading.idle_s >= 1 else ""
    return f"{steps} done; now: {reading.phase}{since}"
