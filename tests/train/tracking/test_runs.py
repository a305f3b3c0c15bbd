"""One MLflow run for one training run, and each point once, without reading what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow.tracking import MlflowClient

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.storage import Storage
from arvideo_dist.train.tracking.runs import RUN_FILE, Tracker, open_run, tracking_uri


class Killed(BaseException):
    """What ends the process."""


class KilledBeforeItsRecord(Storage):
    def write_bytes(self, name: str, data: bytes) -> None:
        if name == RUN_FILE:
            raise Killed
        super().write_bytes(name, data)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all tests here: to make a database takes seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def config(storage: Path, request: pytest.FixtureRequest) -> PretrainConfig:
    name = request.node.name
    return PretrainConfig.model_validate(
        {"run": {"name": name, "storage_path": str(storage)}, "tracking": {"experiment": name}}
    )


def _client(config: PretrainConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(config))


def _active(config: PretrainConfig) -> list[Any]:
    client = _client(config)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return list(client.search_runs([experiment.experiment_id]))


def _start_and_be_killed(config: PretrainConfig) -> None:
    with pytest.raises(Killed):
        open_run(config, {}, KilledBeforeItsRecord(run_folder(config).address))


def test_a_start_that_is_killed_before_its_record_leaves_no_second_mlflow_run(
    config: PretrainConfig,
) -> None:
    _start_and_be_killed(config)
    (left,) = _active(config)
    run_id = open_run(config, {"parameters": 1}, run_folder(config))
    assert [run.info.run_id for run in _active(config)] == [run_id] == [left.info.run_id]
    assert open_run(config, {}, run_folder(config)) == run_id


def test_a_start_that_was_killed_with_other_settings_is_replaced(
    config: PretrainConfig,
) -> None:
    _start_and_be_killed(config)
    changed = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    run_id = open_run(changed, {}, run_folder(config))
    (run,) = _active(config)
    assert (run.info.run_id, run.data.params["run.seed"]) == (run_id, "1")


def test_a_request_that_made_two_runs_leaves_one(
    config: PretrainConfig,
) -> None:
    create = MlflowClient.create_run

    def twice(*args: Any, **options: Any) -> Any:
        create(*args, **options)
        return create(*args, **options)

    with mock.patch.object(MlflowClient, "create_run", twice):
        run_id = open_run(config, {}, run_folder(config))
    assert [run.info.run_id for run in _active(config)] == [run_id]


def test_a_run_begun_anew_in_a_folder_of_the_same_name_is_another_mlflow_run(
    config: PretrainConfig,
) -> None:
    first = open_run(config, {}, run_folder(config))
    for file in Path(run_folder(config).root).iterdir():
        file.unlink()
    second = open_run(config, {}, run_folder(config))
    assert {run.info.run_id for run in _active(config)} == {first, second}
    assert first != second


def test_the_last_steps_are_learnt_without_reading_a_history(
    config: PretrainConfig,
) -> None:
    uri, client = tracking_uri(config), _client(config)
    run_id = open_run(config, {}, run_folder(config))
    before = Tracker(uri, run_id, lambda: None)
    for step, value in ((1, 9.0), (2, float("nan")), (30, 0.5), (4, 7.0)):
        before.log(step, {"loss/train": value})
    before.log(6, {"loss/val": 2.0})
    with mock.patch.object(MlflowClient, "get_metric_history", side_effect=AssertionError("reads it all")):
        after = Tracker(uri, run_id, lambda: None)
        for step in (6, 29, 30, 31):
            after.log(step, {"loss/train": 0.25, "loss/val": 1.0})
    points = client.get_metric_history(run_id, "loss/train")
    assert sorted(point.step for point in points) == [1, 2, 30, 31]
    points = client.get_metric_history(run_id, "loss/val")
    assert sorted((point.step, point.value) for point in points) == [
        (6, 2.0),
        (29, 1.0),
        (30, 1.0),
        (31, 1.0),
    ]
