"""Learning rate as a pure function of the step, hence of the position in the sample sequence."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total_steps: int, warmup_steps: float, peak: float, final: float) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up from 0, then cosine to `final` (VideoMAE)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))
