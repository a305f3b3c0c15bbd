"""The run's identity and life, the cluster that it runs on, and MLflow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from arvideo_dist.config.section import ALTERS, FREE, PositiveInt, Section

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RunConfigSection(Section):
    """Identity, storage and life of the run."""

    name: Annotated[str, FREE] = Field(
        "arvideo-vit-b-k400", pattern=NAME_PATTERN, description="names the run's folder"
    )
    storage_path: Annotated[str, FREE] = Field(
        "runs", description="folder or URI (s3://...) that every node reaches"
    )
    seed: Annotated[int, ALTERS] = Field(
        0, ge=0, description="decides the sample order and every random draw"
    )
    resume: Annotated[Literal["auto", "must", "never"], FREE] = Field(
        "auto",
        description="auto: from the latest complete checkpoint if there is one; must: refuse to start "
        "without one; never: refuse to start if there is one",
    )
    allow_change: Annotated[tuple[str, ...], FREE] = Field(
        (),
        description="fields, such as train.epochs, that may differ from the checkpoint's though they alter the "
        "result; others that do are refused on resume",
    )
    checkpoint_every_steps: Annotated[PositiveInt, FREE] = Field(
        500, description="optimiser steps between checkpoints"
    )
    checkpoint_every_minutes: Annotated[float | None, FREE] = Field(
        30.0, gt=0, description="minutes after which a checkpoint is due earlier; null: by steps alone"
    )
    keep_last: Annotated[PositiveInt, FREE] = Field(
        2, description="newest complete checkpoints kept; older ones are deleted"
    )
    keep_every: Annotated[PositiveInt | None, FREE] = Field(
        None,
        description="checkpoints of steps that this divides are made and kept for good, in place of one that fails "
        "the next; null: none",
    )
    max_failed_saves: Annotated[PositiveInt, FREE] = Field(
        3,
        description="saves in a row that fail (a full disk, a failing store), each tried again half a minute to "
        "ten minutes later while the training goes on, before the run stops",
    )
    max_restarts: Annotated[int, FREE] = Field(
        3,
        ge=0,
        description="restarts after lost workers, without a checkpoint in between, before the run fails; "
        "each after a longer pause than the one before",
    )
    hung_s: Annotated[float, FREE] = Field(
        600.0,
        ge=5,
        description="seconds without progress of any rank after which the run counts as hung: the stacks of all "
        "ranks are kept and the workers start again; must be longer than the longest honest pause between two "
        "signs of progress (a micro batch, a batch of the validation, a piece of a checkpoint, data.hung_worker_s, "
        "the three minutes for which a request to storage is repeated)",
    )
    lease_s: Annotated[float, FREE] = Field(
        60.0,
        ge=3,
        description="seconds without a sign of life of the driver after which another may take the run over",
    )
    preemption_grace_s: Annotated[float, FREE] = Field(
        120.0,
        gt=0,
        description="seconds that the workers have after SIGTERM or Ctrl-C to end their step and save; then "
        "the driver ends without a new checkpoint",
    )
    audit: Annotated[bool, FREE] = Field(
        False, description="each worker notes at every optimiser step which places of the sequence it applied"
    )


def _worker_range(value: Any) -> Any:
    """The command line gives a lone number as a list of one; what is neither form gets one message, not two."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(str(n).isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"expected a number above 0, or [min,max], got {value!r}")
    if int(numbers[0]) > int(numbers[-1]):
        raise ValueError(f"expected [min,max], got {value!r}: swap them")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


class ClusterConfig(Section):
    """The Ray cluster and the workers on it."""

    address: Annotated[str | None, FREE] = Field(
        None, description="Ray address; null: join the surrounding cluster or job, else start Ray here"
    )
    workers: Annotated[Annotated[int | tuple[int, int], BeforeValidator(_worker_range)], FREE] = Field(
        8,
        description="training workers (one GPU each, or CPU processes); [min,max]: as many as the cluster has room "
        "for, also when nodes come and go",
    )
    resize_interval_s: Annotated[float, FREE] = Field(
        60.0,
        gt=0,
        description="with workers [min,max]: seconds for which nodes must have had room for more workers before "
        "those that run save and make way for a wider set",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = Field(
        "auto", description="auto: cuda if the cluster has GPUs when the command starts"
    )
    cpus_per_worker: Annotated[PositiveInt, FREE] = Field(
        1, description="CPU cores that Ray reserves for each worker"
    )

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrackingConfig(Section):
    """MLflow."""

    uri: Annotated[str | None, FREE] = Field(
        None,
        description="tracking server; null: sqlite in run.storage_path (which must then be a local path)",
    )
    experiment: Annotated[str, FREE] = Field("arvideo", description="MLflow experiment")
