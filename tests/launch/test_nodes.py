"""How many workers a cluster has room for, when a run widens, and what its autoscaler is asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray._private.state import state
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from arvideo_dist.checks.cluster import free_places, most_places, slots
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.launch import nodes
from arvideo_dist.launch.nodes import Room, check_own_ray
from arvideo_dist.train.run.stop import RunInterruptedError
from tests.train.runs import demand

CPU = {"CPU": 1.0}


def _config(**cluster: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"cluster": {"device": "cpu", "resize_interval_s": 10, **cluster}})


class _View:
    """What `free_places` sees of a made-up cluster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: dict[str, int] = {}
        self.asked: list[int] = []
        monkeypatch.setattr(nodes, "free_places", lambda bundle: dict(self.places))
        monkeypatch.setattr(nodes._Demand, "ask", lambda demand, number: self.asked.append(number))
        monkeypatch.setattr(nodes._Demand, "repeat", lambda demand: None)
        monkeypatch.setattr(nodes, "most_places", lambda bundle: None)
        monkeypatch.setattr(nodes, "_SETTLED_S", 0.0)
        monkeypatch.setattr(nodes, "_LOOK_S", 0.01)


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> _View:
    return _View(monkeypatch)


def test_a_worker_fits_on_one_node_and_not_on_what_two_have_left() -> None:
    assert slots([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}) == 2
    assert slots([{"CPU": 8.0}, {"GPU": 8.0, "CPU": 2.0}], {"CPU": 1.0, "GPU": 1.0}) == 2
    assert slots([{"CPU": 1.9999}], {"CPU": 2.0}) == 1  # a sum of Ray's ten thousandths


def test_as_many_workers_start_as_fit_and_never_more_than_asked_for(view: _View) -> None:
    view.places = {"a": 1, "b": 2}
    assert Room(_config(workers=[1, 8]), False, "x").wait(lambda: None) == 3
    assert view.asked[0] == 8  # an autoscaler is asked for all
    assert Room(_config(workers=[1, 2]), False, "x").wait(lambda: None) == 2
    assert Room(_config(workers=3), False, "x").wait(lambda: None) == 3


def test_a_run_waits_for_its_fewest_workers_says_so_and_can_be_stopped_meanwhile(
    view: _View, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = itertools.count()

    def stop_or_join() -> None:
        if next(looks) == 5:
            view.places["late"] = 1

    view.places = {"a": 1}
    assert Room(_config(workers=[2, 4], cpus_per_worker=3), False, "x").wait(stop_or_join) == 2
    said = capsys.readouterr().out
    assert said.count("room for 1 workers of 3 CPU each now, the run wants 2: it waits until nodes join") == 1

    def stop() -> None:
        raise RunInterruptedError("asked")

    view.places = {}
    with pytest.raises(RunInterruptedError):
        Room(_config(workers=1), False, "x").wait(stop)


def test_a_run_that_the_autoscaler_can_never_hold_says_what_to_change(
    view: _View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "most_places", lambda bundle: 16)
    with pytest.raises(ValueError, match=r"make room for 16 at most: lower cluster\.workers"):
        Room(_config(workers=17), False, "x").wait(lambda: None)


def test_room_counts_only_on_nodes_that_stay_for_an_interval(view: _View) -> None:
    room = Room(_config(workers=[1, 8]), False, "x")
    widening = room.widening(2)
    assert view.asked == [6]  # for the others Ray Train asks
    for second in range(60):  # three nodes take turns of 4 s, faster than the interval of 10 s
        view.places = {f"flapping {second // 4 % 3}": 4}
        assert widening.due(float(second)) is None
    for second in range(60, 70):
        view.places = {f"flapping {second // 4 % 3}": 4, "stays": 1}
        assert widening.due(float(second)) is None
    view.places = {"flapping 9": 4, "stays": 1}
    assert widening.due(71.0) == 3
    assert widening.due(90.0) is None  # said once


def test_a_run_never_widens_beyond_its_most_workers(view: _View) -> None:
    view.places = {"a": 64}
    widening = Room(_config(workers=[1, 8]), False, "x").widening(7)
    assert [widening.due(float(second)) for second in (0, 20)] == [None, 8]
    full = Room(_config(workers=8), False, "x").widening(8)
    assert [full.due(float(second)) for second in (0, 20)] == [None, None]


@pytest.mark.parametrize(
    ("cluster", "gpus", "remedy"),
    [
        ({"device": "cuda", "workers": 1}, 0, "set cluster.device to cpu, or join a cluster with GPUs"),
        ({"device": "cuda", "workers": 4}, 2, "set cluster.workers to 2 or less, set cluster.device to cpu"),
        ({"device": "auto", "workers": 8}, 1, "set cluster.workers to 1 or less, set cluster.device to cpu"),
    ],
)
def test_own_ray_without_the_gpus_that_are_wanted_is_refused(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], gpus: int, remedy: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"sees {gpus} on this machine.*{remedy}"):
        check_own_ray(_config(**cluster))
    check_own_ray(_config(**{**cluster, "address": "head:6379"}))  # there an autoscaler may add nodes
    check_own_ray(_config(**{**cluster, "workers": [1, 8]}) if gpus else _config(device="auto"))


