"""MLflow: one MLflow run for one training run, continued across restarts, each point once.

The driver opens and closes the run (`open_run`, `close_run`); rank 0 writes to it, through a queue that outlives
MLflow's absence (`outbox.py`) and the `Tracker`. Steps that are replayed after a restart give the same values and
are not written again. A request whose answer was lost may be repeated: MLflow's SQL store takes a point of the same
key, step, time and value for the one that it has (primary key of its table `metrics`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests
import yaml
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from arvideo_dist.config.commands import RunConfig
from arvideo_dist.storage import Storage, lasts, patiently, shown, without_credentials

RUN_FILE = "run.json"  # in the run's folder: which MLflow run it is
# A name that no other run has, also none of the same folder before it. It is written before the MLflow run is made
# and is one of its tags from the first moment, so that a start that was killed before RUN_FILE stood is taken up.
IDENTITY_FILE = "identity.json"
IDENTITY_TAG = "arvideo.run_id"
FOLDER_TAG = "arvideo.run"  # of the MLflow run: the training run's folder
# MLflow's client repeats a request for minutes by itself, and waits two for each answer. Here it does so once, at
# once, which is enough for a connection that the server had closed; who can wait repeats it again. Variables that
# are set already are left.
_REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_CLOSING_S = 60.0
_PAUSE_S = 2.0


def tracking_uri(config: RunConfig) -> str:
    """The configured server, or a sqlite file in the run's (local) storage; ValueError if that is remote."""
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
        return f"open {shown(uri)}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
    return f"{mlflow} ui --backend-store-uri {shown(uri)}"


def refuses(error: Exception) -> bool:
    """Whether MLflow, or who stands before it, says that the request is wrong; else it is taken to be away."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:  # of artifacts
        status = error.response.status_code
    else:
        return False
    return 400 <= status < 500 and status not in (408, 429)


def open_run(config: RunConfig, derived: Mapping[str, Any], folder: Storage) -> str:
    """Id of the MLflow run of this training run: the one that `run.json` in its `folder` names, or a new one.

    Raises ValueError if the tracking server refuses, or does not know the run any more, and OSError if a new
    run cannot reach it. A run that continues does not need one: this says so.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    known = None
    if patiently(lambda: folder.exists(RUN_FILE)):
        known = str(json.loads(patiently(lambda: folder.read_bytes(RUN_FILE)))["mlflow_run_id"])
    try:
        client = _client(uri)
        if known is not None:
            client.update_run(known, status="RUNNING")
            return known
        run_id = _new_run(client, config, derived, folder)
    except (MlflowException, requests.HTTPError, OSError) as error:
        if known is not None and not refuses(error):
            print(
                f"MLflow at {shown(uri)} is away: {shown(error)}\nthe run goes on without it; what it logs is kept "
                "in its folder and sent once MLflow is back",
                flush=True,
            )
            return known
        needs_a_person = refuses(error) or (isinstance(error, OSError) and lasts(error))
        raise (ValueError if needs_a_person else OSError)(
            f"MLflow at {shown(uri)}: {shown(error)}. Check tracking.uri; {folder.uri}/{RUN_FILE} names the MLflow "
            "run that this run continues, if it exists: use another run.name to begin a new one"
        ) from error
    record = json.dumps({"mlflow_run_id": run_id, "tracking_uri": uri}).encode()
    patiently(lambda: folder.write_bytes(RUN_FILE, record))
    return run_id


