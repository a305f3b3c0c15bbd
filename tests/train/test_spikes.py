"""Spikes of loss and gradient norm: flagged against the median of what was logged, alike after a restart."""

from __future__ import annotations

import json
import math

from arvideo_dist.train.record import Spikes, spike_line


def _metrics(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss/train": loss, "gradient_norm": norm, "learning_rate": 100.0}


def test_a_value_far_above_the_median_is_flagged_with_its_multiple_and_no_other() -> None:
    spikes = Spikes()
    quiet = [spikes.look(_metrics(0.5 + 0.01 * (step % 3), norm=1 + step % 2)) for step in range(40)]
    assert not any(quiet)
    assert spikes.look(_metrics(1.02)) == {"spikes/loss": 2.0}
    assert spikes.look(_metrics(0.5, norm=15.0)) == {"spikes/gradient_norm": 15.0}
    assert spikes.look(_metrics(0.5)) == {}
    assert spike_line(42, {"spikes/loss": 2.0, "spikes/gradient_norm": 10.0}) == (
        "step 42  spike: loss 2.0 times, gradient_norm 10.0 times its median over the points logged before"
    )


def test_the_first_points_and_those_of_bad_steps_are_not_judged() -> None:
    spikes = Spikes()
    assert not any(spikes.look(_metrics(100.0 / 2**step)) for step in range(16))
    before = spikes.listed()
    assert spikes.look({"learning_rate": 1.0}) == {}  # the loop leaves out what is not finite
    assert spikes.look(_metrics(math.inf, math.nan)) == {}
    assert spikes.listed() == before


def test_a_spike_that_lasts_is_flagged_until_it_is_half_of_the_points() -> None:
    spikes = Spikes()
    for _ in range(64):
        spikes.look(_metrics(1.0))
    flagged = [bool(spikes.look(_metrics(10.0))) for _ in range(64)]
    assert all(flagged[:32])
    assert not any(flagged[33:])  # in between the median is the middle of both


def test_points_that_are_replayed_after_a_restart_are_flagged_alike() -> None:
    spikes = Spikes()
    for step in range(100):
        spikes.look(_metrics(1 + step % 7 / 10))
    again = Spikes()
    again.restore(json.loads(json.dumps(spikes.listed())))
    later = [_metrics(loss) for loss in (1.0, 2.4, 9.0, 1.2)]
    flags = [spikes.look(point) for point in later]
    assert [again.look(point) for point in later] == flags
    assert [bool(flag) for flag in flags] == [False, True, True, False]
