"""Whether a run shall be interrupted: the driver's word, a lost lease, room for more workers, a preemption notice.

Rank 0 alone hears of them: it reads the lease in a thread, and the cluster sends it the notices. That it has heard
something rides on a reduction that each step makes anyway; only then do the ranks meet, and hear the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from arvideo_dist.train.run.lease import Guard, LeaseLostError
from arvideo_dist.train.run.stop import Interruption, RunStoppedError

LEASE_POLL_S = 2.0


class Watch:
    """One rank's part; every method but `due` is collective."""

    def __init__(
        self,
        guard: Guard,
        control: dist.ProcessGroup,
        notice: Callable[[], Sequence[int] | None],
        workers: str = "",
    ) -> None:
        """Collective. `notice`: the ranks whose nodes are about to go, if there are any; asked on rank 0 alone, at
        every step. `workers`: the name of this set, by which the driver may ask it to make way for a wider one.

        Raises RunStoppedError on all ranks if another driver has taken the run.
        """
        self._guard, self._control, self._notice, self._workers = guard, control, notice, workers
        self._lost: str | None = None
        self._failing = False  # the newest look at the lease
        self._stop: str | None = None
        self._widen = self._may_widen = False
        self._steps_begun = 0
        self._leads = dist.get_rank() == 0
        if self._leads:
            self._read_lease()
        self._hear()
        if self._leads:
            threading.Thread(target=self._keep_reading, name="lease watch", daemon=True).start()

    def due(self, *, saves_fail: bool = False) -> bool:
        """Whether this rank wants all ranks to `look` at this step; to be asked before each step.

        `saves_fail`: the last save failed. The workers make way for more only once they have done a step, so that
        the run advances however often nodes come and go, and not while their save may not succeed.
        """
        if not self._leads:
            return False
        self._may_widen = self._steps_begun > 0 and not saves_fail
        self._steps_begun += 1
        if self._widen and self._may_widen:
            return True
        return self._lost is not None or self._stop is not None or self._notice() is not None

    def look(self, step: int) -> Interruption | None:
        """The interruption to obey before the next step, if there is one; `step`: optimiser steps done.

        Raises RunStoppedError on all ranks if another driver has taken the run.
        """
        stop, notice, widen = self._hear()
        if stop is not None:
            return Interruption(stop, step)
        if notice is not None:
            reason = f"preemption notice for the nodes of ranks {', '.join(map(str, notice))}"
            return Interruption(reason, step, goes_on=True)
        if widen:
            return Interruption("the cluster has room for more workers", step, goes_on=True)
        return None

    def _hear(self) -> tuple[str | None, Sequence[int] | None, bool]:
        """What rank 0 knows of a wish to stop, of nodes that leave, and of room for more workers."""
        mine = (
            self._lost,
            self._stop,
            self._notice() if self._leads else None,
            self._widen and self._may_widen,
        )
        heard: list[Any] = [mine if self._leads else None]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        lost, stop, notice, widen = heard[0]
        if lost is not None:
            raise RunStoppedError(lost)
        return stop, notice, widen

    def _keep_reading(self) -> None:
        while self._lost is None:
            time.sleep(LEASE_POLL_S)
            self._read_lease()

    def _read_lease(self) -> None:
        try:
            self._guard.check()
            if (record := self._guard.record()) is not None:
                self._stop, self._widen = record.stop, record.widen == self._workers
        except LeaseLostError as error:
            self._lost = str(error)
        except OSError as error:
            # Every write looks again, so a store that fails for a while does no harm; it is said once.
            if not self._failing:
                print(f"the run's lease could not be read: {error}", flush=True)
            self._failing = True
        else:
            self._failing = False
