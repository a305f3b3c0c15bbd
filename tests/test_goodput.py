"""Effective training time under failures: simulation, closed form, and what must hold of both."""

from __future__ import annotations

import math

import pytest

from arvideo_dist.bench.goodput import (
    Costs,
    EffectiveTime,
    best_interval,
    closed_form,
    failures_every,
    restart_for,
    simulate,
    young,
)

HOUR = 3600.0
COSTS = Costs(step_s=0.5, save_extra_s=2.0, save_visible_s=10.0, restart_s=45.0)


@pytest.mark.parametrize("interval_steps", [10, 120, 600, 3600, 20_000])
@pytest.mark.parametrize("mtbf_s", [200.0, 3 * HOUR])
def test_simulation_agrees_with_the_closed_form(interval_steps: int, mtbf_s: float) -> None:
    drawn, expected = simulate(COSTS, interval_steps, mtbf_s), closed_form(COSTS, interval_steps, mtbf_s)
    for share in EffectiveTime.__dataclass_fields__:
        assert getattr(drawn, share) == pytest.approx(getattr(expected, share), rel=0.03, abs=1e-3), share
    assert sum(vars(drawn).values()) == pytest.approx(1)
    assert sum(vars(expected).values()) == pytest.approx(1)


def test_closed_form_is_youngs_first_order_estimate_where_failures_are_rare() -> None:
    costs, mtbf_s, interval_steps = Costs(1.0, 2.0, 2.0, 30.0), 100 * HOUR, 600
    first_order = 1 - 2.0 / 600 - (600 / 2 + 2.0 + 30.0) / mtbf_s
    assert closed_form(costs, interval_steps, mtbf_s).effective == pytest.approx(first_order, abs=2e-5)


def test_without_failures_only_saves_cost_time() -> None:
    found = simulate(COSTS, 100, math.inf)
    assert found == EffectiveTime(50 / 52, 1 - 50 / 52, 0.0, 0.0)


def test_every_second_of_restart_costs() -> None:
    shares = [
        simulate(Costs(0.5, 2.0, 10.0, restart_s), 300, 3 * HOUR).effective
        for restart_s in (0.0, 20.0, 45.0, 300.0, 2 * HOUR)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[2] == pytest.approx(45 / (3 * HOUR), rel=0.05)


def test_a_save_counts_only_once_it_is_whole() -> None:
    at_once, late = Costs(0.5, 2.0, 2.0, 45.0), Costs(0.5, 2.0, 60.0, 45.0)
    lost = closed_form(late, 300, 3 * HOUR).lost_steps - closed_form(at_once, 300, 3 * HOUR).lost_steps
    assert lost == pytest.approx(58 / (3 * HOUR), rel=0.05)


def test_saves_that_take_longer_than_the_interval_hold_up_the_next_one() -> None:
    slow = Costs(step_s=1.0, save_extra_s=1.0, save_visible_s=100.0, restart_s=0.0)
    assert closed_form(slow, 50, math.inf).effective == pytest.approx(0.5)


@pytest.mark.parametrize("save_extra_s", [0.2, 2.0, 20.0])
def test_best_interval_is_near_youngs_and_no_other_is_better(save_extra_s: float) -> None:
    costs, mtbf_s = Costs(0.5, save_extra_s, save_extra_s, 45.0), 3 * HOUR
    best = best_interval(costs, mtbf_s)
    assert best * costs.step_s == pytest.approx(young(save_extra_s, mtbf_s), rel=0.05)
    effective = closed_form(costs, best, mtbf_s).effective
    for other in (best - 1, best + 1, best // 2, best * 2):
        assert effective >= closed_form(costs, other, mtbf_s).effective


def test_best_interval_does_not_depend_on_the_restart_but_the_goal_does() -> None:
    mtbf_s = 3 * HOUR
    best = best_interval(COSTS, mtbf_s)
    assert best == best_interval(Costs(0.5, 2.0, 10.0, 4000.0), mtbf_s)
    needed = restart_for(COSTS, best, mtbf_s, goal=0.95)
    assert needed is not None
    reached = closed_form(Costs(0.5, 2.0, 10.0, needed), best, mtbf_s).effective
    assert reached == pytest.approx(0.95)
    assert restart_for(COSTS, 7200, mtbf_s, goal=0.99) is None, "an hour of steps between saves"


def test_more_nodes_fail_more_often() -> None:
    assert failures_every(128 * 3 * HOUR, 128) == 3 * HOUR
    assert failures_every(128 * 3 * HOUR, 256) == 1.5 * HOUR


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="step_s must be above 0"):
        Costs(0.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="must be above 0"):
        simulate(COSTS, 0, HOUR)
    with pytest.raises(ValueError, match="no best interval"):
        best_interval(COSTS, math.inf)
