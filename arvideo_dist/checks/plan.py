"""What of a run's plan works but is seldom meant, said at its start with the setting to change."""

from __future__ import annotations

from arvideo_dist.checks.finding import Finding, Level
from arvideo_dist.config.commands import RunConfig, TrainingConfig
from arvideo_dist.tasks.derived import Derived, Workload

# Floating point operations a second of one worker in dense layers, more than any reaches: a time that follows from
# these is a lower bound.
_FASTEST_GPU = 1e15
_FASTEST_CORE = 1e11
_FIRST_LINE_S = 1800.0


def check_plan(derived: Workload) -> list[Finding]:
    """On the driver; of a new run and of one that goes on. `derived`: with the number of samples."""
    findings: list[Finding] = []
    if not isinstance(derived, Derived):  # nothing is trained
        return findings
    assert derived.samples is not None
    if derived.global_batch > derived.samples:
        findings.append(
            _warning(
                f"train.global_batch {derived.global_batch} is more than the {derived.samples} clips of an epoch: "
                f"each optimiser step sees each video {derived.global_batch / derived.samples:.1f} times; lower "
                f"train.global_batch to at most {derived.samples}"
            )
        )
    return findings


def check_pace(config: RunConfig, derived: Workload, *, cuda: bool) -> list[Finding]:
    """On a worker, which knows its device. `derived`: at the world size that is there."""
    if not isinstance(config, TrainingConfig) or not isinstance(derived, Derived):
        return []
    clips = derived.global_batch * config.train.log_every_steps / derived.world_size
    fastest = _FASTEST_GPU if cuda else _FASTEST_CORE * config.cluster.cpus_per_worker
    seconds = clips * derived.gflops_per_clip * 1e9 / fastest
    if seconds < _FIRST_LINE_S:
        return []
    unit = "GPU" if cuda else "core"
    return [
        _warning(
            f"the first progress line with a loss comes after {_time(seconds)} or later: train.log_every_steps "
            f"{config.train.log_every_steps} x train.global_batch {derived.global_batch} clips x "
            f"{derived.gflops_per_clip:.0f} GFLOP over {derived.world_size} workers, at no more than "
            f"{(_FASTEST_GPU if cuda else _FASTEST_CORE) / 1e12:g} TFLOP/s a {unit}; lower train.log_every_steps, "
            "train.global_batch or the model, or use more workers"
        )
    ]


def _warning(message: str) -> Finding:
    return Finding("plan", Level.WARNING, message)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
