"""Runs on Ray nodes that really leave and join: the sequence of places does not notice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from arvideo_dist.storage import Storage
from arvideo_dist.train.samples.audit import applied_places
from tests import warm
from tests.services.mlflow_server import new_database
from tests.train.runs import TINY, PretrainProcess, demand, history, make_data, write_config

GLOBAL_BATCH = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("elastic") / "data")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that takes no training workers; nodes of one CPU are added by the tests."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
    with warm.as_sys_executable():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


def drain(cluster: Cluster, node: Any) -> None:
    """What a cloud or Kubernetes says before it takes a node: Ray's preemption notice."""
    subprocess.run(
        [
            *("ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"),
            *("--deadline-remaining-seconds", "600"),
        ],
        check=True,
    )


@pytest.fixture
def start(data: Path, tmp_path: Path, cluster: Cluster) -> Callable[..., PretrainProcess]:
    new_database(tmp_path / "runs/mlflow.db")

    def start(name: str, workers: Any, steps: int, every: int) -> PretrainProcess:
        config = write_config(
            tmp_path / f"{name}.yaml",
            run={
                "name": name,
                "storage_path": str(tmp_path / "runs"),
                "checkpoint_every_steps": every,
                "audit": True,
            },
            data={**TINY["data"], "path": str(data), "val_split": None},
            train={**TINY["train"], "steps": steps, "global_batch": GLOBAL_BATCH},
            cluster={
                "address": cluster.address,
                "workers": workers,
                "device": "cpu",
                "resize_interval_s": 5,
            },
        )
        return PretrainProcess(["--config", str(config)])

    return start


def check_places_and_points(run: Storage, steps: int) -> None:
    """Each place of `steps` exactly once in the final weights, at its own step; each step logged once, also
    those that were lost and are yet to come again."""
    expected = {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, steps + 1)
    }
    assert applied_places(run) == expected
    storage, _, name = run.uri.rpartition("/")
    logged = [step for step, _ in history(Path(storage), name, "loss/train")]
    assert logged == list(range(1, len(logged) + 1))
    assert len(logged) >= steps


def world_sizes(run: Storage) -> list[int]:
    return [
        json.loads(run.read_bytes(f"audit/{attempt}/start.json"))["world_size"]
        for attempt in run.names("audit")
    ]


def test_a_run_that_waits_for_nodes_ends_when_asked_and_takes_its_demand_back(
    cluster: Cluster, start: Callable[..., PretrainProcess], tmp_path: Path
) -> None:
    process = start("waits", [2, 5], 60, every=1000)
    process.read_until(r"room for 0 workers of 1 CPU each now, the run wants 2: it waits until nodes join")
    ray.init(address=cluster.address)
    try:
        # The actor that tells the autoscaler is a process that starts after the first request.
        while (asked := demand()) != [{"CPU": 1.0}] * 5:
            assert asked == []
            time.sleep(0.5)
        process.send(signal.SIGTERM)
        process.read_until(
            r"SIGTERM: the workers save at their next step, within \d+ s; a second signal ends the run"
        )
        assert process.finish() == os.EX_TEMPFAIL, process.output
        assert demand() == []
    finally:
        ray.shutdown()
    assert "SIGTERM while no workers ran; the same command continues" in process.output
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"


def test_node_with_a_preemption_notice_is_left_with_a_checkpoint_and_the_run_goes_on_narrower(
    cluster: Cluster, start: Callable[..., PretrainProcess], tmp_path: Path
) -> None:
    steps = 24
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = start("drained", [1, 2], steps, every=1000)
    process.read_until(r"step 3/24")
    drain(cluster, nodes[1])
    said = process.read_until(r"interrupted after step \d+: preemption notice for the nodes of ranks \d")
    step = int(said.split("after step ")[1].split(":")[0])
    assert process.finish() == 0, process.output  # on the other node, while this one is still there
    assert f"step-{step:08d}, step {step}\n" in process.output
    assert "1 workers x 4 clips x 4 accumulation steps (padding 0)" in process.output
    run = Storage(str(tmp_path / "runs/drained"))
    assert world_sizes(run) == [2, 1]
    check_places_and_points(run, steps)


@pytest.mark.slow
def test_no_step_is_lost_to_nodes_that_join_and_those_that_flap_change_nothing(
    cluster: Cluster, start: Callable[..., PretrainProcess], tmp_path: Path
) -> None:
    """No checkpoint is due by itself: what there is was saved for nodes that joined or left."""
    run = Storage(str(tmp_path / "runs/elastic"))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = start("elastic", [1, 3], steps=100_000, every=100_000)  # ended below, when all has happened
    process.read_until(r"step 1[0-3]/")
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    process.read_until(r"1 workers x 4 clips x 4 accumulation steps \(padding 0\)")
    process.read_until(r"step \d+/")
    cluster.remove_node(cluster.add_node(num_cpus=1), allow_graceful=False)  # Ray counts it for some time
    process.read_until(r"step \d+/")
    nodes += [cluster.add_node(num_cpus=1) for _ in range(2)]
    while True:  # the new nodes may be seen one after the other
        process.read_until(r"the cluster has room for [23] workers: the [12] that run save and make way")
        left = process.read_until(r"interrupted after step \d+: the cluster has room for more workers")
        step = int(left.split("after step ")[1].split(":")[0])
        process.read_until(rf"continues from .*/step-{step:08d}, step {step}\n")
        process.read_until(rf"step {step + 1}/")
        if world_sizes(run)[-1] == 3:
            break
    drain(cluster, nodes[-1])
    process.read_until(r"interrupted after step \d+: preemption notice")
    process.read_until(r"2 workers x 4 clips x 2 accumulation steps \(padding 0\)")
    cluster.remove_node(nodes.pop())
    process.read_until(r"step \d+/")
    process.send(signal.SIGTERM)
    assert process.finish() == 75, process.output
    found = re.search(r"saved up to step (\d+);", process.output)
    assert found is not None
    assert process.output.count("workers were lost") == 1  # with the node that was in use
    assert world_sizes(run) in ([2, 1, 3, 2], [2, 1, 2, 3, 2])
    check_places_and_points(run, int(found[1]))
