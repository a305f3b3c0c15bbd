"""Python processes that need not import torch, DeepSpeed and MLflow again.

`python()` is a path to be used like `sys.executable`: what it starts is forked from one process of the whole
suite that has imported them (server.py). It takes arguments, environment, working directory and open files of
its caller, and is a process of its own in every other way, too. Two things differ: it is no child of its
caller, and modules are as they were when the server imported them, whatever the environment says.

The path is a small script (stub.py) that stands for the process: it passes signals on and ends as the process
does. Where the process's own id matters use `Process`.
"""

from __future__ import annotations

import multiprocessing.spawn
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
# The folder of what all test processes of a session share, and the process whose end is the end of the session.
FOLDER, OWNER = "ARVIDEO_TESTS_FOLDER", "ARVIDEO_TESTS_OWNER"
# Set where processes are to start as they do for users, since it is measured how long they take.
COLD = "ARVIDEO_TESTS_COLD"


def begin_session(*, cold: bool = False) -> None:
    """Called in every test process; what it sets is inherited by the others. `cold`: nothing is warm."""
    if cold:
        os.environ[COLD] = "1"
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="arvideo-tests-")
        os.environ[OWNER] = str(os.getpid())


def end_session() -> None:
    if os.environ.get(OWNER) == str(os.getpid()):
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
        del os.environ[OWNER]


def shared_folder() -> Path:
    begin_session()
    return Path(os.environ[FOLDER])


def python() -> str:
    """Starts the server where it is not there yet; whoever connects waits for its imports."""
    if COLD in os.environ:
        return sys.executable
    folder = shared_folder()
    stub = folder / "python"
    with FileLock(folder / "python.lock"):
        if not stub.exists():
            _start_server(folder)
            text = (Path(__file__).parent / "stub.py").read_text()
            written = folder / "python.new"
            written.write_text(f"#!{sys.executable} -IS\nPYTHON = {sys.executable!r}\n{text}")
            written.chmod(0o755)
            written.rename(stub)
    return str(stub)


def _start_server(folder: Path) -> None:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    ready, told = os.pipe()
    with open(folder / "server.log", "wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm.server", str(folder), os.environ[OWNER], str(told)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[told],
        )
    os.close(told)
    # It listens, or has ended: then its log says why, and processes start as everywhere else.
    os.read(ready, 1)
    os.close(ready)


@contextmanager
def as_sys_executable() -> Iterator[None]:
    """What this process starts by way of `sys.executable`, such as Ray's workers, is warm."""
    real, sys.executable = sys.executable, python()
    try:
        yield
    finally:
        sys.executable = real


@contextmanager
def for_multiprocessing() -> Iterator[None]:
    """What multiprocessing starts meanwhile by `spawn` is warm, and so is a fork server that it starts."""
    multiprocessing.spawn.set_executable(python())
    try:
        yield
    finally:
        multiprocessing.spawn.set_executable(sys.executable)


class Process:
    """Like subprocess.Popen of `python() *arguments`, with the id of the process itself."""

    def __init__(self, arguments: list[str], env: dict[str, str] | None = None, **options: Any) -> None:
        pid, told = os.pipe()
        self._stub = subprocess.Popen(
            [python(), *arguments],
            env={**(os.environ if env is None else env), "WARM_PID_FD": str(told)},
            pass_fds=[told],
            **options,
        )
        os.close(told)
        with open(pid) as file:
            self.pid = self._stub.pid if COLD in os.environ else int(file.read())

    @property
    def stdin(self) -> IO[Any]:
        assert self._stub.stdin is not None
        return self._stub.stdin

    @property
    def stdout(self) -> IO[Any]:
        assert self._stub.stdout is not None
        return self._stub.stdout

    @property
    def returncode(self) -> int | None:
        return self._stub.returncode

    def send_signal(self, number: int) -> None:
        if self._stub.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        return self._stub.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self._stub.wait(timeout)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        return self._stub.communicate(timeout=timeout)
