"""What a check found, and how a check that met a passing fault is tried again."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from arvideo_dist.storage import lasts

WAITS_S = (1.0, 2.0, 4.0, 8.0)


class Level(enum.IntEnum):
    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """The result of one check at one place; of a warning or error the message says what to mend."""

    check: str
    level: Level
    message: str
    passing: bool = False  # may go away by itself
    # A store or server cannot be reached now, which is passing; the request may be right.
    away: bool = False
    where: str = ""

    def at(self, where: str) -> Finding:
        return replace(self, where=where)

    def softened(self) -> Finding:
        """An error as a warning."""
        return replace(self, level=min(self.level, Level.WARNING))

    def line(self) -> str:
        return f"{self.check}{f' ({self.where})' if self.where else ''}: {self.message}"


def errors(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.ERROR]


def of_os_error(check: str, error: OSError, remedy: str) -> Finding:
    """An error of a store, marked as passing unless it is one that time does not mend."""
    away = not lasts(error)
    return Finding(check, Level.ERROR, f"{_reason(error)}: {remedy}", passing=away, away=away)


def retried(
    check: Callable[[], list[Finding]],
    say: Callable[[str], None],
    waits_s: tuple[float, ...] = WAITS_S,
) -> list[Finding]:
    """What `check` finds, asked again after each of `waits_s` seconds while an error of it may pass."""
    for wait_s in waits_s:
        found = check()
        passing = [finding for finding in errors(found) if finding.passing]
        if not passing:
            return found
        say(f"{passing[0].line()}; tried again in {wait_s:g} s")
        time.sleep(wait_s)
    return check()


def _reason(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."
