"""Helper processes with limits: whatever a hostile file does, it does to one of these.

Limits are CPU time, address space and file size of the helper (prlimit(2), set from outside, so no code runs
between fork and exec), and a wall clock far beyond them which only a helper that waits for ever meets: a busy
machine makes a helper slow, not rejected.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from data_prep.errors import Interrupted, Rejected
from data_prep.probe import SourceInfo, VideoInfo

_running: set[subprocess.Popen[Any]] = set()
_stopping = threading.Event()
_WALL_FACTOR = 10  # wall seconds allowed per CPU second allowed
_MAX_FILE_BYTES = 8 * 2**30
_STDERR_BYTES = 2**20  # read of a helper's messages: as much of their end as of their beginning
# What ffmpeg ends with if it is sent SIGTERM, or SIGXCPU at its limit: it handles both.
_ENDED_BY_SIGNAL = 255


@dataclass(frozen=True)
class Limits:
    """What one helper may take: CPU seconds, and bytes of address space."""

    cpu_s: float = 120.0
    memory: int = 4 * 2**30


def _limit(pid: int, limits: Limits, used_cpu_s: float = 0.0) -> None:
    cpu_s = int(used_cpu_s + limits.cpu_s) + 1
    try:
        resource.prlimit(pid, resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
        resource.prlimit(pid, resource.RLIMIT_AS, (limits.memory, limits.memory))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    except ProcessLookupError:
        pass  # it has ended already: the caller reads its exit status


class _Watch:
    """Kills a helper that waits for ever, and knows afterwards how it ended."""

    def __init__(self, process: subprocess.Popen[Any], limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._wall_s = _WALL_FACTOR * limits.cpu_s
        self._expired = False
        self._timer = threading.Timer(self._wall_s, self._expire)
        self._timer.start()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def stop(self) -> None:
        self._timer.cancel()

    def died(self, returncode: int, cpu_s: float = 0.0) -> Interrupted:
        """How the helper ended that was not to end, having used `cpu_s` seconds of CPU time."""
        if self._expired:
            return Interrupted(f"no end after {self._wall_s:.0f} s")
        if returncode == -signal.SIGXCPU or cpu_s >= self._limits.cpu_s:
            return Interrupted(f"takes more than {self._limits.cpu_s:.0f} s of CPU time")
        if returncode == _ENDED_BY_SIGNAL:
            return Interrupted("ended by a signal", outside=True)
        if returncode >= 0:
            return Interrupted(f"the reader ends with status {returncode}")
        outside = -returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return Interrupted(f"ended by {signal.Signals(-returncode).name}", outside)


def run(
    arguments: list[str], limits: Limits, feed: Callable[[IO[bytes]], object] | None = None
) -> tuple[int, str]:
    """Run a helper to its end; (exit status, its stderr, of which the middle is left out if it is long).

    `feed` writes the helper's stdin (a helper that stops reading is no error here: its status tells).
    Raises Interrupted if it is ended by a signal, hence also by a limit.
    """
    _check_allowed()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            start_new_session=True,  # Ctrl-C is for the program, which must not take it for a damaged video
        )
        _running.add(process)
        watch = _Watch(process, limits)
        try:
            _limit(process.pid, limits)
            if feed and process.stdin:
                try:
                    with process.stdin:
                        feed(process.stdin)
                except BrokenPipeError:
                    pass
            cpu_s = _cpu_seconds_at_its_end(process)
            returncode = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            watch.stop()
            _running.discard(process)
        text = _both_ends(messages).decode("utf-8", "replace")
    if returncode < 0 or returncode == _ENDED_BY_SIGNAL:
        _check_allowed()
        raise watch.died(returncode, cpu_s)
    return returncode, text


def _cpu_seconds_at_its_end(process: subprocess.Popen[Any]) -> float:
    """Waits for the end of the helper, and asks while the kernel still knows: before its status is taken."""
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        times = psutil.Process(process.pid).cpu_times()
    except (ChildProcessError, psutil.NoSuchProcess):  # who killed it took its status
        return 0.0
    return float(times.user + times.system)


def _both_ends(messages: IO[bytes]) -> bytes:
    size = messages.seek(0, os.SEEK_END)
    messages.seek(0)
    if size <= _STDERR_BYTES:
        return messages.read()
    beginning = messages.read(_STDERR_BYTES // 2)
    messages.seek(size - _STDERR_BYTES // 2)
    return beginning + b"\n" + messages.read(_STDERR_BYTES // 2)


def allow_helpers(allowed: bool) -> None:
    """Let helpers be started, or end all that run and let no other begin: then `Stopped` is raised."""
    if allowed:
        _stopping.clear()
        return
    _stopping.set()
    for process in list(_running):
        process.kill()


class Stopped(Exception):  # noqa: N818
    """The run is ending: this input is neither made nor rejected."""


def _check_allowed() -> None:
    if _stopping.is_set():
        raise Stopped


class Prober:
    """One `data_prep.probe` process, started when first needed and again after it dies. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[str] | None = None

    def source(self, path: str) -> SourceInfo:
        """See `probe.probe_source`; raises Rejected, or Interrupted if the process died on the file."""
        return SourceInfo(**self._ask("source", path))

    def video(self, path: str) -> VideoInfo:
        """See `probe.probe_video`."""
        return VideoInfo(**self._ask("video", path))

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            _running.discard(self._process)
            self._process = None

    def _ask(self, what: str, path: str) -> dict[str, Any]:
        _check_allowed()
        if self._process is None:
            # A Ray worker may have the package from a place that only its own sys.path names.
            paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_prep.probe"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,
            )
            _running.add(self._process)
        process = self._process
        assert process.stdin
        assert process.stdout
        watch = _Watch(process, self._limits)
        try:
            times = psutil.Process(process.pid).cpu_times()
            _limit(process.pid, self._limits, times.user + times.system)
            process.stdin.write(json.dumps({"what": what, "path": path}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, psutil.NoSuchProcess):
            line = ""
        finally:
            watch.stop()
        if not line:
            process.communicate()
            _running.discard(process)
            self._process = None
            _check_allowed()
            raise watch.died(process.returncode)
        answer = json.loads(line)
        if "rejected" in answer:
            raise Rejected(answer["rejected"])
        info: dict[str, Any] = answer["info"]
        return info
