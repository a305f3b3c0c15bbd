"""What a run's storage does not take now waits, in order: a storage that fails for a minute ends no run.

It is tried again with whatever is written next, and before a checkpoint becomes visible (`DeferredWrites.flush`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from arvideo_dist.storage import Storage


class DeferredWrites:
    """Writes files of a run's folder at once if it can, else at a later try. For any thread.

    A file is either `put` or appended to. No method but `flush` raises OSError; each raises LeaseLostError if
    another driver has taken the run.
    """

    def __init__(self, run: Storage, sources: Sequence[Callable[[], None]] = ()) -> None:
        """`sources`: each writes what something else keeps back, or raises OSError; called by `flush`."""
        self.uri = run.uri
        self._run, self._sources = run, sources
        # By file: how it is written, and with which contents, one after another.
        self._waiting: dict[str, tuple[Callable[[str, bytes], None], list[bytes]]] = {}
        self._numbered = 0  # files that were written instead of appended to
        self._lock = threading.Lock()

    def put(self, name: str, content: bytes) -> None:
        """`content` shall become file `name`; of several the newest counts."""
        with self._lock:
            self._waiting[name] = self._run.write_bytes, [content]
        self._try_to_write()

    def append(self, name: str, content: bytes) -> None:
        """`content` shall stand at the end of file `name`.

        Object storage cannot append. There it waits for the next `put` or `flush`, and becomes a file of its own:
        `name.jsonl` is `name.000000.jsonl`, with a higher number each time.
        """
        with self._lock:
            self._waiting.setdefault(name, (self._append, []))[1].append(content)
        if self._run.is_local:
            self._try_to_write()

    def flush(self) -> None:
        """All is on storage when this returns. Raises OSError if the storage fails; may be called again."""
        self._write()
        for source in self._sources:
            source()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            names = ", ".join(list(self._waiting))
            print(f"{names}: not written to {self.uri} yet, tried again later: {error}", flush=True)

    def _write(self) -> None:
        with self._lock:  # also while it writes, so that of two contents the older never comes last
            for name, (write, contents) in list(self._waiting.items()):
                write(name, b"".join(contents))
                del self._waiting[name]

    def _append(self, name: str, content: bytes) -> None:
        if self._run.is_local:
            self._run.append(name, content)
            return
        stem, dot, ending = name.rpartition(".")
        self._run.write_bytes(f"{stem}.{self._numbered:06d}{dot}{ending}", content)
        self._numbered += 1
