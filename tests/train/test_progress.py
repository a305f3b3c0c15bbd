"""Which rank is slow, and when that is said."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from arvideo_dist.train.engine.timing import ForwardTime
from arvideo_dist.train.record import Meter, Point, Stragglers
from tests.train.distributed import run_ranks

POINT = Point(
    loss=1.0,
    clips_per_second=10.0,
    data_wait_share=0.1,
    slowest_rank=3,
    slowest_s=1.5,
    median_s=1.0,
    slowest_wait_s=0.4,
    memory_gib=1.0,
)


class Took(ForwardTime):
    """Forward passes that took `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._took = seconds

    def seconds(self) -> float:
        return self._took


def _point_of_three_ranks() -> Point:
    """Two steps; rank 1 waits longer for its batches, rank 2 computes longer; all wait for each other."""
    control = dist.group.WORLD
    assert control is not None
    rank, device = dist.get_rank(), torch.device("cpu")
    meter = Meter(device, control)
    for _ in range(2):
        meter.waited(0.5 if rank == 1 else 0.1)
        meter.forward(Took(0.8 if rank == 2 else 0.2))
        dist.barrier()  # what is waited for here is nobody's own time
    return meter.point(torch.tensor(1.0), 3.0)


def test_the_slowest_rank_is_the_one_that_works_longest_not_one_that_waits_for_it() -> None:
    points = run_ranks(3, _point_of_three_ranks)
    assert len({point.slowest_rank for point in points}) == 1
    point = points[0]
    assert point.slowest_rank == 2
    assert point.slowest_s == pytest.approx(0.9)
    assert point.median_s == pytest.approx(0.7)
    assert point.slowest_wait_s == pytest.approx(0.1)


def test_a_slow_rank_is_said_once_it_is_slow_point_after_point() -> None:
    stragglers = Stragglers()
    said = [stragglers.line(POINT) for _ in range(8)]
    assert [line is not None for line in said] == [False] * 4 + [True] + [False] * 3
    assert said[4] is not None
    assert said[4].startswith("rank 3 is slow: 1.50 s a step of its own, 0.40 s of it waiting for batches")
    # Once it has caught up, or another is slower, the count begins anew.
    assert stragglers.line(replace(POINT, slowest_s=1.1)) is None
    assert [stragglers.line(POINT) is not None for _ in range(5)] == [False] * 4 + [True]
    turns = [stragglers.line(replace(POINT, slowest_rank=rank)) for rank in (0, 1) * 6]
    assert not any(turns)


def _point_while_a_child_ends() -> float:
    """Rank 1 has a child process that ends between being listed and being asked for its memory."""
    control = dist.group.WORLD
    assert control is not None
    meter = Meter(torch.device("cpu"), control)
    meter.waited(0.1)
    listed = psutil.Process.children

    def children(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        found = listed(self, recursive=recursive)
        assert child.pid in [process.pid for process in found]
        child.kill()
        child.join()
        return found

    ends: Any = mock.patch.object(psutil.Process, "children", children)
    if dist.get_rank() == 1:
        ends.start()
    return meter.point(torch.tensor(1.0), 2.0).memory_gib


def test_a_process_that_ends_while_memory_is_counted_leaves_no_rank_alone() -> None:
    memory = run_ranks(2, _point_while_a_child_ends)
    assert memory[0] == memory[1] > 0
