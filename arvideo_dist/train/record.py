"""The record of a step at a logged point, for MLflow and a person: loss, speed, waiting, memory, slow ranks.

In synchronous training all ranks take equally long for a step, the slow one by working and the others by waiting
for it. What tells it apart is its *own time*: waiting for its batches, and forward passes, which run before the
gradients meet. (Backward passes cannot be told from the waiting in them. Under ZeRO-3 forward passes gather
weights, so there only the waiting for batches tells.)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
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

    loss: float  # NaN if no sample of the step could be used
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


# A loss or gradient norm that stands out is flagged for a person; nothing acts on it. Only logged points are looked
# at, whose values are on the host anyway. Metric to the multiple of its median that is a spike: the mean loss of a
# global batch scatters by a few per cent around its trend, the gradient norm by more, and it rises during warm-up.
FACTORS = {"loss/train": 1.5, "gradient_norm": 5.0}
# The median of the newest logged values: a spike of up to half as many points does not move it, and what a schedule
# changes over so few steps is small. Of too few values the median says little, and the first ones fall steeply.
_WINDOW, _LEAST = 64, 16


class Spikes:
    """The newest logged values; the same on every rank."""

    def __init__(self) -> None:
        self._values = {name: deque[float](maxlen=_WINDOW) for name in FACTORS}

    def restore(self, listed: Mapping[str, list[float]]) -> None:
        """Begin from what a checkpoint lists, so that steps that are replayed are flagged alike."""
        for name, values in self._values.items():
            values.extend(listed.get(name, []))

    def listed(self) -> dict[str, list[float]]:
        """JSON form, for the checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def look(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of one logged point: `spikes/<metric>` for each that stands out, as multiple of the median before it."""
        found = {}
        for name, values in self._values.items():
            value = metrics.get(name, math.nan)
            if not math.isfinite(value):  # of a step that was not applied
                continue
            median = statistics.median(values) if len(values) >= _LEAST else 0.0
            if median > 0 and value > FACTORS[name] * median:
                found[f"spikes/{name.partition('/')[0]}"] = value / median
            values.append(value)
        return found


def spike_line(step: int, found: Mapping[str, float]) -> str:
    """For the terminal."""
    named = ", ".join(f"{name.partition('/')[2]} {ratio:.1f} times" for name, ratio in found.items())
    return f"step {step}  spike: {named} its median over the points logged before"


class Recorder:
    """Measures this rank's steps and makes the record of one at a logged point."""

    def __init__(self, device: torch.device, control: dist.ProcessGroup) -> None:
        self.meter, self._stragglers, self.spikes = Meter(device, control), Stragglers(), Spikes()

    def record(self, done: Done, loss_sum: torch.Tensor, counts: Mapping[str, float]) -> Record:
        """Collective. `loss_sum`: this rank's weighted loss sum of the step (synchronises); `counts`: the run's own
        figures, logged as they are."""
        point = self.meter.point(loss_sum, done.total_weight)
        metrics = {
            "loss/train": point.loss,
            "learning_rate": done.learning_rate,
            "gradient_norm": float(done.gradient_norm) if done.total_weight else math.nan,
            "clips_per_second": point.clips_per_second,
            "clips_per_second_per_worker": point.clips_per_second / dist.get_world_size(),
            "data_wait_share": point.data_wait_share,
            "memory_gib": point.memory_gib,
            "step_time/max": point.slowest_s,
            "step_time/median": point.median_s,
            "slowest_rank": point.slowest_rank,
            **counts,
        }
        # A bad step, and one without a usable sample, leaves a gap: of Inf MLflow would make 1.8e308.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        found = self.spikes.look(metrics)
        lines = [progress_line(done.step, done.total_steps, done.learning_rate, point, done.places_left)]
        if found:
            lines.append(spike_line(done.step, found))
        if (straggler := self._stragglers.line(point)) is not None:
            lines.append(f"step {done.step}  {straggler}")
        return Record(metrics | found, lines)


@dataclass(frozen=True)
class Done:
    """A step as it is recorded; the same on all ranks."""

    step: int
    total_steps: int
    places_left: int
    learning_rate: float
    gradient_norm: torch.Tensor | float
    total_weight: float  # of its samples


@dataclass(frozen=True)
class Record:
    """What is logged of a step, and said."""

    metrics: dict[str, float]
    lines: list[str]
