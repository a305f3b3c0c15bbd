"""From a configuration to training workers: checks, Ray, Ray Train, and what the terminal shows at the end."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict, dataclass
from typing import Any

from arvideo_dist.config import RunConfig
from arvideo_dist.data.index import load_manifest
from arvideo_dist.derived import Derived, derive
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint import FOLDER, complete_checkpoints

_COLLECTIVE_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    metrics: dict[str, float]
    run_folder: str
    checkpoint: str
    mlflow_run_id: str


def derive_checked(config: RunConfig) -> Derived:
    """The derived numbers of a run whose data set exists; ValueError says what is missing and where to set it."""
    if config.data.path is None:
        raise ValueError(
            "data.path is not set: give the folder or URI that data_prep wrote, as --data.path, in the "
            "YAML file, or as ARVIDEO__DATA__PATH"
        )
    data = Storage(config.data.path)
    if config.data.val_split is not None:
        load_manifest(data, config.data.val_split)
    return derive(config, load_manifest(data, config.data.split).samples)


def with_absolute_paths(config: RunConfig) -> RunConfig:
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
    run = config.run.model_copy(update={"storage_path": Storage(config.run.storage_path).uri})
    path = None if config.data.path is None else Storage(config.data.path).uri
    return config.model_copy(update={"run": run, "data": config.data.model_copy(update={"path": path})})


def check_resume(config: RunConfig) -> None:
    """Refuse what `run.resume` refuses."""
    run = Storage(config.run.storage_path).child(config.run.name)
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


def launch(config: RunConfig, derived: Derived) -> Finished:
    """Run the training on Ray and return when it has ended. Raises what ended it otherwise."""
    from arvideo_dist import tracking  # MLflow and Ray take seconds to import: only after all checks

    run_id = tracking.open_run(config, asdict(derived))
    run = Storage(config.run.storage_path).child(config.run.name)
    status = "FAILED"
    try:
        metrics = _fit(config, derived, tracking.tracking_uri(config), run_id, run)
        status = "FINISHED"
    finally:
        tracking.close_run(config, run_id, status)
    return Finished(
        metrics=metrics,
        run_folder=run.uri,
        checkpoint=f"{run.uri}/{FOLDER}/{complete_checkpoints(run)[-1]}",
        mlflow_run_id=run_id,
    )


def _fit(config: RunConfig, derived: Derived, uri: str, run_id: str, run: Storage) -> dict[str, float]:
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _connect(config)
    try:
        use_gpu = _use_gpu(config, ray.cluster_resources())
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "derived": asdict(derived),
                "tracking_uri": uri,
                "mlflow_run_id": run_id,
            },
            scaling_config=ScalingConfig(
                num_workers=config.cluster.workers,
                use_gpu=use_gpu,
                resources_per_worker={
                    "CPU": config.cluster.cpus_per_worker,
                    **({"GPU": 1} if use_gpu else {}),
                },
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
            run_config=RayRunConfig(
                # Ray's own bookkeeping; what a restart continues from are the run's checkpoints alone.
                name=datetime.datetime.now(datetime.UTC).strftime("attempt-%Y%m%dT%H%M%S"),
                storage_path=run.child("ray").uri,
                failure_config=FailureConfig(max_failures=config.run.max_restarts),
            ),
        )
        result = trainer.fit()
    finally:
        ray.shutdown()
    assert result.metrics is not None
    return dict(result.metrics)


def _connect(config: RunConfig) -> None:
    """Join the named or surrounding cluster, or start Ray on this machine."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.cluster.address or ("auto" if _inside_ray_job() else os.environ.get("RAY_ADDRESS"))
    if address is not None:
        ray.init(address=address)
        return
    # All on this machine: as many slots as asked for, so that a small machine queues nothing for ever.
    slots = max(os.cpu_count() or 1, config.cluster.workers * config.cluster.cpus_per_worker)
    ray.init(address="local", num_cpus=slots)


def _use_gpu(config: RunConfig, resources: dict[str, float]) -> bool:
    if config.cluster.device != "auto":
        return config.cluster.device == "cuda"
    return resources.get("GPU", 0) > 0


def _worker(payload: dict[str, Any]) -> None:
    """Runs in every Ray Train worker, with the process group up."""
    import ray.train
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from arvideo_dist.train.loop import Task, train

    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    control = dist.new_group(backend="gloo")
    task = Task(
        config=RunConfig.model_validate(payload["config"]),
        derived=Derived(**payload["derived"]),
        tracking_uri=payload["tracking_uri"],
        mlflow_run_id=payload["mlflow_run_id"],
    )
    ray.train.report(train(task, device, control))


def _inside_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _is_absolute(path: str) -> bool:
    return "://" in path or os.path.isabs(os.path.expanduser(path))
