"""What a thread does while a `with` block lasts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class BlockThread(ABC):
    """Base: a daemon thread runs the subclass's `_keep` until the block ends."""

    def __init__(self, name: str, join_s: float | None = None) -> None:
        """`join_s`: the longest wait for the thread at the end of the block; None: until it has ended."""
        self._ended, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)
        self._join_s = join_s

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._woken.set()
        self._thread.join(self._join_s)

    def wake(self) -> None:
        """End the thread's pause now."""
        self._woken.set()

    @abstractmethod
    def _keep(self) -> None:
        """In the thread; returns once `_pause` says that the block has ended."""

    def _pause(self, seconds: float) -> bool:
        """In the thread: wait `seconds`, less if woken; whether the block goes on."""
        self._woken.wait(seconds)
        self._woken.clear()
        return not self._ended.is_set()
