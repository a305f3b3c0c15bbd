"""Seconds of forward passes."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # the loader wants packages that a bare GPU machine does not have (benchmarks/gpu_check.py)
    pass


class ForwardTime:
    """Seconds of forward passes. On a GPU by its own clock, which waits for nothing while they run."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began, self._host_s = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        else:
            self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._host_s += time.perf_counter() - self._began

    def seconds(self) -> float:
        """To be called once the device is past them: when a result of the step has been read."""
        return self._host_s + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
