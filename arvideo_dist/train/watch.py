"""Whether a run shall be interrupted: the driver's word, a lost lease, Ray's preemption notice.

Rank 0 reads the lease in a thread. What it heard, and the times at which all ranks ask Ray Train for a notice,
ride on a reduction that each step makes anyway, so the answer is the same on all ranks and costs a step nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from arvideo_dist.train.lease import Guard, LeaseLostError
from arvideo_dist.train.stop import Interruption, RunStoppedError

LEASE_POLL_S = 2.0
NOTICE_POLL_S = 5.0  # Ray Train itself asks its cluster this often


class Notice(Protocol):
    """What Ray Train says of nodes that are about to go (`ray.train.PreemptionInfo`)."""

    deadline_ms: int | None
    preempted_node_to_ranks: dict[str, list[int]]


class Watch:
    """One rank's part; every method but `due` is collective."""

    def __init__(self, guard: Guard, control: dist.ProcessGroup, notice: Callable[[], Notice | None]) -> None:
        """Collective. `notice`: asked on all ranks together (`ray.train.get_preemption_info`).

        Raises RunStoppedError on all ranks where another driver has taken the run.
        """
        self._guard, self._control, self._ask_ray = guard, control, notice
        self._lost: str | None = None
        self._stop: str | None = None
        self._next_notice = 0.0
        self._leads = dist.get_rank() == 0
        if self._leads:
            self._read_lease()
        self._hear()
        if self._leads:
            threading.Thread(target=self._keep_reading, name="lease watch", daemon=True).start()

    def due(self) -> bool:
        """Whether this rank wants all ranks to `look` at this step."""
        if not self._leads:
            return False
        return self._lost is not None or self._stop is not None or time.monotonic() >= self._next_notice

    def look(self, step: int) -> Interruption | None:
        """The interruption to obey before the next step, if there is one; `step`: optimiser steps done.

        Raises RunStoppedError on all ranks where another driver has taken the run.
        """
        self._next_notice = time.monotonic() + NOTICE_POLL_S
        notice = self._ask_ray()
        stop = self._hear()
        if stop is not None:
            return Interruption(stop, step)
        if notice is not None:
            nodes = tuple(sorted(notice.preempted_node_to_ranks))
            ranks = sorted(rank for ranks in notice.preempted_node_to_ranks.values() for rank in ranks)
            reason = f"preemption notice for the nodes of ranks {', '.join(map(str, ranks))}"
            return Interruption(reason, step, nodes, notice.deadline_ms)
        return None

    def _hear(self) -> str | None:
        heard: list[Any] = [(self._lost, self._stop)]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        lost, stop = heard[0]
        if lost is not None:
            raise RunStoppedError(lost)
        return stop

    def _keep_reading(self) -> None:
        while self._lost is None:
            time.sleep(LEASE_POLL_S)
            self._read_lease()

    def _read_lease(self) -> None:
        try:
            self._guard.check()
            self._stop = self._guard.stop_asked()
        except LeaseLostError as error:
            self._lost = str(error)
        except OSError as error:  # every write looks again, so a store that fails for a while does no harm
            print(f"the run's lease could not be read: {error}", flush=True)
