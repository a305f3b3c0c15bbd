"""Speed, waiting and memory between two logged points, and the line that a person reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

_GIB = 2**30


@dataclass
class Point:
    """One logged point, over all ranks."""

    loss: float
    clips_per_second: float
    data_wait_share: float  # mean over ranks of the share of time spent waiting for batches
    memory_gib: float  # largest over ranks: allocated on the GPU, or resident with loader processes on a CPU


class Meter:
    """Measures one rank and joins the ranks' figures at a logged point."""

    def __init__(self, device: torch.device, control: dist.ProcessGroup) -> None:
        self._device, self._control = device, control
        self._begun, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """One step's batches came after `seconds`."""
        self._waited += seconds
        self._steps += 1

    def point(self, loss_sum: torch.Tensor, total_weight: float, global_batch: int) -> Point:
        """Collective. `loss_sum`: this rank's weighted loss sum of the current step (synchronises)."""
        local_loss = float(loss_sum)
        elapsed = time.perf_counter() - self._begun
        local = torch.tensor(
            [local_loss, self._waited / elapsed, self._memory(), elapsed], dtype=torch.float64
        )
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, local, group=self._control)
        loss, wait, memory, seconds = torch.stack(ranks).unbind(dim=1)
        point = Point(
            loss=float(loss.sum()) / total_weight,
            clips_per_second=self._steps * global_batch / float(seconds.max()),
            data_wait_share=float(wait.mean()),
            memory_gib=float(memory.max()),
        )
        self.reset()
        return point

    def reset(self) -> None:
        """Begin a new interval; time spent validating is not training speed, time that a save takes is."""
        self._begun, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _GIB
        process = psutil.Process()
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / _GIB


def progress_line(step: int, total_steps: int, learning_rate: float, point: Point, global_batch: int) -> str:
    """Loss, speed and time left, for the terminal."""
    left = (total_steps - step) * global_batch / point.clips_per_second
    hours, minutes, seconds = int(left // 3600), int(left % 3600 // 60), int(left % 60)
    return (
        f"step {step}/{total_steps}  loss {point.loss:.4f}  lr {learning_rate:.2e}  "
        f"{point.clips_per_second:.1f} clips/s  data wait {point.data_wait_share:.0%}  "
        f"left {hours}:{minutes:02d}:{seconds:02d}"
    )