def test_cuda_without_a_gpu_ends_the_command_before_anything_is_started(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "arvideo_dist.pretrain", "--cluster.device", "cuda"]
    where = ["--data.path", str(tmp_path / "data"), "--run.storage_path", str(tmp_path / "runs")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, *where], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "cluster.device cuda" in done.stderr
    assert "set cluster.device to cpu" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_an_autoscaler_may_add_is_counted_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [{"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: there)

    def groups(*counts_and_cpus: tuple[int, float]) -> None:
        made = [SimpleNamespace(max_count=count, resources={"CPU": cpus}) for count, cpus in counts_and_cpus]
        monkeypatch.setattr(state, "get_cluster_config", lambda: SimpleNamespace(node_group_configs=made))

    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    assert most_places({"CPU": 2.0}) is None
    groups((2, 3.0), (5, 1.0))
    assert most_places({"CPU": 2.0}) == 2  # 11 CPUs in all, and each worker on one node
    groups((0, 8.0))
    assert most_places({"CPU": 2.0}) == 2  # those that are there
    groups((-1, 2.0))
    assert most_places({"CPU": 2.0}) is None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes no workers, and two nodes of one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_autoscaler_v2", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("cluster")
def test_demand_reaches_the_autoscaler_and_is_gone_with_the_run() -> None:
    with Room(_config(workers=[1, 5]), False, "this run") as room:
        room._demand.ask(5)
        ray.get(nodes._coordinator().get_reserved_resources.remote("x"))  # after the call before it
        assert demand() == [CPU] * 5
        room.widening(2)
        ray.get(nodes._coordinator().get_reserved_resources.remote("x"))
        assert demand() == [CPU] * 3
    assert demand() == []


def test_no_place_is_counted_on_a_node_that_is_taken_or_leaves_and_no_worker_lands_there(
    cluster: Cluster,
) -> None:
    leaving, staying = (node.node_id for node in cluster.worker_nodes)
    assert free_places(CPU) == {leaving: 1, staying: 1}
    assert free_places({"CPU": 2.0}) == {}
    subprocess.run(
        [
            *("ray", "drain-node", "--address", cluster.address, "--node-id", leaving),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"),
            *("--deadline-remaining-seconds", "600"),
        ],
        check=True,
    )
    assert free_places(CPU) == {staying: 1}
    both, one = placement_group([CPU] * 2), placement_group([CPU])
    remove_placement_group(both)
    assert one.wait(60)
    assert ray.util.placement_group_table(one)["bundles_to_node_id"] == {0: staying}
    while free_places(CPU):  # Ray's view of what is free follows within a second
        pass
    remove_placement_group(one)
