"""A driver that is stopped, replaced or told to leave: who may write, what is saved, how the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from ray._common.utils import get_default_ray_temp_dir

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from tests.train.runs import PretrainProcess, history, run_arguments, runs_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_folder(tmp_path_factory.mktemp("interruption"))


def _arguments(folder: Path, name: str, steps: int) -> list[str]:
    # Checkpoints only if something asks for one.
    run = {"checkpoint_every_steps": steps, "lease_s": 6}
    return run_arguments(folder, name, run=run, data={"val_split": None}, train={"steps": steps})


def _state(run: Path) -> dict[str, tuple[int, int]]:
    """Every file of a run with its size and time of change."""
    files = [Path(root) / name for root, _, names in os.walk(run) for name in names]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.mark.slow
def test_ctrl_c_saves_at_a_step_and_the_restart_continues_bit_equal(folder: Path) -> None:
    """At a terminal, where all processes of the command get the signal (of SIGTERM see `tests/faults`)."""
    steps = 80
    whole = PretrainProcess(_arguments(folder, "uninterrupted", steps))
    assert whole.finish() == 0, whole.output

    first = PretrainProcess(_arguments(folder, "told-to-leave", steps), at_terminal=True)
    first.read_until(r"step 3/80")
    first.ctrl_c()
    first.read_until(
        r"Ctrl-C: the workers save at their next step, within \d+ s; a second signal ends the run at once"
    )
    assert first.finish() == os.EX_TEMPFAIL == 75, first.output
    found = re.search(r"saved up to step (\d+); the same command continues it", first.output)
    assert found is not None, first.output
    run = Storage(str(folder / "runs/told-to-leave"))
    assert complete_checkpoints(run) == [f"step-{int(found[1]):08d}"]
    assert 3 < int(found[1]) < steps
    record = json.loads(run.read_bytes("run.json"))
    client = MlflowClient(tracking_uri=record["tracking_uri"])
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"

    second = PretrainProcess(_arguments(folder, "told-to-leave", steps))
    assert second.finish() == 0, second.output
    assert f"continues from {run.uri}/checkpoints/step-{int(found[1]):08d}" in second.output
    assert client.get_run(record["mlflow_run_id"]).info.status == "FINISHED"
    for metric in ("loss/train", "gradient_norm"):
        expected = history(folder / "runs", "uninterrupted", metric)
        assert [step for step, _ in expected] == list(range(1, steps + 1))
        assert history(folder / "runs", "told-to-leave", metric) == expected, metric


@pytest.mark.slow
def test_second_driver_is_refused_or_takes_over_and_a_suspended_first_one_writes_nothing_after(
    folder: Path,
) -> None:
    run = folder / "runs/two-drivers"
    arguments = _arguments(folder, "two-drivers", 4000)
    first = PretrainProcess([*arguments, "--run.checkpoint_every_steps", "5"])
    first.read_until(r"checkpoint step-\d+ is complete")

    refused = PretrainProcess(arguments)
    assert refused.finish() == 2, refused.output
    assert f"is being written by process {first.pid} on " in refused.output
    assert "encoder tokens" not in refused.output  # nothing was begun

    first.send(signal.SIGSTOP)  # its workers go on until they hear that the run has another driver
    second = PretrainProcess(arguments)
    second.read_until(rf"held by process {first.pid} ")
    second.read_until(r"continues from .*step \d+")
    second.read_until(r"step \d+/4000")
    second.send(signal.SIGTERM)
    assert second.finish() == 75, second.output

    before = _state(run)
    points = history(folder / "runs", "two-drivers", "loss/train")
    first.send(signal.SIGCONT)
    assert first.finish() == 1, first.output
    assert f"was taken over by process {second.pid} on " in first.output
    assert _state(run) == before
    assert history(folder / "runs", "two-drivers", "loss/train") == points
    assert [step for step, _ in points] == list(range(1, len(points) + 1))

    killed = PretrainProcess(arguments)
    killed.read_until(r"step \d+/4000")
    killed.send(signal.SIGKILL)
    killed.finish()
    # The killed one's process is known to be gone: no waiting.
    last = PretrainProcess([*arguments, "--run.preemption_grace_s", "3600"], at_terminal=True)
    last.read_until(r"step \d+/4000")
    last.ctrl_c()
    last.read_until(r"Ctrl-C: the workers save at their next step")
    last.ctrl_c()
    assert last.finish() == 75, last.output
    sessions = list(Path(get_default_ray_temp_dir()).glob(f"session_*_{last.pid}"))
    assert len(sessions) == 1, "threads that go on for a moment start no other Ray"
    assert "held by" not in last.output
    assert "a second signal: ended at once, without a save; the same command continues" in last.output
    record = json.loads((run / "run.json").read_text())
    client = MlflowClient(tracking_uri=record["tracking_uri"])
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"
    (lease,) = (run / "lease").glob("[0-9]*.json")  # beside it may stand what the second signal cut off
    assert json.loads(lease.read_text())["released"]
