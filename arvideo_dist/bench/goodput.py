"""Effective training time of a run under failures: simulated, and in closed form.

A run goes on for as long as nothing fails. Every `interval_steps` steps it saves: that costs the steps
`save_extra_s`, and the checkpoint counts once it is whole, `save_visible_s` after it was begun; a failure before
that falls back to the one before. A save that is due while another is under way waits for it, as the saver does.
After a failure the next step is applied `restart_s` later, unless another failure strikes meanwhile. Failures are
exponential. So everything between two restarts is a renewal, and the share of time that ends up in kept steps is
(J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, with a delay)

    share = T exp(-(T + V + R) / M) / (M (1 - exp(-P / M)))

T steps between two saves, P the time from one save to the next, V until a save counts, R restart, M mean time
between failures. R enters as a factor only: the best interval does not depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds."""

    step_s: float  # one optimiser step
    save_extra_s: float  # by which a save makes the run longer
    save_visible_s: float  # from a save's begin until a restart may use it
    restart_s: float  # from a failure to the next applied step

    def __post_init__(self) -> None:
        if self.step_s <= 0 or min(self.save_extra_s, self.save_visible_s, self.restart_s) < 0:
            raise ValueError(f"{self}: step_s must be above 0, the others not below")

    def period_s(self, interval_steps: int) -> float:
        """From the begin of one save to the begin of the next, while nothing fails."""
        return max(interval_steps * self.step_s + self.save_extra_s, self.save_visible_s)


@dataclass(frozen=True)
class EffectiveTime:
    """Where the time went, as shares that add up to 1."""

    effective: float  # steps that are in the final weights
    saves: float
    lost_steps: float  # steps, and saves, that a failure undid
    restarts: float


def failures_every(node_mtbf_s: float, nodes: int) -> float:
    """Mean seconds between failures of `nodes` nodes that fail independently, each every `node_mtbf_s`."""
    return node_mtbf_s / nodes


def simulate(
    costs: Costs, interval_steps: int, mtbf_s: float, *, failures: int = 100_000, seed: int = 0
) -> EffectiveTime:
    """A run through so many `failures`, with their times drawn from `seed`; `mtbf_s`: of the whole run, or inf."""
    _check(interval_steps, mtbf_s)
    if math.isinf(mtbf_s):
        return closed_form(costs, interval_steps, mtbf_s)
    rng = np.random.default_rng(seed)
    between_s, period_s = interval_steps * costs.step_s, costs.period_s(interval_steps)
    up_s = rng.exponential(mtbf_s, failures)  # from the first step after a restart to the next failure
    # The k-th save begins at between + (k - 1) period.
    visible = np.maximum(np.floor((up_s - between_s - costs.save_visible_s) / period_s) + 1, 0)
    effective_s = float((visible * between_s).sum())
    saves_s = float((visible * (period_s - between_s)).sum())
    restarts_s, restarting = 0.0, failures
    while restarting:  # who is struck again while it restarts begins anew
        again_s = rng.exponential(mtbf_s, restarting)
        struck = again_s < costs.restart_s
        restarts_s += float(np.where(struck, again_s, costs.restart_s).sum())
        restarting = int(struck.sum())
    total_s = float(up_s.sum()) + restarts_s
    lost_s = float(up_s.sum()) - effective_s - saves_s
    return EffectiveTime(effective_s / total_s, saves_s / total_s, lost_s / total_s, restarts_s / total_s)


def closed_form(costs: Costs, interval_steps: int, mtbf_s: float) -> EffectiveTime:
    """The expectation of what `simulate` draws."""
    _check(interval_steps, mtbf_s)
    between_s, period_s = interval_steps * costs.step_s, costs.period_s(interval_steps)
    overhead = (period_s - between_s) / between_s  # of saves, for each second of kept steps
    if math.isinf(mtbf_s):
        return EffectiveTime(between_s / period_s, 1 - between_s / period_s, 0.0, 0.0)
    effective = float(_effective(costs, np.array([interval_steps]), mtbf_s)[0])
    restarts = 1 - math.exp(-costs.restart_s / mtbf_s)
    saves = effective * overhead
    return EffectiveTime(effective, saves, 1 - effective - saves - restarts, restarts)


def best_interval(costs: Costs, mtbf_s: float) -> int:
    """Steps between saves at which the most time is effective."""
    _check(1, mtbf_s)
    if math.isinf(mtbf_s):
        raise ValueError(
            "without failures every save is a loss: there is no best interval; give a finite mtbf_s"
        )
    # No longer than a few times Young's, nor than the time between failures.
    longest_s = max(10 * young(costs.save_extra_s, mtbf_s), 2 * costs.save_visible_s, costs.step_s)
    intervals = np.arange(1, math.ceil(min(longest_s, 10 * mtbf_s) / costs.step_s) + 1)
    return int(intervals[np.argmax(_effective(costs, intervals, mtbf_s))])


def young(save_extra_s: float, mtbf_s: float) -> float:
    """Seconds between saves by the first-order rule, sqrt(2 C M) (J. W. Young, 1974)."""
    return math.sqrt(2 * save_extra_s * mtbf_s)


def restart_for(costs: Costs, interval_steps: int, mtbf_s: float, goal: float) -> float | None:
    """The longest `restart_s` at which the share `goal` is effective; None if saves and lost steps alone cost
    more. `costs.restart_s` does not matter."""
    at_once = Costs(costs.step_s, costs.save_extra_s, costs.save_visible_s, 0.0)
    share = closed_form(at_once, interval_steps, mtbf_s).effective
    return mtbf_s * math.log(share / goal) if share >= goal else None


def _effective(costs: Costs, intervals: np.ndarray, mtbf_s: float) -> np.ndarray:
    """The formula above for each of `intervals` (steps)."""
    between_s = intervals * costs.step_s
    period_s = np.maximum(between_s + costs.save_extra_s, costs.save_visible_s)
    kept = np.exp(-(between_s + costs.save_visible_s + costs.restart_s) / mtbf_s)
    return between_s * kept / (-mtbf_s * np.expm1(-period_s / mtbf_s))


def _check(interval_steps: int, mtbf_s: float) -> None:
    if interval_steps < 1 or not mtbf_s > 0:
        raise ValueError(f"interval_steps {interval_steps} and mtbf_s {mtbf_s} must be above 0")
