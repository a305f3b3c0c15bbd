"""Ray tasks: the bytes of a local run, also when workers and nodes die on the way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from data_prep import cluster as cluster_module
from data_prep import prepare as prepare_module
from data_prep.shards import Outcome
from tests.data_prep.runs import digests, prepare

pytestmark = pytest.mark.slow

CLIPS = ("synthetic", "--num-videos", 60, "--shard-size", 8, "--width", 128, "--height", 128, "--frames", 64)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed local run writes."""
    out = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        assert prepare(patch, *CLIPS, "--out", out) == 0
    return digests(out)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # a busy machine starts slowly
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def at_each_outcome(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Have the driver call `act` with the number of outcomes that it has seen, each time it sees one."""
    work = prepare_module._work

    def watched(*arguments: Any) -> Iterator[object]:
        seen = 0
        for result in work(*arguments):
            if isinstance(result, Outcome):
                seen += 1
                act(seen)
            yield result

    monkeypatch.setattr(prepare_module, "_work", watched)


def ray_workers(cluster: Cluster) -> list[psutil.Process]:
    """The cluster's processes that run a video now."""
    found = []
    for node in cluster.list_all_nodes():
        for info in node.all_processes["raylet"]:
            for child in psutil.Process(info.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name().startswith("ray::_video"):
                        found.append(child)
    return found


def test_killed_workers_change_no_byte(
    cluster: Cluster, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: set[psutil.Process] = set()  # a process that is slow to go counts once

    begun = threading.Event()
    at_each_outcome(monkeypatch, lambda seen: seen >= 5 and begun.set())

    def kill() -> None:
        begun.wait()
        while len(killed) < 4:
            for worker in ray_workers(cluster):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
                    killed.add(worker)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert prepare(monkeypatch, *CLIPS, "--out", tmp_path, "--ray-address", cluster.address) == 0
    killer.join(timeout=10)
    assert len(killed) >= 4
    assert digests(tmp_path) == calm


def test_a_lost_node_changes_no_byte(
    cluster: Cluster, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = cluster.worker_nodes.copy().pop()

    def remove(seen: int) -> None:
        if seen == 9:  # of 60: the driver sees no more until the node is gone
            cluster.remove_node(second, allow_graceful=False)

    at_each_outcome(monkeypatch, remove)
    assert prepare(monkeypatch, *CLIPS, "--out", tmp_path, "--ray-address", cluster.address) == 0
    assert not cluster.worker_nodes
    assert digests(tmp_path) == calm


def test_a_shard_on_the_disk_of_another_machine_is_no_part_of_the_split(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--out` is not shared: what a node wrote is not there where the driver looks."""
    record = cluster_module.RayPool.record

    def elsewhere(self: Any, handle: Any) -> Any:
        ray.wait([handle])
        for shard in tmp_path.glob("out/*.tar"):
            shard.rename(tmp_path / shard.name)
        return record(self, handle)

    monkeypatch.setattr(cluster_module.RayPool, "record", elsewhere)
    arguments = (*CLIPS[:2], 4, *CLIPS[3:], "--out", tmp_path / "out", "--ray-address", cluster.address)
    assert prepare(monkeypatch, *arguments) == 2
    assert "must be a folder that all nodes share" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "dataset-train.json").exists()


def test_no_cluster_at_the_address_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(monkeypatch, *CLIPS, "--out", tmp_path / "out", "--ray-address", "127.0.0.1:1") == 2
    assert "--ray-address 127.0.0.1:1" in capsys.readouterr().err.splitlines()[-1]
