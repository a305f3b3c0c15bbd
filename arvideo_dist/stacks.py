"""The stacks of all threads of a process, taken from outside, also while it hangs with Python's lock held.

`keep_ready` makes a process write its stacks on SIGUSR1; the handler is the C library's business alone
(faulthandler), so it needs neither Python's lock nor a thread of its own. They go into a piece of memory that has a
name under /proc, so another process of the same user finds them there, and nothing is left behind when the process
is killed. Linux only; elsewhere there is nothing to read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

import psutil

_NAME = "arvideo-stacks"
_POLL_S = 0.05
_WAIT_S = 2.0  # for one process; a thread that is in the kernel's hands for good never writes

_file: IO[bytes] | None = None  # open for the life of the process


def keep_ready() -> None:
    """From now on SIGUSR1 makes this process write its stacks where `of_tree` reads them."""
    global _file
    if sys.platform == "linux" and _file is None:
        _file = os.fdopen(os.memfd_create(_NAME), "wb", buffering=0)
        faulthandler.register(signal.SIGUSR1, file=_file, all_threads=True, chain=False)


def of_tree(pid: int) -> str:
    """The stacks of process `pid` and of its children that are ready, one paragraph each.

    If a process does not write any, its state is said instead: a stopped one, or one that waits in the kernel.
    """
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error as error:
        return f"process {pid}: {error}\n"
    return "\n".join(_of(process) for process in processes if process.pid == pid or _memory(process.pid))


def _of(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())[:100]
        head = f"process {process.pid}, {process.status()}: {command}\n"
        memory = _memory(process.pid)
        if memory is None:
            return f"{head}  (it cannot be asked for its stacks)\n"
        before = memory.stat().st_size
        process.send_signal(signal.SIGUSR1)
        until, size = time.monotonic() + _WAIT_S, before
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            last, size = size, memory.stat().st_size
            if size == last > before:
                break
        with memory.open("rb") as file:
            file.seek(before)
            text = file.read().decode(errors="replace")
        return head + (text or f"  (no stacks within {_WAIT_S:g} s; the process is {process.status()})\n")
    except (psutil.Error, OSError) as error:
        return f"process {process.pid}: {error}\n"


def _memory(pid: int) -> Path | None:
    """Where process `pid` writes its stacks, if it does."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry).startswith(f"/memfd:{_NAME}"):
                    return entry
    return None
