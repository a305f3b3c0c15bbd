"""How a run ends for good, and how it is interrupted."""

from __future__ import annotations

from dataclasses import dataclass

RESULT = "result.json"  # in the run's folder, once the run has ended: its final metrics


class RunStoppedError(RuntimeError):
    """The run cannot go on, and a restart would meet the same; raised on all ranks together.

    Anything else that a worker raises is taken for a fault of its machine and restarts the workers.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        """`passing`: later the same command may find it gone, without anybody's help."""
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class Stopped:
    """What a worker leaves to the driver where it raised RunStoppedError."""

    reason: str
    passing: bool


class CrashLoopError(RuntimeError):
    """Workers were lost again and again without a new checkpoint; raised by the driver."""


class RunInterruptedError(RuntimeError):
    """The run was asked to end before its end; the same command continues it."""


@dataclass(frozen=True)
class Interruption:
    """Why the workers saved and left before the end of the run."""

    reason: str
    step: int  # optimiser steps done, all of them saved
    # Whether the driver starts other workers: nodes leave, or there is room for more workers.
    goes_on: bool = False
