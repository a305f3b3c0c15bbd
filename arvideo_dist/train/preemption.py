"""The driver's side of being asked to leave: SIGTERM, and nodes with a preemption notice."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from arvideo_dist.train.lease import Lease
from arvideo_dist.train.stop import Interruption, RunInterruptedError

_POLL_S = 1.0
_AFTER_DEADLINE_S = 60.0  # a node that Ray drains is counted as alive until its processes have ended


@contextlib.contextmanager
def stop_on_sigterm(lease: Lease, grace_s: float) -> Iterator[None]:
    """Within the block SIGTERM asks the workers to save and end; RunInterruptedError if they take longer.

    Main thread only, after `ray.init`, which sets a handler of its own.
    """

    def ask(signum: int, frame: FrameType | None) -> None:
        lease.ask_to_stop("SIGTERM")
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            signal.setitimer(signal.ITIMER_REAL, grace_s)
        # Not print, which must not be entered again where the signal met it.
        os.write(1, f"SIGTERM: the workers save at their next step, within {grace_s:g} s\n".encode())

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise RunInterruptedError(
            f"SIGTERM: the workers did not save within run.preemption_grace_s {grace_s:g}; the same command "
            "continues from the latest complete checkpoint"
        )

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, ask)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_up)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_to_restart(lease: Lease, seconds: float) -> None:
    """Wait before workers start again; RunInterruptedError as soon as the run is asked to stop meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if lease.stop_reason:
            raise RunInterruptedError(
                f"{lease.stop_reason} while no workers ran; the same command continues from the latest complete "
                "checkpoint"
            )
        time.sleep(min(left, _POLL_S))


def wait_until_gone(interruption: Interruption) -> None:
    """Wait for the nodes that are leaving: Ray Train counts their CPUs and GPUs until they have left."""
    import ray

    until = time.monotonic() + _AFTER_DEADLINE_S
    if interruption.deadline_ms is not None:
        until += max(0.0, interruption.deadline_ms / 1000 - time.time())
    while time.monotonic() < until:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not alive.intersection(interruption.leaving_nodes):
            return
        time.sleep(_POLL_S)
