"""Small real runs for tests: data, configuration, and the `pretrain` command as a user starts it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import uuid
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml
from filelock import FileLock
from mlflow.tracking import MlflowClient

from arvideo_dist.data.index import index_name
from tests import warm
from tests.services.mlflow_server import new_database

TINY: dict[str, Any] = {
    "data": {"stride": 2, "workers": 1},
    "model": {
        "encoder": "demo",
        "frames": 8,
        "image_size": 32,
        "tubelet": [2, 8, 8],
        "cluster": [2, 2, 2],
        "target_norm": "none",
    },
    "decoder": {"width": 64, "depth": 1},
    "optim": {"base_lr": 4e-3, "warmup_epochs": 1},
    "train": {"steps": 12, "global_batch": 16, "micro_batch": 4, "zero_stage": 2, "log_every_steps": 1},
    "run": {"checkpoint_every_steps": 4},
    "validation": {"every_steps": 6, "max_clips": 16},
    "cluster": {"workers": 2, "device": "cpu"},
}

# In the environment of a run, of its Ray and of all that its workers start.
_RUN = "ARVIDEO_TESTS_RUN"


def make_data(folder: Path) -> Path:
    """48 training and 16 validation clips, made once in a session; the copy in `folder` may be damaged."""
    made = warm.shared_folder() / "data"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            _prepare(made.with_suffix(".new")).rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


def _prepare(folder: Path) -> Path:
    for split, number, seed in (("train", 48, 1), ("val", 16, 2)):
        subprocess.run(
            [
                *(warm.python(), "-m", "data_prep", "synthetic", "--out", str(folder), "--split", split),
                *("--num-videos", str(number), "--seed", str(seed)),
                *("--width", "64", "--height", "64", "--frames", "24"),
            ],
            check=True,
        )
    return folder


def damage(data: Path, split: str, videos: int) -> None:
    """Overwrite the first `videos` videos of `split` in what `make_data` made."""
    for row in pq.read_table(data / index_name(split)).to_pylist()[:videos]:
        with open(data / row["shard"], "r+b") as shard:
            shard.seek(row["offset"])
            shard.write(bytes(row["size"]))


def write_config(file: Path, **sections: dict[str, Any]) -> Path:
    """TINY with `sections` laid over it, as a YAML file."""
    merged = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    file.write_text(yaml.safe_dump(merged))
    return file


def runs_folder(folder: Path) -> Path:
    """`folder` with data in `data`, and an empty database of MLflow for the runs in `runs`."""
    make_data(folder / "data")
    new_database(folder / "runs/mlflow.db")
    return folder


def run_arguments(folder: Path, name: str, **sections: dict[str, Any]) -> list[str]:
    """The command line of run `name` in a `runs_folder`, with `sections` laid over TINY."""
    run = {"name": name, "storage_path": str(folder / "runs"), **sections.pop("run", {})}
    data = {"path": str(folder / "data"), **sections.pop("data", {})}
    return ["--config", str(write_config(folder / f"{name}.yaml", run=run, data=data, **sections))]


class PretrainProcess:
    """`python -m arvideo_dist.pretrain ...`, or another command of a run, with its output read line by line.

    Ray's processes and workers are warm as the command itself is (tests/warm).
    """

    def __init__(self, arguments: list[str], *, at_terminal: bool = False, command: str = "pretrain") -> None:
        """`at_terminal`: in the foreground of a terminal of its own, at which `ctrl_c` is pressed."""
        self.lines: list[str] = []
        self._name = uuid.uuid4().hex
        line = ["-m", f"arvideo_dist.{command}", *arguments]
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "env": {**os.environ, "PYTHONUNBUFFERED": "1", _RUN: self._name},
        }
        self._process: subprocess.Popen[str] | warm.Process
        if not at_terminal:
            self._process = warm.Process(line, **options)
            return
        self._keyboard, here = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, *line],
            stdin=here,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )

    def read_until(self, pattern: str) -> str:
        """The first further line that matches `pattern`; AssertionError with the output where there is none."""
        for line in self._process.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line matches {pattern!r} in:\n{self.output}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """A signal to the driver alone; its workers are other processes."""
        self._process.send_signal(number)

    def ctrl_c(self) -> None:
        """What the terminal makes of it: SIGINT to the driver and all that it started in its process group."""
        os.write(self._keyboard, b"\x03")

    def worker(self, rank: int) -> psutil.Process:
        """The training worker of `rank` of this run's own Ray."""
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()) and self._rank_of(process) == rank:
                return process
        raise AssertionError(f"no worker of rank {rank}:\n{self.output}")

    def _rank_of(self, worker: psutil.Process) -> int | None:
        """Ray names no rank and no run, but what a worker has started inherits both."""
        found = [child.environ() for child in worker.children(recursive=True)]
        ranks = {names.get("RANK") for names in found if names.get(_RUN) == self._name} - {None}
        assert len(ranks) <= 1
        return int(ranks.pop() or 0) if ranks else None

    def finish(self) -> int:
        """Read to the end; the exit code."""
        self.lines.extend(self._process.stdout)
        return self._process.wait()

    @property
    def output(self) -> str:
        return "".join(self.lines)


def history(
    storage: Path, run_name: str, metric: str, experiment: str = "arvideo"
) -> list[tuple[int, float]]:
    """All points (step, value) of a metric of the one MLflow run of that name, in the order of steps."""
    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], f"attributes.run_name = '{run_name}'")
    assert len(runs) == 1, f"one MLflow run of name {run_name}"
    points = client.get_metric_history(runs[0].info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def demand() -> list[dict[str, float]]:
    """What an autoscaler (version 2) of the cluster that this process is connected to is told to make room for."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    told = get_cluster_resource_state(internal_kv_get_gcs_client()).cluster_resource_constraints
    return [
        dict(request.request.resources_bundle)
        for constraint in told
        for request in constraint.resource_requests
        for _ in range(request.count)
    ]
