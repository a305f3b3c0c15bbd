"""What SIGTERM and Ctrl-C do to the driver: noted by a handler, acted upon by its main thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from arvideo_dist.launch.preemption import Signals, wait_to_restart
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.lease import Lease, acquire
from arvideo_dist.train.run.stop import RunInterruptedError


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    with acquire(Storage(str(tmp_path)), lease_s=600) as lease:
        yield lease


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_before_the_workers_ends_the_command_at_once(number: signal.Signals, name: str) -> None:
    before = signal.getsignal(number)
    with pytest.raises(RunInterruptedError, match=f"{name} before any worker was started"), Signals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_driver_waits_within_a_call_ends_that_wait(
    lease: Lease, number: signal.Signals
) -> None:
    def wait_for_nodes() -> None:
        os.kill(os.getpid(), number)
        wait_to_restart(lease, 24 * 3600)

    with Signals() as signals, pytest.raises(RunInterruptedError, match="while no workers ran"):
        signals.watch_over(wait_for_nodes, lease, grace_s=3600)


def test_workers_that_leave_after_a_signal_decide_how_the_run_ends(lease: Lease) -> None:
    def save() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        while not lease.stop_reason:
            pass
        return "saved"

    with Signals() as signals:
        assert signals.watch_over(save, lease, grace_s=3600) == "saved"
        os.kill(os.getpid(), signal.SIGINT)  # the command is about to end: one more changes nothing


def test_a_second_signal_does_not_wait_for_the_save(lease: Lease) -> None:
    def hang() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not lease.stop_reason:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()

    with Signals() as signals, pytest.raises(RunInterruptedError, match="a second signal: ended at once"):
        signals.watch_over(hang, lease, grace_s=3600)


def test_workers_that_do_not_save_within_the_grace_are_left(lease: Lease) -> None:
    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    with Signals() as signals, pytest.raises(RunInterruptedError, match=r"did not save within .* 0\.1"):
        signals.watch_over(hang, lease, grace_s=0.1)


def test_what_the_call_raises_is_raised_in_the_main_thread(lease: Lease) -> None:
    def fail() -> None:
        raise ValueError("told")

    with Signals() as signals, pytest.raises(ValueError, match="told"):
        signals.watch_over(fail, lease, grace_s=1)