def _new_run(client: MlflowClient, config: RunConfig, derived: Mapping[str, Any], folder: Storage) -> str:
    """Id of a described MLflow run of this training run: one that a start before this one made, or a new one."""
    experiment, identity = _experiment_id(client, config), _identity(folder)
    before = _runs_of(client, experiment, identity)
    if not before:
        tags = {FOLDER_TAG: folder.uri, IDENTITY_TAG: identity}
        client.create_run(experiment, run_name=config.run.name, tags=tags)
    # A request whose answer was lost is repeated by MLflow's client, and makes two.
    run_id, *doubles = before or _runs_of(client, experiment, identity)
    for double in doubles:
        client.delete_run(double)
    try:
        _log_parameters(client, run_id, config)
        resolved = without_credentials(config.model_dump(mode="json"))
        client.log_text(run_id, yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
        client.log_dict(run_id, dict(derived), "derived.json")
    except Exception as error:
        # Nothing is logged in it yet: another one is made, by the next start at the latest.
        if before and refuses(error):  # that start had other parameters
            client.delete_run(run_id)
            return _new_run(client, config, derived, folder)
        with contextlib.suppress(Exception):
            client.delete_run(run_id)
        raise
    return run_id


def _identity(folder: Storage) -> str:
    if not patiently(lambda: folder.exists(IDENTITY_FILE)):
        content = json.dumps({"run_id": uuid.uuid4().hex}).encode()
        patiently(lambda: folder.write_bytes(IDENTITY_FILE, content))
    return str(json.loads(patiently(lambda: folder.read_bytes(IDENTITY_FILE)))["run_id"])


def _runs_of(client: MlflowClient, experiment: str, identity: str) -> list[str]:
    """Ids of the MLflow runs of that identity, oldest first."""
    found = client.search_runs(
        [experiment], f"tags.`{IDENTITY_TAG}` = '{identity}'", order_by=["attributes.start_time ASC"]
    )
    return [run.info.run_id for run in found]


def newest_checkpoint(config: RunConfig, folder: Storage, tag: str) -> int:
    """The step that `tag` names, of the MLflow runs that have the name and the `folder` of this training run.

    0 if there is none, or if MLflow does not say: a new run cannot start without it.
    """
    uri = tracking_uri(config)
    if not _has_database(uri):
        return 0
    try:
        client = _client(uri)
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            return 0
        named = f"attributes.run_name = '{config.run.name}'"
        runs = client.search_runs([experiment.experiment_id], named)
    except (MlflowException, OSError):
        return 0
    ours = [run for run in runs if _place(run.data.tags.get(FOLDER_TAG, "")) == _place(folder.uri)]
    return max((_step(run.data.tags.get(tag)) for run in ours), default=0)


def newest_checkpoint_of(uri: str, run_id: str, tag: str) -> int:
    """The step that `tag` of an MLflow run names; 0 if it names none, or if MLflow does not say."""
    try:
        return _step(_client(uri).get_run(run_id).data.tags.get(tag)) if _has_database(uri) else 0
    except (MlflowException, OSError):
        return 0


def _step(tag: str | None) -> int:
    return int(tag) if tag is not None and tag.isdecimal() else 0


def _place(uri: str) -> str:
    """Where a folder lies, whatever options its URI has."""
    return uri.partition("?")[0].rpartition("@")[2].rpartition("://")[2].rstrip("/")


def _has_database(uri: str) -> bool:
    """False for a file that is not there: a client would make an empty one."""
    database = uri.removeprefix("sqlite:///")
    return database == uri or Path(database).exists()


def close_run(config: RunConfig, run_id: str, status: str) -> None:
    """Set the final status: FINISHED, FAILED, or KILLED for a run that was asked to end.

    If MLflow stays away, or refuses, this says so; it is no reason for a run to fail.
    """
    uri, until = tracking_uri(config), time.monotonic() + _CLOSING_S
    while True:
        try:
            _client(uri).set_terminated(run_id, status)
            return
        except (MlflowException, OSError) as error:
            if refuses(error) or time.monotonic() + _PAUSE_S > until:
                print(
                    f"MLflow at {shown(uri)} did not take the status {status} of its run {run_id}: {shown(error)}\n"
                    "the same command, given again, sets it",
                    flush=True,
                )
                return
        time.sleep(_PAUSE_S)


def status_of(uri: str, run_id: str) -> str:
    """RUNNING, FINISHED, FAILED or KILLED. Raises what MLflow's client raises."""
    return str(_client(uri).get_run(run_id).info.status)


class RunStorageError(OSError):
    """Not MLflow fails but the run's own storage, without which nothing may be sent."""


class Tracker:
    """Writes points, tags and files of one run at once; each (metric, step) once, also after a restart.

    What fails is raised, and may be repeated whether or not MLflow has got it.
    """

    def __init__(self, uri: str, run_id: str, before_write: Callable[[], None]) -> None:
        """`before_write` is called before everything that is written, and may refuse it by raising.

        It looks into the run's storage: its OSError becomes a RunStorageError.
        """
        self._check = before_write
        self._client = _client(uri)
        self._run_id = run_id
        self._last_steps: dict[str, int] | None = None  # of each metric; None: MLflow is asked

    def log(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        """One point of each metric at `step`, in one transaction; points that exist already are left out.

        `time_ms`: when they were measured, in UNIX time, the same again if the request is repeated; None: now.
        """
        self._before_write()  # before the first look, too: a client makes a database if there is none
        last = self._last_steps_there()
        new = {key: value for key, value in metrics.items() if step > last.get(key, -1)}
        if not new:
            return
        time_ms = get_current_time_millis() if time_ms is None else time_ms
        try:
            self._client.log_batch(
                self._run_id, metrics=[Metric(key, float(value), time_ms, step) for key, value in new.items()]
            )
        except Exception:
            self._last_steps = None  # MLflow may have them all the same: it is asked again
            raise
        last.update(dict.fromkeys(new, step))

    def _before_write(self) -> None:
        try:
            self._check()
        except OSError as error:  # MLflow's client has the same type for a server that is away
            raise RunStorageError(str(error)) from error

    def _last_steps_there(self) -> dict[str, int]:
        """The newest step of each metric that MLflow has.

        MLflow keeps each metric's newest point beside its history, the one of the highest step (`latest_metrics` of
        its SQL store), and gives all of them with the run; `RunData.metrics` alone leaves the steps out.
        """
        if self._last_steps is None:
            points = self._client.get_run(self._run_id).data.to_proto().metrics
            self._last_steps = {point.key: point.step for point in points}
        return self._last_steps

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._before_write()
        self._client.set_tag(self._run_id, key, value)

    def log_bytes(self, name: str, data: bytes) -> None:
        """A file with content `data` as artifact `name`, which may name folders (`folder/file`)."""
        self._before_write()
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / file
            local.write_bytes(data)
            self._client.log_artifact(self._run_id, str(local), artifact_path=folder or None)

    def set_running(self) -> None:
        """Set the run's status to RUNNING."""
        self._before_write()
        self._client.update_run(self._run_id, status="RUNNING")

    def is_active(self) -> bool:
        """Whether MLflow has the run and lets it be written to; raises if MLflow does not say."""
        return bool(self._client.get_run(self._run_id).info.lifecycle_stage == "active")


def tracker_of(folder: Storage) -> Tracker:
    """Of the MLflow run that a training run's folder names.

    Raises ValueError if it names none, or if the database or server does not have it.
    """
    if not folder.exists(RUN_FILE):
        raise ValueError(f"{folder.uri} has no {RUN_FILE}, which names its MLflow run")
    record = json.loads(folder.read_bytes(RUN_FILE))
    uri, run_id = record["tracking_uri"], record["mlflow_run_id"]
    if not _has_database(uri):
        database = uri.removeprefix("sqlite:///")
        raise ValueError(f"{folder.uri}/{RUN_FILE} names MLflow's database {database}, which is not there")
    try:
        _client(uri).get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {shown(uri)}, named by {folder.uri}/{RUN_FILE}: {shown(error)}"
        ) from error
    return Tracker(uri, run_id, before_write=lambda: None)  # what is added belongs to no training step


def _client(uri: str) -> MlflowClient:
    for name, value in _REQUEST_LIMITS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri)


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
        for section, fields in without_credentials(config.model_dump(mode="json")).items()
        for field, value in fields.items()
    ]
    client.log_batch(run_id, params=parameters)
