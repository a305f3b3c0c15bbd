"""Small real runs for tests: data, configuration, and the `pretrain` command as a user starts it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow.tracking import MlflowClient

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


def make_data(folder: Path) -> Path:
    """48 training and 16 validation clips."""
    for split, number, seed in (("train", 48, 1), ("val", 16, 2)):
        subprocess.run(
            [
                *(sys.executable, "-m", "data_prep", "synthetic", "--out", str(folder), "--split", split),
                *("--num-videos", str(number), "--seed", str(seed)),
                *("--width", "64", "--height", "64", "--frames", "24"),
            ],
            check=True,
        )
    return folder


def write_config(file: Path, **sections: dict[str, Any]) -> Path:
    """TINY with `sections` laid over it, as a YAML file."""
    merged = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    file.write_text(yaml.safe_dump(merged))
    return file


class PretrainProcess:
    """`python -m arvideo_dist.pretrain ...` with its output read line by line."""

    def __init__(self, arguments: list[str], *, at_terminal: bool = False) -> None:
        """`at_terminal`: in the foreground of a terminal of its own, at which `ctrl_c` is pressed."""
        self.lines: list[str] = []
        terminal: dict[str, Any] = {}
        if at_terminal:
            self._keyboard, here = pty.openpty()
            terminal = {
                "stdin": here,
                "start_new_session": True,
                "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "arvideo_dist.pretrain", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            **terminal,
        )

    def read_until(self, pattern: str) -> str:
        """The first further line that matches `pattern`; AssertionError with the output where there is none."""
        assert self._process.stdout is not None
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
        """The training worker of `rank`: Ray names no rank, but what a worker has started inherits it."""
        for process in psutil.Process(self.pid).children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()) and _rank_of(process) == rank:
                return process
        raise AssertionError(f"no worker of rank {rank}:\n{self.output}")

    def finish(self) -> int:
        """Read to the end; the exit code."""
        assert self._process.stdout is not None
        self.lines.extend(self._process.stdout)
        return self._process.wait()

    @property
    def output(self) -> str:
        return "".join(self.lines)


def _rank_of(worker: psutil.Process) -> int | None:
    ranks = {child.environ().get("RANK") for child in worker.children(recursive=True)} - {None}
    assert len(ranks) <= 1
    return int(ranks.pop() or 0) if ranks else None


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
