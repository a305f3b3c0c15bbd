"""Workers that die before they train, on real Ray: counted by the budget of restarts, and their death told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.torch
from ray.train.torch.config import TorchConfig, _TorchBackend

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data.index import manifest_name
from arvideo_dist.launch import driver as launch
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import CrashLoopError
from arvideo_dist.train.tracking import runs as tracking


def _die() -> None:
    os._exit(3)


class _DyingBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_die)


class _DyingConfig(TorchConfig):
    """Its workers die while Ray Train sets them up."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _DyingBackend


@pytest.mark.slow
def test_workers_that_die_while_they_start_end_the_run_with_their_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train.torch, "TorchConfig", _DyingConfig)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Storage(str(tmp_path / "data")).write_bytes(manifest_name("train"), b"{}")
    config = PretrainConfig.model_validate(
        {
            "run": {"name": "run", "storage_path": str(tmp_path), "max_restarts": 1},
            "data": {"path": str(tmp_path / "data")},
            "cluster": {"workers": 1, "device": "cpu"},
        }
    )
    monkeypatch.setattr(tracking, "tracker_of", lambda run: None)
    try:
        with (
            acquire(launch.run_folder(config), lease_s=600) as lease,
            pytest.raises(CrashLoopError, match="2 times since the start") as ended,
        ):
            launch._fit(config, derive(config, samples=None), "uri", "id", lease)
    finally:
        ray.shutdown()
    told = str(ended.value)
    assert told.count("the workers did not start: a worker's process ended (ip: ") == 2, told
