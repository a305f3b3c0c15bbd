"""What is settled before a run costs anything: paths, start weights, what it goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, overload

from pydantic import ValidationError

from arvideo_dist.config.commands import PretrainConfig, RunConfig, SequenceConfig, TrainingConfig
from arvideo_dist.config.data import PretrainDataConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.config.settings import Root
from arvideo_dist.config.sources import clips_per_epoch, data_sets
from arvideo_dist.data.index import load_manifest
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import Derived, Viewed, Workload, derive, derive_sequence
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.train.checkpoint import seen
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.engine.schedule import plan_of
from arvideo_dist.train.run import changes
from arvideo_dist.train.trained import read_weights


@overload
def derive_checked(config: TrainingConfig) -> Derived: ...
@overload
def derive_checked(config: RunConfig) -> Workload: ...
def derive_checked(config: RunConfig) -> Workload:
    """The derived numbers of a run whose data set exists; ValueError says what is missing and where to set it."""
    if isinstance(config, SequenceConfig):
        ((storage, split),) = data_sets(config.data)
        return derive_sequence(config, load_manifest(storage, split).samples)
    assert isinstance(config, TrainingConfig)
    clips = clips_per_epoch(config.data)
    if config.data.val_split is not None:
        load_manifest(data_sets(config.data)[0][0], config.data.val_split)
    return derive(config, clips)


def planned_places(config: RunConfig, derived: Workload, state: Mapping[str, Any] | None) -> int:
    """Places of the whole run that goes on from a checkpoint's `state`, or begins (None)."""
    if isinstance(derived, Viewed):
        assert derived.total_places is not None
        return derived.total_places
    assert isinstance(config, TrainingConfig)
    assert isinstance(derived, Derived)
    return plan_of(config, derived, state).total_places


def with_absolute_paths(config: Root) -> Root:
    """Local paths made absolute, since workers have other working directories.

    Inside a Ray job a relative `run.storage_path` would lie in the job's temporary copy of the working
    directory, which disappears: ValueError.
    """
    if not _is_absolute(config.run.storage_path) and _inside_ray_job():
        raise ValueError(
            f"run.storage_path {config.run.storage_path!r} is relative, and this is a Ray job, whose working "
            "directory is temporary: give an absolute path on shared storage or a URI (s3://...), for example "
            "as ARVIDEO__RUN__STORAGE_PATH"
        )
    run = config.run.model_copy(update={"storage_path": Storage(config.run.storage_path).address})
    path = None if config.data.path is None else Storage(config.data.path).address
    data = config.data.model_copy(update={"path": path})
    if isinstance(data, PretrainDataConfig):
        others = (each.model_copy(update={"path": Storage(each.path).address}) for each in data.mixture)
        data = data.model_copy(update={"mixture": tuple(others)})
    model = config.model
    if model.init_from is not None:
        model = model.model_copy(update={"init_from": Storage(model.init_from).address})
    settled = config.model_copy(update={"run": run, "data": data, "model": model})
    if isinstance(settled, PretrainConfig) and settled.measure.path is not None:
        measure = settled.measure.model_copy(update={"path": Storage(settled.measure.path).address})
        settled = settled.model_copy(update={"measure": measure})
    return settled


def check_initial_weights(config: RunConfig) -> None:
    """Read `model.init_from` once, so that weights of another encoder stop the command and not the workers.

    A run that has a checkpoint goes on from that and does not need them.
    """
    new = not complete_checkpoints(run_folder(config))
    if isinstance(config, TrainingConfig) and config.model.init_from is not None and new:
        task = task_of(config)
        task.start_from(task.build(), read_weights)


def check_resume(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that the run goes on from; ValueError for what `run.resume` and `run.allow_change` refuse."""
    changes.check_allowed_names(config)
    run = run_folder(config)
    found = complete_checkpoints(run)
    if config.run.resume == "must" and not found:
        raise ValueError(
            f"run.resume is 'must' but {run.uri} has no complete checkpoint: check run.storage_path and "
            "run.name, or set run.resume to 'auto'"
        )
    if config.run.resume == "never" and found:
        raise ValueError(
            f"run.resume is 'never' but {run.uri} has checkpoint {found[-1]}: choose another run.name, or "
            "set run.resume to 'auto' to continue it"
        )
    digests, precision = changes.data_digests(config.data), _precision_if_known(config)
    for name in reversed(found):
        try:
            checkpoint = Checkpoint(run, name)
        except (CheckpointError, ValidationError, FileNotFoundError):
            continue  # the workers name what is damaged and use the one before it, and so does this check
        changes.refuse_changes(checkpoint.state, config, digests, precision, str(checkpoint))
        return checkpoint
    return None


def _precision_if_known(config: RunConfig) -> str | None:
    """What the workers will compute in, if the cluster's kind does not decide it."""
    if config.cluster.device == "auto" and config.precision == "auto":
        return None
    return config.precision_on(config.cluster.device)


def wait_for_checkpoints(config: RunConfig) -> int:
    """Wait, before anything is written, for a store that shows less of this run than its lease or MLflow tells.

    Returns and raises what `seen.wait_until_seen_again` does.
    """

    def seen_by_mlflow() -> int:
        from arvideo_dist.train.tracking import runs as tracking

        return tracking.newest_checkpoint(config, run_folder(config), seen.CHECKPOINT_TAG)

    return seen.wait_until_seen_again(run_folder(config), seen_by_mlflow)


def _inside_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _is_absolute(path: str) -> bool:
    return "://" in path or os.path.isabs(os.path.expanduser(path))
