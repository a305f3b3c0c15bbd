"""A store that looks empty, as an unmounted disk does: the run waits for it, and nothing goes backwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from tests.faults.runs import LAYOUTS, Run, write_run
from tests.services.mounts import Mount, OtherHost, mounted

LAYOUT = LAYOUTS[0]
AFTER_TWO_CHECKPOINTS = r"checkpoint step-00000016 is complete"
WAITS = "was seen there|does not hold this driver's own"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    try:
        with mounted(tmp_path) as mount:
            yield mount
    except OSError as error:
        pytest.skip(f"this process may not mount: {error}")


def _run(folder: Path, mount: Mount, name: str) -> Run:
    return write_run(folder, str(folder / "data"), name, LAYOUT, storage=str(mount.at / "runs"))


@pytest.mark.slow
def test_storage_unmounted_as_workers_are_lost(
    folder: Path, survived: Callable[..., None], mount: Mount
) -> None:
    run = _run(folder, mount, "unmounted")
    command = run.start()
    command.read_until(AFTER_TWO_CHECKPOINTS)
    mount.unmount()
    command.worker(1).kill()
    said = command.read_until(r"new workers wait for storage|starts from|continues from")
    written = sorted(str(path) for path in mount.at.rglob("*"))
    assert "new workers wait for storage, for up to 60 minutes" in said, (said, written)
    assert written == [], "in the mount point's own folder"
    mount.mount()
    command.read_until(r"continues from .*step-\d+, step (16|24)")
    assert command.finish() == 0, command.output
    survived(run, "run's storage unmounted, SIGKILL of rank 1, mounted again")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without slots: this host."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
    # Its hooks for the exit want the main thread, and nodes are added from another one.
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_storage_unmounted_on_the_workers_host_alone(
    folder: Path, survived: Callable[..., None], mount: Mount, cluster: Cluster
) -> None:
    """The driver sees the run all the time."""
    host = OtherHost()
    node = host.do(cluster.add_node, num_cpus=LAYOUT.workers)
    run = _run(folder, mount, "unmounted-elsewhere")
    command = run.start("--cluster.address", cluster.address)
    command.read_until(AFTER_TWO_CHECKPOINTS)
    before = complete_checkpoints(run.folder)
    host.do(mount.unmount)
    _a_worker_of(node).kill()
    command.read_until(WAITS)
    assert set(before) <= set(complete_checkpoints(run.folder))
    assert host.do(lambda: list(mount.at.iterdir())) == []
    host.do(mount.mount)
    assert command.finish() == 0, command.output
    survived(run, "run's storage unmounted on the workers' host, SIGKILL of a rank, mounted again")


def _a_worker_of(node: Any) -> psutil.Process:
    raylet = node.all_processes["raylet"][0].process.pid
    for process in psutil.Process(raylet).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no worker runs on this node")
