"""The driver while the store of its run is away: nothing is given up early, nothing ends without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train

from arvideo_dist.checks import finding
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data import index
from arvideo_dist.launch import driver as launch
from arvideo_dist.launch import nodes
from arvideo_dist.launch.preemption import wait_to_restart
from arvideo_dist.pretrain import main
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint import seen
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST
from arvideo_dist.train.run.lease import Lease, LeaseLostError, acquire
from arvideo_dist.train.run.stop import RunInterruptedError
from arvideo_dist.train.tracking import runs as tracking
from tests.launch.test_launch import _NoWatch
from tests.services.relays import CutOff
from tests.services.s3 import S3
from tests.train.run.test_lease import acquire_released


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
def config(s3: S3, bucket: str, relay: CutOff, tmp_path: Path) -> PretrainConfig:
    """A run that lies behind the relay; its data does not."""
    Storage(str(tmp_path / "data")).write_bytes(index.manifest_name("train"), b"{}")
    return PretrainConfig.model_validate(
        {
            "run": {
                "name": "run",
                "storage_path": s3.uri(f"{bucket}/{tmp_path.name}", through=relay.address),
                "max_restarts": 1,
                "lease_s": 3,
            },
            "data": {"path": str(tmp_path / "data"), "val_split": None},
        }
    )


def test_a_status_is_set_by_who_has_the_run_and_where_the_store_does_not_tell_it_is_said(
    config: PretrainConfig, relay: CutOff, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(tracking, "close_run", lambda config, run_id, status: closed.append(status))
    run = launch.run_folder(config)
    lease = acquire(run, config.run.lease_s)
    with relay.cut():
        launch._close(config, "the-id", "KILLED", lease)
    said = capsys.readouterr().out
    assert f"{run.uri} does not tell whether this run is still ours: " in said
    assert (
        "the status KILLED of MLflow's run the-id is not set; the same command, given again, sets it" in said
    )
    assert closed == []
    launch._close(config, "the-id", "FINISHED", lease)
    assert closed == ["FINISHED"]
    acquire_released(run)
    launch._close(config, "the-id", "FAILED", lease)
    assert closed == ["FINISHED"], "it is the other driver's"
    assert capsys.readouterr().out == ""


class Outage:
    """The store goes as the first workers are lost and comes back at the `looks`-th pause after a look at it."""

    def __init__(
        self, config: PretrainConfig, relay: CutOff, monkeypatch: pytest.MonkeyPatch, looks: int
    ) -> None:
        self.run, self.relay, self.looks = launch.run_folder(config), relay, looks
        self.fits = self.pauses = 0
        self.stack = ExitStack()
        monkeypatch.setattr(launch, "connect", lambda config: None)
        monkeypatch.setattr(launch, "HangWatch", _NoWatch)
        monkeypatch.setattr(ray, "cluster_resources", dict)
        monkeypatch.setattr(nodes, "free_places", lambda bundle: {"node": 16})
        monkeypatch.setattr(launch, "_fit_once", self.fit_once)
        monkeypatch.setattr(launch, "wait_to_restart", self.wait)

    def fit_once(self, *_: object) -> None:
        self.fits += 1
        if self.fits == 1:
            self.run.write_bytes(f"{FOLDER}/step-00000100/{MANIFEST}", b"{}")
            self.stack.enter_context(self.relay.cut())
            raise ray.train.WorkerGroupError("lost", worker_failures={1: RuntimeError("no store")})

    def wait(self, lease: Lease, seconds: float) -> None:
        wait_to_restart(lease, 0.01)
        if seconds == seen.PAUSE_S:
            self.pauses += 1
            if self.pauses == self.looks:
                self.back(lease)

    def back(self, lease: Lease) -> None:
        self.stack.close()


def _fit(config: PretrainConfig, lease: Lease) -> None:
    launch._fit(config, derive(config, samples=None), "sqlite:///nowhere.db", "id", lease)


def test_a_store_that_is_away_as_workers_are_lost_costs_one_restart_however_long_it_is_away(
    config: PretrainConfig, relay: CutOff, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outage = Outage(config, relay, monkeypatch, looks=2)
    with acquire(outage.run, lease_s=600) as lease:
        _fit(config, lease)
    assert outage.fits == 2
    said = capsys.readouterr().out
    assert said.count("new workers wait for storage, for up to 60 minutes: ") == 1
    assert said.count("restart 1 of 1 since checkpoint step-00000100") == 1


def test_data_whose_mount_is_away_as_workers_are_lost_costs_one_restart_too(
    config: PretrainConfig,
    relay: CutOff,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outage = Outage(config, relay, monkeypatch, looks=2)
    data, elsewhere = tmp_path / "data", tmp_path / "unmounted"

    def fit_once(*_: object) -> None:
        outage.fits += 1
        if outage.fits == 1:
            outage.run.write_bytes(f"{FOLDER}/step-00000100/{MANIFEST}", b"{}")
            data.rename(elsewhere)
            data.mkdir()
            raise ray.train.WorkerGroupError("lost", worker_failures={1: RuntimeError("no shard")})

    def mount_again(lease: Lease) -> None:
        data.rmdir()
        elsewhere.rename(data)

    monkeypatch.setattr(launch, "_fit_once", fit_once)
    monkeypatch.setattr(outage, "back", mount_again)
    with acquire(outage.run, lease_s=600) as lease:
        _fit(config, lease)
    assert outage.fits == 2
    said = capsys.readouterr().out
    assert f"for up to 60 minutes: {data} has no dataset-train.json any more: is its mount there?" in said
    assert said.count("restart 1 of 1 since checkpoint step-00000100") == 1


def test_waiting_for_a_store_ends_at_once_when_the_run_is_asked_to_stop(
    config: PretrainConfig, relay: CutOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(config, relay, monkeypatch, looks=0)
    waiting = "SIGTERM while no workers ran; the same command continues"
    with outage.stack:
        lease = acquire(outage.run, lease_s=600)

        def lose_and_be_asked(*_: object) -> None:
            lease.ask_to_stop("SIGTERM")
            outage.fit_once()

        monkeypatch.setattr(launch, "_fit_once", lose_and_be_asked)
        with pytest.raises(RunInterruptedError, match=waiting):
            _fit(config, lease)
    assert outage.fits == 1


def test_a_run_that_was_taken_over_while_its_store_was_away_starts_no_workers(
    config: PretrainConfig,
    s3: S3,
    bucket: str,
    relay: CutOff,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outage = Outage(config, relay, monkeypatch, looks=1)
    beside_the_relay = Storage(s3.uri(f"{bucket}/{tmp_path.name}")).child(config.run.name)

    def take_over(lease: Lease) -> None:
        acquire_released(beside_the_relay)
        outage.stack.close()

    monkeypatch.setattr(outage, "back", take_over)
    with pytest.raises(LeaseLostError, match="generation 2, this one is 1"):
        _fit(config, acquire(outage.run, lease_s=600))
    assert outage.fits == 1


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store lets anybody look."""

    def refuse(self: Storage, name: str = "") -> Any:
        raise OSError("When listing objects: AWS Error ACCESS_DENIED: Access Denied")

    monkeypatch.setattr(Storage, "names", refuse)
    monkeypatch.setattr(Storage, "exists", refuse)


