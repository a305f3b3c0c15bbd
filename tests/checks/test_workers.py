"""Preflight on real Ray: two workers that pass, and workers that do not, each with its message."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from arvideo_dist import preflight
from arvideo_dist.checks import workers
from arvideo_dist.checks.cluster import slots
from arvideo_dist.checks.finding import Finding, Level, errors
from arvideo_dist.checks.workers import check_workers
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.tasks.derived import derive
from tests import warm
from tests.data.conftest import FRAMES, write_dataset
from tests.train.runs import TINY, write_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with warm.as_sys_executable():
            ray.init(address="local", num_cpus=2)
        yield
        ray.shutdown()


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A run of two workers on a data set of ten shards."""
    write_dataset(tmp_path / "data", [b"x"] * 10, [FRAMES[0]] * 10, per_shard=1)
    return {
        "run": {"name": "run", "storage_path": str(tmp_path / "runs")},
        "data": {"path": str(tmp_path / "data"), "val_split": None, "workers": 1},
    }


def _of(check: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def test_two_workers_pass_and_the_command_says_so(
    cluster: None,
    sections: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The cluster is there already.
    monkeypatch.setattr(preflight, "connected", lambda config: contextlib.nullcontext(False))
    file = write_config(tmp_path / "c.yaml", **sections)
    preflight.main(["--config", str(file), "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["passed"]
    seen = {(f["check"], f["where"].split(" on ")[0]) for f in report["findings"]}
    on_workers = {
        *("versions", "device", "/dev/shm", "memory", "disk", "storage", "storage shared", "data", "clock"),
        "network",
    }
    assert {(check, f"worker {rank}") for check in on_workers for rank in (0, 1)} <= seen
    assert {("mlflow", ""), ("mlflow", "worker 0"), ("room", ""), ("all-reduce", "")} <= seen
    speed = next(f["message"] for f in report["findings"] if f["check"] == "all-reduce")
    assert re.search(r"bus bandwidth \d+\.\d\d GB/s over 2 workers", speed)
    assert "ready to start" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [], "nothing is left on the storage"


def test_faults_of_workers_are_named_with_worker_and_remedy(
    cluster: None, sections: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable(workers.Worker):
        def listen(self, token: str) -> tuple[str, int, str]:
            _, port, token = super().listen(token)
            return "192.0.2.7", port, token  # TEST-NET-1 (RFC 5737), nobody's

    monkeypatch.setattr(workers, "Worker", Unreachable)
    # Far more micro batches a step than there are slots, so that they pass through /dev/shm.
    sections["train"] = {**TINY["train"], "global_batch": 2**24}
    sections["model"] = {**TINY["model"], "frames": 16, "image_size": 224}
    (tmp_path / "data" / "train-000003.tar").unlink()
    config = PretrainConfig.model_validate({**TINY, **sections, "cluster": TINY["cluster"]})
    findings = check_workers(config, derive(config, None), tracking_uri=None, use_gpu=False, wait_s=0)
    reach = _of("network", findings)
    assert [f.where.split(" on ")[0] for f in errors(reach)] == ["worker 0", "worker 1"]
    assert "cannot connect to worker 1 on" in reach[0].message
    assert "at 192.0.2.7:" in reach[0].message
    assert "let TCP through between all workers" in reach[0].message
    (skipped,) = _of("all-reduce", findings)
    assert skipped.level is Level.WARNING
    assert "not all workers reach each other" in skipped.message
    shm = _of("/dev/shm", findings)
    assert len(errors(shm)) == 2
    assert "sizeLimit" in shm[0].message
    (missing,) = errors(_of("data", findings))
    assert missing.where.startswith("worker 1"), "whose share shard 3 of 10 is in"
    assert "train-000003.tar is missing" in missing.message


def test_run_that_the_cluster_has_no_room_for_is_refused_at_once(
    cluster: None, sections: dict[str, dict[str, Any]]
) -> None:
    sections["cluster"] = {"workers": [3, 4], "device": "cpu", "cpus_per_worker": 4}
    config = PretrainConfig.model_validate({**TINY, **sections})
    (found,) = check_workers(config, derive(config, None), tracking_uri=None, use_gpu=False, wait_s=0)
    assert found.level is Level.ERROR
    assert "room for 0 workers of 4 CPUs, the run wants at least 3: add nodes" in found.message
    assert "--wait SECONDS" in found.message


def test_places_are_counted_a_node_at_a_time() -> None:
    nodes = [{"CPU": 7.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert slots(nodes, {"CPU": 2.0, "GPU": 1.0}) == 3 + 1
    assert slots(nodes, {"CPU": 2.0}) == 3 + 8 + 2


def test_wrong_configuration_is_told_from_a_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        preflight.main(["--train.micro_batch", "0"])
    assert ended.value.code == 2
    assert "train.micro_batch" in capsys.readouterr().err
