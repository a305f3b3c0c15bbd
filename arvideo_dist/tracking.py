"""MLflow: one MLflow run for one training run, continued across restarts, each point once.

The driver opens the run (`open_run`); rank 0 writes to it (`Tracker`). Steps that are replayed after a restart
give the same values and are not written again.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from arvideo_dist.config import RunConfig
from arvideo_dist.storage import Storage

RUN_FILE = "run.json"  # in the run's folder: which MLflow run it is


def tracking_uri(config: RunConfig) -> str:
    """The configured server, or a sqlite file in the run's (local) storage; ValueError where that is remote."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    storage = Storage(config.run.storage_path)
    if not storage.is_local:
        raise ValueError(
            f"run.storage_path {storage.uri} is remote, so MLflow cannot keep its database there: "
            "set tracking.uri to a tracking server (http://...) or a local sqlite:///file.db"
        )
    return f"sqlite:///{storage.path('mlflow.db')}"


def dashboard_command(config: RunConfig) -> str:
    """What a person does to see the run."""
    uri = tracking_uri(config)
    if uri.startswith("http"):
        return f"open {uri}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
    return f"{mlflow} ui --backend-store-uri {uri}"


def open_run(config: RunConfig, derived: Mapping[str, Any], folder: Storage) -> str:
    """Id of the MLflow run of this training run: the one that `run.json` in its `folder` names, or a new one.

    Raises ValueError where the tracking server does not know the run any more, or does not answer.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    try:
        if folder.exists(RUN_FILE):
            run_id = str(json.loads(folder.read_bytes(RUN_FILE))["mlflow_run_id"])
            client.get_run(run_id)
            client.update_run(run_id, status="RUNNING")
            return run_id
        run_id = client.create_run(
            _experiment_id(client, config), run_name=config.run.name, tags={"arvideo.run": folder.uri}
        ).info.run_id
        _log_parameters(client, run_id, config)
        client.log_text(
            run_id, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), "config.yaml"
        )
        client.log_dict(run_id, dict(derived), "derived.json")
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {uri}: {error}. Check tracking.uri; {folder.uri}/{RUN_FILE} names the MLflow run "
            "that this run continues, if it exists: use another run.name to begin a new one"
        ) from error
    folder.write_bytes(RUN_FILE, json.dumps({"mlflow_run_id": run_id, "tracking_uri": uri}).encode())
    return run_id


def close_run(config: RunConfig, run_id: str, status: str) -> None:
    """Set the final status: FINISHED, FAILED, or KILLED for a run that was asked to end."""
    MlflowClient(tracking_uri=tracking_uri(config)).set_terminated(run_id, status)


class Tracker:
    """Writes points, pictures and files of one run; each (metric, step) once, also after a restart."""

    def __init__(self, uri: str, run_id: str, before_write: Callable[[], None]) -> None:
        """`before_write` is called before everything that is written, and may refuse it by raising."""
        self._before_write = before_write
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = run_id
        self._last_steps: dict[str, int] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each metric at `step`, in one transaction; points that exist already are left out."""
        new = {key: value for key, value in metrics.items() if step > self._last_step(key)}
        if not new:
            return
        now = get_current_time_millis()
        self._before_write()
        self._client.log_batch(
            self._run_id, metrics=[Metric(key, float(value), now, step) for key, value in new.items()]
        )
        self._last_steps.update(dict.fromkeys(new, step))

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self._run_id, key, value)

    def log_picture(self, name: str, picture_hwc: np.ndarray) -> None:
        """A uint8 picture [H, W, 3] as artifact `name` (.png)."""
        self._before_write()
        self._client.log_image(self._run_id, picture_hwc, artifact_file=name)

    def log_bytes(self, name: str, data: bytes) -> None:
        """A file with content `data` as artifact `name`, which may name folders (`folder/file`)."""
        self._before_write()
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / file
            local.write_bytes(data)
            self._client.log_artifact(self._run_id, str(local), artifact_path=folder or None)


def tracker_of(folder: Storage) -> Tracker:
    """Of the MLflow run that a training run's folder names.

    Raises ValueError where it names none, or where the database or server does not have it.
    """
    if not folder.exists(RUN_FILE):
        raise ValueError(f"{folder.uri} has no {RUN_FILE}, which names its MLflow run")
    record = json.loads(folder.read_bytes(RUN_FILE))
    uri, run_id = record["tracking_uri"], record["mlflow_run_id"]
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():  # a client would make an empty one
        raise ValueError(f"{folder.uri}/{RUN_FILE} names MLflow's database {database}, which is not there")
    try:
        MlflowClient(tracking_uri=uri).get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri}, named by {folder.uri}/{RUN_FILE}: {error}") from error
    return Tracker(uri, run_id, before_write=lambda: None)  # what is added belongs to no training step


def _experiment_id(client: MlflowClient, config: RunConfig) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if config.tracking.uri is None:  # beside the database; a server has a place of its own
        location = Storage(config.run.storage_path).path("mlartifacts")
    return str(client.create_experiment(name, artifact_location=location))


def _log_parameters(client: MlflowClient, run_id: str, config: RunConfig) -> None:
    parameters = [
        Param(f"{section}.{field}", str(value))
        for section, fields in config.model_dump(mode="json").items()
        for field, value in fields.items()
    ]
    client.log_batch(run_id, params=parameters)
