"""Small files that a run can do without for a while: a storage that fails for a minute ends no run."""

from __future__ import annotations

import threading

from arvideo_dist.storage import Storage


class DeferredWrites:
    """Writes members of a run's folder at once where it can, else at a later try; the newest content counts.

    For any thread.
    """

    def __init__(self, run: Storage) -> None:
        self.uri = run.uri
        self._run = run
        self._pending: dict[str, bytes] = {}
        self._writing = threading.Lock()  # so that of two contents of a member the older never comes last

    def put(self, name: str, content: bytes) -> None:
        """`content` shall become member `name`; raises no OSError."""
        self._pending[name] = content
        try:
            self.flush()
        except OSError as error:
            names = ", ".join(self._pending)
            print(f"{names}: not written to {self.uri} yet, tried again later: {error}", flush=True)

    def flush(self) -> None:
        """Write what is still to be written. Raises OSError where that fails; it may be called again."""
        with self._writing:
            for name, content in list(self._pending.items()):
                self._run.write_bytes(name, content)
                if self._pending.get(name) is content:
                    del self._pending[name]
