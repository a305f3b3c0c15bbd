"""How a run ends for good, and how it is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from arvideo_dist.storage import Storage, is_full

RESULT = "result.json"  # in the run's folder, once the run has ended: its final metrics


class RunStoppedError(RuntimeError):
    """The run cannot go on, and a restart would meet the same; raised on all ranks together.

    Anything else that a worker raises is taken for a fault of its machine and restarts the workers.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        """`passing`: later the same command may find it gone, without anybody's help."""
        super().__init__(message)
        self.passing = passing


class StoreAwayError(RunStoppedError):
    """The run's store shows less than was seen there: the driver waits for it and starts workers again.

    Raised on all ranks together.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, passing=True)


@contextlib.contextmanager
def stops_if_full(run: Storage) -> Iterator[None]:
    """RunStoppedError if there is no room for the result of a run that is done and saved."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise RunStoppedError(
            f"the run is done and saved, but {run.uri} takes no result: {error}. Make room there; the same command "
            "ends the run"
        ) from error


@dataclass(frozen=True)
class Stopped:
    """What a worker leaves to the driver if it raised RunStoppedError."""

    reason: str
    passing: bool
    store_away: bool = False

    @classmethod
    def because(cls, error: RunStoppedError) -> Stopped:
        return cls(str(error), error.passing, isinstance(error, StoreAwayError))

    def error(self) -> RunStoppedError:
        """As it was raised by the worker."""
        return (
            StoreAwayError(self.reason)
            if self.store_away
            else RunStoppedError(self.reason, passing=self.passing)
        )


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
