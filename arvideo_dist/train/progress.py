"""Speed, waiting, memory and slow ranks between two logged points, and the lines that a person reads.

In synchronous training all ranks take equally long for a step, the slow one by working and the others by waiting
for it. What tells it apart is its *own time*: waiting for its batches, and forward passes, which run before the
gradients meet. (Backward passes cannot be told from the waiting in them. Under ZeRO-3 forward passes gather
weights, so there only the waiting for batches tells.)
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from arvideo_dist.train.engine.timing import ForwardTime

_GIB = 2**30
# What one rank's own time exceeds the median by costs the whole run as much as losing that share of its nodes.
_STRAGGLER_FACTOR = 1.2
_STRAGGLER_POINTS = 5  # in a row: one slow read or a busy neighbour passes


@dataclass
class Point:
    """One logged point, over all ranks."""

    loss: float  # NaN where no sample of the step could be used
    clips_per_second: float
    data_wait_share: float  # mean over ranks of the share of time spent waiting for batches
    slowest_rank: int  # by own time
    slowest_s: float  # its own time a step
    median_s: float  # of all ranks' own times a step; the lower one of two
    slowest_wait_s: float  # of the slowest rank's own time: waiting for batches
    memory_gib: float  # largest over ranks: allocated on the GPU, or resident with loader processes on a CPU


class Meter:
    """Measures one rank and joins the ranks' figures at a logged point."""

    def __init__(self, device: torch.device, control: dist.ProcessGroup) -> None:
        self._device, self._control = device, control
        self._forwards: list[ForwardTime] = []
        self.reset()

    def waited(self, seconds: float) -> None:
        """One step's batches came after `seconds`."""
        self._waited += seconds
        self._steps += 1

    def consumed(self, places: int) -> None:
        """One step took so many places of the sequence, over all ranks."""
        self._places += places

    def forward(self, seconds: ForwardTime) -> None:
        """One step's forward passes."""
        self._forwards.append(seconds)

    def point(self, loss_sum: torch.Tensor, total_weight: float) -> Point:
        """Collective. `loss_sum`: this rank's weighted loss sum of the current step (synchronises);
        `total_weight`: of the step's samples on all ranks."""
        local_loss = float(loss_sum)
        elapsed = time.perf_counter() - self._begun
        local = torch.tensor(
            [local_loss, self._waited, self._forward_s(), self._memory(), elapsed], dtype=torch.float64
        )
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, local, group=self._control)
        loss, wait, forward, memory, seconds = torch.stack(ranks).unbind(dim=1)
        own = (wait + forward) / self._steps
        slowest = int(own.argmax())
        point = Point(
            loss=float(loss.sum()) / total_weight if total_weight else math.nan,
            clips_per_second=self._places / float(seconds.max()),
            data_wait_share=float((wait / seconds).mean()),
            slowest_rank=slowest,
            slowest_s=float(own[slowest]),
            median_s=float(own.median()),
            slowest_wait_s=float(wait[slowest]) / self._steps,
            memory_gib=float(memory.max()),
        )
        self.reset()
        return point

    def reset(self) -> None:
        """Begin a new interval; time spent validating is not training speed, time that a save takes is."""
        self._begun, self._waited, self._steps, self._places = time.perf_counter(), 0.0, 0, 0
        self._forwards.clear()

    def _forward_s(self) -> float:
        return sum(forward.seconds() for forward in self._forwards)

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _GIB
        process, resident = psutil.Process(), 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a decode worker that has ended meanwhile
                resident += each.memory_info().rss
        return resident / _GIB


class Stragglers:
    """Finds a rank that is slower than the others point after point."""

    def __init__(self) -> None:
        self._rank, self._points = -1, 0

    def line(self, point: Point) -> str | None:
        """What to say of the point's slowest rank, once when it has become persistent."""
        slow = point.slowest_s > _STRAGGLER_FACTOR * point.median_s
        if not slow or point.slowest_rank != self._rank:
            self._rank, self._points = point.slowest_rank, 0
        self._points += slow
        if self._points != _STRAGGLER_POINTS:
            return None
        return (
            f"rank {point.slowest_rank} is slow: {point.slowest_s:.2f} s a step of its own, "
            f"{point.slowest_wait_s:.2f} s of it waiting for batches, against {point.median_s:.2f} s (median of "
            f"the ranks), at {_STRAGGLER_POINTS} logged points in a row"
        )


def progress_line(step: int, total_steps: int, learning_rate: float, point: Point, places_left: int) -> str:
    """Loss, speed and time left, for the terminal."""
    left = places_left / point.clips_per_second
    hours, minutes, seconds = int(left // 3600), int(left % 3600 // 60), int(left % 60)
    return (
        f"step {step}/{total_steps}  loss {point.loss:.4f}  lr {learning_rate:.2e}  "
        f"{point.clips_per_second:.1f} clips/s  data wait {point.data_wait_share:.0%}  "
        f"left {hours}:{minutes:02d}:{seconds:02d}"
    )
