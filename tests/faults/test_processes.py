"""Processes that are killed, stopped or told to leave: workers, the driver, every node."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests import warm
from tests.faults.runs import FAULT_AT, LAYOUTS, Layout, Run, write_run

EACH_RANK = [(layout, rank) for layout in LAYOUTS for rank in range(layout.workers)]
# Which rank it is makes no difference to who is blamed (health/test_monitor.py): first and last are here.
STOPPED_RANKS = [(LAYOUTS[0], 1), (LAYOUTS[1], 0), (LAYOUTS[2], 3)]


def _name(case: tuple[Layout, int]) -> str:
    return f"{case[0]}-rank{case[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH_RANK, ids=_name)
def test_killed_rank(folder: Path, survived: Callable[..., None], case: tuple[Layout, int]) -> None:
    layout, rank = case
    run = write_run(folder, str(folder / "data"), f"killed-rank{rank}-{layout}", layout)
    command = run.start()
    command.read_until(FAULT_AT)
    command.worker(rank).kill()
    assert command.finish() == 0, command.output
    survived(run, f"SIGKILL of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPPED_RANKS, ids=_name)
def test_stopped_rank(folder: Path, survived: Callable[..., None], case: tuple[Layout, int]) -> None:
    layout, rank = case
    run = write_run(folder, str(folder / "data"), f"stopped-rank{rank}-{layout}", layout, run={"hung_s": 30})
    command = run.start()
    command.read_until(FAULT_AT)
    stopped = command.worker(rank)
    stopped.send_signal(signal.SIGSTOP)
    said = command.read_until("the run hangs: no rank has made progress")
    assert re.search(rf"run.hung_s 30: rank {rank} \(pid {stopped.pid} on ", said), said
    assert command.finish() == 0, command.output
    assert not stopped.is_running(), "a stopped process holds its GPU until it is killed"
    survived(run, f"SIGSTOP of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_killed_driver(folder: Path, survived: Callable[..., None], layout: Layout) -> None:
    run = write_run(folder, str(folder / "data"), f"killed-driver-{layout}", layout)
    command = run.start()
    command.read_until(FAULT_AT)
    command.send(signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    again = run.start()
    assert again.finish() == 0, again.output
    survived(run, "SIGKILL of the driver", commands=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_driver_told_to_leave(folder: Path, survived: Callable[..., None], layout: Layout) -> None:
    run = write_run(folder, str(folder / "data"), f"told-to-leave-{layout}", layout)
    command = run.start()
    command.read_until(FAULT_AT)
    command.send(signal.SIGTERM)
    assert command.finish() == os.EX_TEMPFAIL, command.output
    again = run.start()
    assert again.finish() == 0, again.output
    survived(run, "SIGTERM to the driver", commands=2)


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Cluster]]:
    """Clusters of a head without slots and nodes of one CPU."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    made: list[Cluster] = []

    def make(nodes: int) -> Cluster:
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        made.append(cluster)
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        return cluster

    with warm.as_sys_executable():
        yield make
        for cluster in made:
            cluster.shutdown()


def _kill_all(cluster: Cluster) -> None:
    for node in [cluster.head_node, *cluster.worker_nodes]:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_nodes_killed(
    folder: Path, survived: Callable[..., None], clusters: Callable[[int], Cluster], layout: Layout
) -> None:
    run: Run = write_run(folder, str(folder / "data"), f"all-nodes-{layout}", layout)
    first = clusters(layout.workers)
    command = run.start("--cluster.address", first.address)
    command.read_until(FAULT_AT)
    _kill_all(first)
    assert command.finish() not in (0, 2), command.output
    second = clusters(layout.workers)
    again = run.start("--cluster.address", second.address)
    assert again.finish() == 0, again.output
    survived(run, "SIGKILL of all nodes, the head among them", commands=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_node_killed_and_replaced(
    folder: Path, survived: Callable[..., None], clusters: Callable[[int], Cluster], layout: Layout
) -> None:
    run = write_run(folder, str(folder / "data"), f"one-node-{layout}", layout)
    cluster = clusters(layout.workers)
    command = run.start("--cluster.address", cluster.address)
    command.read_until(FAULT_AT)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert command.finish() == 0, command.output
    survived(run, "SIGKILL of a node, another joins")
