"""The driver while the store that has its run is away: nothing is given up early, and nothing ends without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from arvideo_dist.config import RunConfig
from arvideo_dist.derived import derive
from arvideo_dist.train import launch
from arvideo_dist.train.lease import acquire
from arvideo_dist.train.stop import RESULT, RunInterruptedError
from tests.services.relays import CutOff
from tests.services.s3 import S3


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    s3.make_bucket("away")
    return "away"


@pytest.fixture
def relay(s3: S3) -> Iterator[CutOff]:
    relay = CutOff(s3.address)
    yield relay
    relay.close()


@pytest.fixture
def config(s3: S3, bucket: str, relay: CutOff, tmp_path: Path) -> RunConfig:
    """A run that lies behind the relay."""
    return RunConfig.model_validate(
        {
            "run": {
                "name": "run",
                "storage_path": s3.uri(f"{bucket}/{tmp_path.name}", through=relay.address),
                "max_restarts": 1,
                "lease_s": 3,
            },
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        }
    )


def test_a_status_that_is_not_set_since_the_store_is_away_is_said_and_set_by_the_same_command(
    config: RunConfig, relay: CutOff, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, derived = launch.run_folder(config), derive(config, samples=None)
    with ExitStack() as outage:

        def end_as_the_store_goes(*_: object) -> None:
            outage.enter_context(relay.cut())
            raise RunInterruptedError("SIGTERM")

        monkeypatch.setattr(launch, "_fit", end_as_the_store_goes)
        with pytest.raises(RunInterruptedError), acquire(run, config.run.lease_s) as lease:
            launch.launch(config, derived, lease)
    said = capsys.readouterr().out
    assert f"{run.uri} does not tell whether this run is still ours: " in said
    (mlflow_run,) = MlflowClient(config.tracking.uri).search_runs(["1"])
    assert f"the status KILLED of MLflow's run {mlflow_run.info.run_id} is not set; the same command" in said
    assert mlflow_run.info.status == "RUNNING"

    monkeypatch.setattr(launch, "_fit", lambda *_: run.write_bytes(RESULT, b"{}"))
    with acquire(run, config.run.lease_s) as lease:
        launch.launch(config, derived, lease)
    assert MlflowClient(config.tracking.uri).get_run(mlflow_run.info.run_id).info.status == "FINISHED"
