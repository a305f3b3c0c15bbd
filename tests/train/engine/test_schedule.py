"""The learning rate at the points that define it."""

from __future__ import annotations

import pytest

from arvideo_dist.train.engine.schedule import learning_rate

ARGUMENTS = {"total_steps": 100, "warmup_steps": 10.0, "peak": 1.0, "final": 0.1}


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.55), (100, 0.1), (150, 0.1)]
)
def test_rate_warms_up_linearly_and_falls_as_a_cosine(step: int, rate: float) -> None:
    assert learning_rate(step, **ARGUMENTS) == pytest.approx(rate)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, **{**ARGUMENTS, "warmup_steps": 0.0}) == 1.0
