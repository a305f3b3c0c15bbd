"""Flags a loss or gradient norm that stands out from those logged before: for a person, nothing acts on it.

Looked at are logged points only, whose values are on the host anyway.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

# Metric to the multiple of its median that is a spike. A global batch's mean loss scatters by a few per cent around
# its trend; the gradient norm scatters more, and rises during warm-up.
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
