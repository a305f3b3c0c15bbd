"""A run never goes backwards by itself: a store that shows less of a run than was seen there is away.

The newest step of which anybody saw a checkpoint is known to the driver, stands in its lease's record and in MLflow
(`CHECKPOINT_TAG`), and is given to each set of workers. An unmounted disk is an empty folder, and a bucket can
answer with an empty listing: whoever finds no checkpoint, or only older ones, trains and writes nothing, but waits.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from arvideo_dist.storage import Storage, lasts, patiently
from arvideo_dist.train.checkpoint.layout import FOLDER, checkpoint_name, newest_step
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import Guard, LeaseLostError, recorded_step
from arvideo_dist.train.run.stop import RunStoppedError, StoreAwayError

CHECKPOINT_TAG = "arvideo.newest_checkpoint"  # of the MLflow run: the step of its newest checkpoint
# How long a driver waits for a store that is away, and between two looks at it.
AWAY_S = 3600.0
PAUSE_S = 5.0
# How long workers look before they leave and the driver waits for them: a blink costs no new workers, and an NFS
# client may show a listing that is a minute old.
_WORKERS_PATIENCE_S = 90.0


def not_seen_again(run: Storage, newest: int, seen: int) -> str | None:
    """What to say if the newest step that `run` shows, 0 for none, is older than one that was `seen` there."""
    if newest >= seen:
        return None
    shows = f"shows no checkpoint newer than {checkpoint_name(newest)}" if newest else "shows no checkpoint"
    return (
        f"{run.uri}/{FOLDER} {shows} on {socket.gethostname()}, but {checkpoint_name(seen)} was seen there: the "
        "store is taken to be away, and nothing is trained or written without it. Mount it, or bring the bucket "
        "back. If the checkpoints were deleted on purpose, choose another run.name, or delete the rest of the "
        "run's folder and its run in MLflow"
    )


def look(run: Storage, seen: int) -> None:
    """Raises OSError, which time may mend, if the store shows less than was `seen` there."""
    if seen and (away := not_seen_again(run, newest_step(run), seen)):
        raise OSError(away)


def look_from_all_ranks(guard: Guard, seen: int, control: dist.ProcessGroup) -> None:
    """Collective, before anything of the run is read: every rank's machine sees the run as the driver does.

    A run that has no checkpoint yet is not looked at. Raises StoreAwayError on all ranks.
    """
    if not seen:
        return

    def look_once() -> None:
        # To wait for a store is no hang.
        activity.tick()
        guard.check()
        look(Storage(guard.run_address), seen)

    fault: tuple[str, bool] | None = None
    try:
        patiently(look_once, _WORKERS_PATIENCE_S)
    except OSError as error:
        fault = f"rank {dist.get_rank()}: {error}", lasts(error)
    except LeaseLostError as error:
        fault = str(error), True
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault, group=control)
    found = [fault for fault in faults if fault is not None]
    if lasting := [told for told, for_good in found if for_good]:
        raise RunStoppedError(lasting[0])
    if found:
        more = f" (and {len(found) - 1} more ranks)" if found[1:] else ""
        raise StoreAwayError(f"{found[0][0]}{more}")


def wait_until_seen_again(run: Storage, seen_by_mlflow: Callable[[], int]) -> int:
    """The driver, before it writes anything: wait until `run` shows what the last driver, or MLflow, saw there.

    Returns the newest step of which they saw a checkpoint, 0 for none. Raises OSError if the store stays away for
    `AWAY_S`. A signal ends the wait (`preemption.Signals`).
    """
    seen, said = max(recorded_step(run), seen_by_mlflow()), False
    until = time.monotonic() + AWAY_S
    while True:
        try:
            look(run, seen)
            return seen
        except OSError as error:
            if lasts(error) or time.monotonic() + PAUSE_S > until:
                raise
            if not said:
                print(
                    f"the run waits for its storage, for up to {AWAY_S / 60:g} minutes: {error}", flush=True
                )
                said = True
        time.sleep(PAUSE_S)


class Patience:
    """Bounds how often workers start again that do not find what was seen, on a machine other than the driver's."""

    def __init__(self) -> None:
        self._began, self._step = 0.0, -1

    def left_again(self, error: StoreAwayError, seen: int) -> None:
        """Workers left with `error`; `seen`: the newest step now. Raises it after `AWAY_S` without a new one."""
        if seen != self._step:
            self._began, self._step = time.monotonic(), seen
        if time.monotonic() - self._began > AWAY_S:
            raise error
        minutes = AWAY_S / 60
        print(f"new workers wait for storage, for up to {minutes:g} minutes: {error}", flush=True)