def test_what_time_does_not_mend_is_not_waited_for(
    config: PretrainConfig, request: pytest.FixtureRequest
) -> None:
    lease = acquire(launch.run_folder(config), lease_s=600)
    request.getfixturevalue("refused")
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        launch._newest_once_stores_answer(config, lease)


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry-run", "start"])
def test_a_store_that_stays_away_ends_the_command_with_one_line_and_the_code_for_the_same_command(
    options: list[str],
    s3: S3,
    bucket: str,
    relay: CutOff,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "patiently", lambda action, *_, **__: action())  # three minutes of patience
    monkeypatch.setattr(finding, "WAITS_S", ())
    monkeypatch.setattr(finding.retried, "__defaults__", ((),))
    away = s3.uri(f"{bucket}/set", through=relay.address)
    with relay.cut(), pytest.raises(SystemExit) as ended:
        main([*options, "--data.path", away, "--run.storage_path", away])
    assert ended.value.code == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: storage or network failed: ")
    assert line.endswith("; the same command continues once it is back")


@pytest.mark.usefixtures("refused")
def test_a_storage_fault_that_needs_a_person_is_told_from_one_that_passes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", "--data.path", str(tmp_path)])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ACCESS_DENIED" in line
    assert line.endswith("; mend that, then the same command continues")
