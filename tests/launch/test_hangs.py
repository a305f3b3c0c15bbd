"""A rank that hangs on real Ray: named, with the stacks of all, and the run goes on by itself to the same end."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch.distributed as dist
from mlflow.tracking import MlflowClient

from arvideo_dist.launch.hangs import TAG, HangWatch
from arvideo_dist.launch.worker import heartbeat
from arvideo_dist.storage import Storage
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.health.monitor import FOLDER, Beat, Hang
from arvideo_dist.train.run.lease import Guard, acquire
from tests import warm
from tests.train.runs import PretrainProcess, history, run_arguments, runs_folder

HUNG_S = 20  # above an idle machine's imports, which are the longest phase here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_folder(tmp_path_factory.mktemp("hangs"))


def _arguments(folder: Path, name: str) -> list[str]:
    run = {"checkpoint_every_steps": 10, "hung_s": HUNG_S}
    return run_arguments(folder, name, run=run, data={"val_split": None}, train={"steps": 40})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with warm.as_sys_executable():
            ray.init(address="local", num_cpus=2, include_dashboard=False)
        yield
        ray.shutdown()


class _Rank:
    """A worker that does nothing but wait for the others. It runs in an actor."""

    def __init__(self, rank: int, store: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def pid(self) -> int:
        return os.getpid()

    def wait(self, monitor: Any, guard: Guard, workers: str, *, stopped: bool) -> None:
        with heartbeat(monitor, guard.storage(), hung_s=10.0, workers=workers) as heart:
            activity.together("optimiser step")
            heart._tell(left=False)  # the monitor has heard it when this returns
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()


@pytest.mark.usefixtures("ray_here")
def test_a_stopped_process_is_found_looked_at_and_ended_with_the_ranks_that_wait_for_it(
    tmp_path: Path,
) -> None:
    noted: queue.Queue[tuple[str, str]] = queue.Queue()
    actor: Any = ray.remote(num_cpus=1)(_Rank)
    ranks = [actor.remote(rank, str(tmp_path / "store")) for rank in range(2)]
    pids = ray.get([rank.pid.remote() for rank in ranks])
    processes = [psutil.Process(pid) for pid in pids]
    with (
        acquire(Storage(str(tmp_path / "run")), lease_s=600) as lease,
        HangWatch(10.0, lease.guard, lambda *tag: noted.put(tag)) as hangs,
    ):
        workers = hangs.new_workers()
        assert not ray.get(hangs.monitor.has_heard.remote(workers))
        waiting = [
            rank.wait.remote(hangs.monitor, lease.guard, workers, stopped=number == 1)
            for number, rank in enumerate(ranks)
        ]
        for ended in waiting:
            with pytest.raises(ray.exceptions.RayActorError):
                ray.get(ended)
        tag, reason = noted.get()
        assert hangs.reason() == reason
        assert hangs.have_begun()
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert tag == TAG
    assert re.search(rf"rank 1 \(pid {pids[1]} on \S+\) has sent no heartbeat for \d+ s", reason)
    assert "; rank 0 in 'optimiser step' after step 0" in reason
    for thread in threading.enumerate():
        if thread.name == "hang report":
            thread.join()
    (hang,) = (tmp_path / "run" / FOLDER).iterdir()
    assert str(hang) in reason
    assert {file.name for file in hang.iterdir()} == {"reason.txt", "rank-00000.txt", "rank-00001.txt"}
    assert f"process {pids[1]}, stopped" in (hang / "rank-00001.txt").read_text()
    assert "in wait" in (hang / "rank-00000.txt").read_text()


@pytest.mark.usefixtures("ray_here")
def test_what_is_found_out_of_older_workers_is_no_reason_for_the_end_of_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their node is unreachable; meanwhile they are known to be lost, and new ones start."""
    noted: queue.Queue[str] = queue.Queue()
    looking, answered = threading.Event(), threading.Event()

    def end_mute(self: HangWatch, hang: Hang) -> dict[Beat, str | None]:
        looking.set()
        answered.wait()
        return dict.fromkeys(hang.mute, "its node did not answer\n")

    monkeypatch.setattr(HangWatch, "_end_mute", end_mute)
    beat = Beat(
        group="older workers",
        rank=0,
        world_size=1,
        node="n",
        host="h",
        pid=1,
        process=None,
        step=7,
        phase="optimiser step",
        together=True,
        meetings=1,
        idle_s=0.0,
    )
    with (
        acquire(Storage(str(tmp_path)), lease_s=600) as lease,
        HangWatch(1.0, lease.guard, lambda _, reason: noted.put(reason)) as hangs,
    ):
        hangs.new_workers()
        ray.get(hangs.monitor.beat.remote(beat))
        looking.wait()
        assert hangs.reason() is None
        hangs.new_workers()
        answered.set()
        assert "rank 0 (pid 1 on h) has sent no heartbeat" in noted.get()  # said all the same
        assert hangs.reason() is None


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_restarts_by_itself_to_the_same_losses(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(warm.COLD, "1")  # a decode worker that is warm is no child of its rank
    whole = PretrainProcess(_arguments(folder, "whole"))
    assert whole.finish() == 0, whole.output

    stopped = PretrainProcess(_arguments(folder, "stopped"))
    stopped.read_until(r"checkpoint step-\d+ is complete")
    stopped.read_until(r"step 1[3-9]/40")
    guilty = 1
    worker = stopped.worker(guilty)
    pid = worker.pid
    worker.send_signal(signal.SIGSTOP)
    said = stopped.read_until(r"the run hangs: ")
    assert re.search(rf"rank {guilty} \(pid {pid} on \S+\) has sent no heartbeat for \d+ s", said), said
    state = stopped.read_until(rf"rank {guilty} \(pid {pid} on \S+\): process")
    assert f"process {pid}, stopped" in state
    line = stopped.read_until(r"workers were lost: no rank has made progress for run.hung_s 20")
    assert f"pid {pid}" in line
    stopped.read_until(r"restart 1 of 3 since checkpoint step-000000\d0, now")
    assert stopped.finish() == 0, stopped.output

    run = folder / "runs/stopped"
    (hang,) = (run / "hangs").iterdir()
    assert {file.name for file in hang.iterdir()} == {"reason.txt", "rank-00000.txt", "rank-00001.txt"}
    assert len(re.findall(r"^rank +\d ", (hang / "reason.txt").read_text(), re.MULTILINE)) == 2
    other = (hang / f"rank-0000{1 - guilty}.txt").read_text()
    assert "arvideo_dist/train/loop.py" in other
    assert "in _worker_loop" in other  # its decode worker's, too
    record = json.loads((run / "run.json").read_text())
    tags = MlflowClient(tracking_uri=record["tracking_uri"]).get_run(record["mlflow_run_id"]).data.tags
    assert f"rank {guilty} (pid {pid}" in tags["arvideo.last_hang"]
    assert str(hang) in tags["arvideo.last_hang"]
    for metric in ("loss/train", "gradient_norm"):
        expected = history(folder / "runs", "whole", metric)
        assert history(folder / "runs", "stopped", metric) == expected, metric
