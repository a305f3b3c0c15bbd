"""How often the driver starts workers again."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.train

from arvideo_dist.config import RunConfig
from arvideo_dist.derived import derive
from arvideo_dist.train import launch
from arvideo_dist.train.checkpoint import FOLDER, MANIFEST
from arvideo_dist.train.lease import acquire


def test_lost_workers_are_forgiven_as_long_as_the_run_advances_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.model_validate({"run": {"name": "run", "storage_path": str(tmp_path)}})
    run = launch.run_folder(config)
    steps = iter([100, 200, 300, 300, 400])  # newest checkpoint when the workers of each attempt were lost

    def lose_workers(*_: object) -> None:
        run.write_bytes(f"{FOLDER}/step-{next(steps):08d}/{MANIFEST}", b"{}")
        raise ray.train.WorkerGroupError("lost", worker_failures={0: RuntimeError("lost")})

    monkeypatch.setattr(launch, "connect", lambda config: None)
    monkeypatch.setattr(launch, "_fit_once", lose_workers)
    with acquire(run, lease_s=600) as lease, pytest.raises(ray.train.WorkerGroupError):
        launch._fit(config, derive(config, samples=None), "uri", "id", lease)
    assert next(steps) == 400
