"""When the pictures of a file are shown: packets' times in order, holes and jumps taken out."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_STANDARD_RATES = [Fraction(n) for n in range(1, 241)] + [Fraction(n * 1000, 1001) for n in (24, 30, 60, 120)]
# A decoding time that goes back by more starts a new part of a file whose clock was set again (joined streams).
_MAX_STEP_BACK_S = Fraction(1, 10)
# No picture is held for longer than this, or than so many intervals if pictures come more slowly.
_MAX_HOLD_S = Fraction(1)
_MAX_HOLD_INTERVALS = 10


@dataclass(frozen=True)
class Timeline:
    """The times at which pictures are shown, seconds from the first one's."""

    rate: Fraction  # pictures a second
    constant: bool
    start: Fraction  # seconds: time of the first picture in the container
    duration: Fraction  # from the first picture to the end of the last, without what is cut
    cuts: list[tuple[Fraction, Fraction]]  # from, to: what is left out of holes in the file
    max_hold: Fraction | None  # seconds; None if nothing is cut and time never goes back


def goes_back(before: Fraction | None, after: Fraction | None) -> bool:
    """Whether the clock was set again between two packets with these decoding times."""
    return before is not None and after is not None and after < before - _MAX_STEP_BACK_S


def timeline(parts: list[list[Fraction]]) -> Timeline:
    """The timeline of pictures at `parts`: times in seconds, a list for each part with a clock of its own.

    A picture is held until the next one comes, at most `max_hold`: the rest of a hole is cut. If the clock
    goes back the next picture follows after one interval.
    """
    times = [time for part in parts for time in sorted(part)]
    gaps = [after - before for before, after in pairwise(times)]
    forward = sorted(gap for gap in gaps if gap > 0)
    max_hold = max(_MAX_HOLD_S, _MAX_HOLD_INTERVALS * forward[len(forward) // 2]) if forward else _MAX_HOLD_S
    rate, constant = rate_of([gap for gap in gaps if 0 < gap <= max_hold])
    now, shown, cuts, jumps = Fraction(0), Fraction(0), [], False
    for gap in gaps:
        if gap < 0:
            gap, jumps = 1 / rate, True
        if gap > max_hold:
            cuts.append((now + max_hold, now + gap))
        now += gap
        shown += min(gap, max_hold)
    return Timeline(rate, constant, times[0], shown + 1 / rate, cuts, max_hold if cuts or jumps else None)


def frame_rate(times: list[Fraction]) -> tuple[Fraction, bool]:
    """`rate_of` the intervals between `times` (seconds, ascending)."""
    return rate_of([after - before for before, after in pairwise(times) if after > before])


def rate_of(gaps: list[Fraction]) -> tuple[Fraction, bool]:
    """The rate of pictures with these intervals (seconds) and whether it is constant.

    Constant: no interval strays from the mean by more than a quarter of it (Matroska and FLV round times to
    1 ms). Then the mean is the rate, else the median interval's. Rates within 0.1 % (constant) or 1 %
    (variable) of a standard rate become that rate.
    """
    if not gaps:
        return Fraction(1), True
    mean = sum(gaps, Fraction(0)) / len(gaps)
    constant = all(abs(gap - mean) <= mean / 4 for gap in gaps)
    rate: Fraction = 1 / mean if constant else 1 / sorted(gaps)[len(gaps) // 2]
    tolerance = Fraction(1, 1000) if constant else Fraction(1, 100)
    nearest = min(_STANDARD_RATES, key=lambda standard: float(abs(standard - rate)))
    if abs(nearest - rate) <= tolerance * rate:
        return nearest, constant
    return rate.limit_denominator(1001), constant
