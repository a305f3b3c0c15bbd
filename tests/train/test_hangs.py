"""A rank that hangs in a real run: named, with the stacks of all, and the run goes on by itself to the same end."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.train.runs import TINY, PretrainProcess, history, make_data, write_config

HUNG_S = 20  # above an idle machine's imports, which are the longest phase here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    make_data(folder / "data")
    return folder


def _arguments(folder: Path, name: str) -> list[str]:
    config = write_config(
        folder / f"{name}.yaml",
        run={
            "name": name,
            "storage_path": str(folder / "runs"),
            "checkpoint_every_steps": 10,
            "hung_s": HUNG_S,
        },
        data={**TINY["data"], "path": str(folder / "data"), "val_split": None},
        train={**TINY["train"], "steps": 40},
    )
    return ["--config", str(config)]


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_restarts_by_itself_to_the_same_losses(folder: Path) -> None:
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
