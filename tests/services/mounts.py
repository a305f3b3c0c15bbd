"""A disk that is mounted, unmounted and mounted again, also on what stands for another host."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x00020000


class Mount:
    """What is in the folder `disk`, seen at `at`: a bind mount, so that it is the same when it comes back."""

    def __init__(self, folder: Path) -> None:
        """Below `folder`. OSError where this process may not mount."""
        self.disk, self.at = folder / "disk", folder / "mounted"
        for each in (self.disk, self.at):
            each.mkdir(parents=True)
        self.mount()

    def mount(self) -> None:
        _command("mount", "--bind", str(self.disk), str(self.at))

    def unmount(self) -> None:
        """Whoever has a file open keeps it; every name is looked up in the empty folder below."""
        _command("umount", "--lazy", str(self.at))


@contextmanager
def mounted(folder: Path) -> Iterator[Mount]:
    """A `Mount` that is unmounted at the end."""
    mount = Mount(folder)
    try:
        yield mount
    finally:
        # It may be unmounted already.
        with suppress(OSError):
            mount.unmount()


def leave_for_another_host() -> None:
    """From now on this thread, and what it starts, has mounts of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _command("mount", "--make-rprivate", "/")


class OtherHost:
    """A thread with mounts of its own, for processes that are to see other mounts than this one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=leave_for_another_host)

    def do(self, action: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return self._thread.submit(action, *args, **named).result()


def _command(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr)
