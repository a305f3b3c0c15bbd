"""A line at least every so often, of what the run does, while it says nothing else."""

from __future__ import annotations

from queue import Empty, Queue

import pytest

from arvideo_dist.train.health.activity import Activity
from arvideo_dist.train.health.pulse import EVERY_S, Pulse, pulse_line


def test_a_run_that_says_nothing_is_told_of_until_it_ends() -> None:
    activity, said = Activity(), Queue[str]()
    activity.step, activity.total_steps = 12, 400
    activity.together("forward and backward of micro batch 3 of 64")
    with Pulse(activity, said.put, every_s=0.01):
        assert said.get(timeout=60).startswith(
            "step 12/400 done; now: forward and backward of micro batch 3 of 64"
        )
        activity.alone("waits for batches")
        while "waits for batches" not in said.get(timeout=60):
            pass
    while not said.empty():
        said.get()
    with pytest.raises(Empty):
        said.get(block=False)


def test_a_run_that_speaks_is_not_interrupted() -> None:
    activity = Activity()
    pulse = Pulse(activity, lambda line: None, every_s=1000.0)
    activity.spoke_at -= 999.0
    assert 0 < pulse._left_s() <= 1.0
    activity.spoke()
    assert pulse._left_s() > 999.0
    activity.spoke_at -= 2000.0
    assert pulse._left_s() == 0.0


def test_before_the_plan_is_known_the_line_has_no_total() -> None:
    activity = Activity()
    activity.together("builds the engine")
    assert pulse_line(activity) == "step 0 done; now: builds the engine"
    assert EVERY_S <= 60
