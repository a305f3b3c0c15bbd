"""How a run ends for good."""

from __future__ import annotations


class RunStoppedError(RuntimeError):
    """The run cannot go on, and a restart would meet the same; raised on all ranks together.

    Anything else that a worker raises is taken for a fault of its machine and restarts the workers.
    """
