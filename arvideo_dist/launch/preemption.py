"""The driver's side of being asked to leave: SIGTERM and Ctrl-C.

A signal is only noted. An exception that a handler raises is lost within Ray's blocking calls, so these run in a
thread of their own, and the main thread, which alone gets signals, waits for that thread and looks what was noted.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from arvideo_dist.train.run.lease import Lease
from arvideo_dist.train.run.stop import RunInterruptedError

POLL_S = 0.25
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
_T = TypeVar("_T")


class Background(Generic[_T]):
    """A call in a thread of its own, which the end of the process does not wait for."""

    def __init__(self, call: Callable[[], _T], name: str) -> None:
        self.done = threading.Event()
        self._call = call
        self._result: _T
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self) -> _T:
        """What the call returned or raised; `done` must be set."""
        assert self.done.is_set()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # whatever it is, the caller of `result` gets it
            self._error = error
        finally:
            self.done.set()


class Signals:
    """Within the block SIGTERM and Ctrl-C ask the run to end; main thread only.

    Before `watch_over` the first one raises RunInterruptedError, within it the workers are asked to save, after it
    the command is about to end anyway. A further one never waits.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._reason = ""
        self._grace_s: float | None = None  # once workers may have something to save
        self._ends = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._before = self._listen()
        return self

    def _listen(self) -> dict[signal.Signals, Any]:
        return {number: signal.signal(number, self._note) for number in _NAMES}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch_over(self, call: Callable[[], _T], lease: Lease, grace_s: float) -> _T:
        """What `call` returns or raises; it runs in a thread and hears of signals by `lease.stop_reason`.

        RunInterruptedError as soon as a second signal comes, or if `call` goes on for `grace_s` after the first.
        """
        self._grace_s = grace_s
        try:
            return self._wait_for(Background(call, "driver"), lease, grace_s)
        finally:
            self._ends, self._heard = True, 0

    def _wait_for(self, work: Background[_T], lease: Lease, grace_s: float) -> _T:
        asked_at = None
        while not work.done.wait(POLL_S):
            # Ray, when it is started by the thread, puts a handler of its own before Python's, which aborts the
            # process three seconds after a SIGTERM.
            self._listen()
            if not self._heard:
                continue
            if asked_at is None:
                asked_at = time.monotonic()
                lease.ask_to_stop(self._reason)
            if self._heard > 1:
                raise RunInterruptedError(
                    f"{self._reason}, and a second signal: ended at once, without a save; the same command "
                    "continues from the latest complete checkpoint"
                )
            if time.monotonic() > asked_at + grace_s:
                raise RunInterruptedError(
                    f"{self._reason}: the workers did not save within run.preemption_grace_s {grace_s:g}; the same "
                    "command continues from the latest complete checkpoint"
                )
        return work.result()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """The handler. It takes no lock that the main thread may hold, and so does not print either."""
        self._heard += 1
        if self._heard > (1 if self._ends or self._grace_s is None else 2):
            os._exit(os.EX_TEMPFAIL)  # even the ending takes too long
        # Not print, which must not be entered again if the signal met it.
        if self._ends:
            os.write(1, b"the command is about to end; another signal ends it at once\n")
            return
        if self._heard > 1:
            os.write(1, b"a second signal: the run ends at once, without a save\n")
            return
        self._reason = _NAMES[signal.Signals(signum)]
        if self._grace_s is None:
            raise RunInterruptedError(
                f"{self._reason} before any worker was started; the same command starts it again"
            )
        line = f"{self._reason}: the workers save at their next step, within {self._grace_s:g} s; "
        os.write(1, f"{line}a second signal ends the run at once, without that\n".encode())


def stop_if_asked(lease: Lease) -> None:
    """RunInterruptedError if the run is asked to stop while no workers run."""
    if lease.stop_reason:
        raise RunInterruptedError(
            f"{lease.stop_reason} while no workers ran; the same command continues from the latest complete "
            "checkpoint"
        )


def wait_to_restart(lease: Lease, seconds: float) -> None:
    """Wait before workers start again; RunInterruptedError as soon as the run is asked to stop meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        stop_if_asked(lease)
        time.sleep(min(left, POLL_S))
