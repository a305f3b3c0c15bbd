"""How a stage's command is run: as a process of this machine, or as a job of a Ray cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, Self

from arvideo_dist.processes import process_identity
from jobs.stages import MODULES, Ledger, Stage

_AGAIN = 75
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0
_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


class Runner(ABC):
    """Runs commands until it is told to leave: by SIGTERM, or Ctrl-C."""

    def __init__(self) -> None:
        self.leaving = False
        self._pause_s = _FIRST_PAUSE_S

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._leave) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @abstractmethod
    def run(self, stage: Stage, ledger: Ledger) -> int:
        """The exit code of the stage's command."""

    @abstractmethod
    def tell(self, number: int) -> None:
        """Tell the command that runs to leave; `number`: the signal that was received."""

    def pause(self) -> bool:
        """Before a command is started again: longer each time. Whether the runner was told to leave meanwhile."""
        until, self._pause_s = time.monotonic() + self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        while not self.leaving and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return self.leaving

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leaving = True
        self.tell(number)


class LocalRunner(Runner):
    """Processes of this machine. One that outlives a killed pipeline is told to leave, too."""

    def __init__(self) -> None:
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, stage: Stage, ledger: Ledger) -> int:
        self._wait_for_the_end_of(ledger.get("process"))
        if self.leaving:
            return _AGAIN
        command = [sys.executable, "-m", MODULES[stage.command], *stage.arguments]
        with subprocess.Popen(command, preexec_fn=_leave_with_parent) as self._process:
            ledger.set("process", process_identity(self._process.pid))
            if self.leaving:  # told while the process began
                self.tell(signal.SIGTERM)
            code = self._process.wait()
        self._process = None
        ledger.set("process", None)
        return code if code >= 0 else 128 - code

    def _wait_for_the_end_of(self, process: str | None) -> None:
        """Of a command of a pipeline that was killed: two would meet at the same run."""
        if process is None:
            return
        pid = int(process.split("/")[-2])
        if process_identity(pid) == process:
            print(f"waits for process {pid}, which a pipeline before this one has started", flush=True)
        while process_identity(pid) == process and not self.leaving:
            time.sleep(_LOOK_S)

    def tell(self, number: int) -> None:
        # Ctrl-C comes to the whole foreground group: a second signal would end the command without a checkpoint.
        if self._process is not None and number != signal.SIGINT:
            self._process.terminate()


def _leave_with_parent() -> None:
    """In the new process: it gets SIGTERM if the pipeline is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class RayRunner(Runner):
    """Jobs of the Ray cluster at `address`; a job that outlives the pipeline is gone on with."""

    def __init__(self, address: str) -> None:
        super().__init__()
        from ray.job_submission import JobSubmissionClient

        self._client: Any = JobSubmissionClient(address)
        self._job: str | None = None

    def run(self, stage: Stage, ledger: Ledger) -> int:
        self._job = ledger.get("job") or self._submit(stage)
        ledger.set("job", self._job)
        try:
            code = self._follow(self._job)
        finally:
            if not self.leaving:
                ledger.set("job", None)
            self._job = None
        return code

    def _submit(self, stage: Stage) -> str:
        job: str = self._client.submit_job(
            entrypoint=str(stage),
            runtime_env={"working_dir": os.getcwd(), "excludes": ["runs", "build", ".venv"]},
        )
        return job

    def _follow(self, job: str) -> int:
        """Print the job's log as it grows; its exit code, 75 if it was stopped."""
        shown = 0
        while True:
            info = self._client.get_job_info(job)
            log = self._client.get_job_logs(job)
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if info.status.is_terminal():
                break
            time.sleep(2 * _LOOK_S)
        if str(info.status) == "SUCCEEDED":
            return 0
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        return _AGAIN if str(info.status) == "STOPPED" else 1

    def tell(self, number: int) -> None:
        if self._job is not None:
            self._client.stop_job(self._job)
