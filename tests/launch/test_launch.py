"""How often the driver starts workers again, and on what."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.preemption import PreemptionInfo

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data.index import manifest_name
from arvideo_dist.launch import driver as launch
from arvideo_dist.launch import nodes
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import CrashLoopError, Interruption, RunInterruptedError


class _NoWatch(contextlib.nullcontext):
    """No hangs: the monitor is an actor, and these workers are made up."""

    monitor = None

    def __init__(self, *_: object) -> None:
        super().__init__(self)

    def new_workers(self) -> str:
        return "workers"

    def have_begun(self) -> bool:
        return True

    def reason(self) -> None:
        return None


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a made-up cluster has at the moment."""
    resources: dict[str, float] = {}
    monkeypatch.setattr(launch, "connect", lambda config: None)
    monkeypatch.setattr(launch, "HangWatch", _NoWatch)
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(nodes, "free_places", lambda bundle: {"node": 16})
    return resources


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Of a run whose data set is there, as far as the driver looks."""
    Storage(str(tmp_path / "data")).write_bytes(manifest_name("train"), b"{}")
    run = {"name": "run", "storage_path": str(tmp_path), "max_restarts": 1}
    return {"run": run, "data": {"path": str(tmp_path / "data")}}


@pytest.mark.usefixtures("resources")
def test_lost_workers_are_forgiven_as_long_as_the_run_advances_between_them(
    sections: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PretrainConfig.model_validate(sections)
    run = launch.run_folder(config)
    steps = iter([100, 200, 300, 400, 400, 500])  # newest checkpoint when each set of workers was lost

    def lose_workers(*_: object) -> None:
        run.write_bytes(f"{FOLDER}/step-{next(steps):08d}/{MANIFEST}", b"{}")
        raise ray.train.WorkerGroupError("lost", worker_failures={1: RuntimeError("lost")})

    monkeypatch.setattr(launch, "_fit_once", lose_workers)
    with (
        acquire(run, lease_s=600) as lease,
        pytest.raises(CrashLoopError, match="2 times since checkpoint step-00000400"),
    ):
        launch._fit(config, derive(config, samples=None), "sqlite:///nowhere.db", "id", lease)
    assert next(steps) == 500
    said = capsys.readouterr().out
    assert said.count("workers were lost: rank 1: RuntimeError: lost\nrestart 1 of 1") == 4


def test_workers_that_lost_all_gpu_nodes_wait_for_gpus_and_do_not_go_on_on_cpus(
    sections: dict[str, dict[str, Any]], resources: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig.model_validate({**sections, "cluster": {"workers": 2}})
    assert config.cluster.device == "auto"
    resources.update(CPU=16, GPU=2)
    asked: list[tuple[bool, str]] = []

    class LosesItsNode:
        def __init__(self, *_: Any, scaling_config: Any, torch_config: Any, **__: Any) -> None:
            asked.append((scaling_config.use_gpu, torch_config.backend))

        def fit(self) -> None:
            resources.pop("GPU", None)
            raise ray.train.WorkerGroupError("lost", worker_failures={1: RuntimeError("lost")})

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", LosesItsNode)
    with acquire(launch.run_folder(config), lease_s=600) as lease, pytest.raises(CrashLoopError):
        launch._fit(config, derive(config, samples=None), "sqlite:///nowhere.db", "id", lease)
    assert asked == [(True, "nccl")] * 2


@pytest.mark.usefixtures("resources")
def test_sets_that_make_way_lost_their_room_or_left_with_their_nodes_cost_no_restart(
    sections: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections["run"]["max_restarts"] = 0
    config = PretrainConfig.model_validate({**sections, "cluster": {"workers": [1, 8]}})
    no_room = ray.train.ControllerError(WorkerGroupStartupTimeoutError(3))
    taken = ray.train.PreemptionError(PreemptionInfo(None, {"b": [1]}), drain_timed_out=True)
    ends: list[Any] = [Interruption("room", 5, goes_on=True), no_room, taken, None]
    places, numbers = iter([2, 3, 4, 1]), []

    def fit_once(*arguments: Any) -> Interruption | None:
        numbers.append(arguments[5])
        end = ends[len(numbers) - 1]
        if isinstance(end, BaseException):
            raise end
        result: Interruption | None = end
        return result

    monkeypatch.setattr(launch, "_fit_once", fit_once)
    monkeypatch.setattr(nodes.Room, "wait", lambda room, stop_if_asked: next(places))
    with acquire(launch.run_folder(config), lease_s=600) as lease:
        launch._fit(config, derive(config, samples=None), "sqlite:///nowhere.db", "id", lease)
    assert numbers == [2, 3, 4, 1]
    said = capsys.readouterr().out
    assert "interrupted after step 5: room" in said
    assert "the room for the workers was gone before they started" in said
    assert "workers were lost with nodes that had a preemption notice" in said
    assert "restart" not in said


@pytest.mark.usefixtures("resources")
def test_a_run_whose_workers_have_not_begun_ends_at_once_when_asked(
    sections: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig.model_validate({**sections, "cluster": {"workers": 2}})

    class NeverBegins:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            lease.ask_to_stop("SIGTERM")
            threading.Event().wait()

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", NeverBegins)
    monkeypatch.setattr(_NoWatch, "have_begun", lambda self: False)
    with (
        acquire(launch.run_folder(config), lease_s=600) as lease,
        pytest.raises(RunInterruptedError, match="SIGTERM while no workers ran"),
    ):
        launch._fit(config, derive(config, samples=None), "sqlite:///nowhere.db", "id", lease)
