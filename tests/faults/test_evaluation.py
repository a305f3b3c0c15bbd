"""An evaluation whose processes are killed half-way ends with the results of an undisturbed one, byte by byte."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.tasks.scoring import SCORES
from arvideo_dist.train.run.stop import RESULT
from tests import warm
from tests.services.mlflow_server import new_database
from tests.train.classifiers import save_classifier
from tests.train.runs import PretrainProcess

VIDEOS, VIEWS, TEMPORAL_AND_SPATIAL = 41, 15, "5x3"  # two workers do not divide the videos
SAVED = "save step-00000006 is complete"  # three batches of each of two workers
CONTINUES = r"continues from .*step-000000\d\d, view [1-9]\d*"


@dataclass(frozen=True)
class Evaluation:
    """A classifier of random weights, a data set, and the address of MLflow."""

    folder: Path

    def start(self, name: str) -> PretrainProcess:
        options = {
            "--data.path": self.folder / "data",
            "--views": TEMPORAL_AND_SPATIAL,
            "--data.workers": 1,
            "--run.name": name,
            "--run.storage_path": self.folder / "runs",
            "--run.checkpoint_every_steps": 3,
            "--evaluation.log_every_steps": 1,
            "--tracking.uri": f"sqlite:///{self.folder / 'mlflow.db'}",
            "--cluster.workers": 2,
            "--cluster.device": "cpu",
        }
        given = [str(word) for option in options.items() for word in option]
        return PretrainProcess([str(self.folder / "classifier"), *given], command="evaluate")

    def results(self, name: str) -> dict[str, bytes]:
        run = Storage(str(self.folder / "runs" / name))
        return {file: run.read_bytes(file) for file in (SCORES, RESULT)}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("evaluation")
    subprocess.run(
        [
            *(warm.python(), "-m", "data_prep", "synthetic", "--out", str(folder / "data"), "--split", "val"),
            *(
                "--num-videos",
                str(VIDEOS),
                "--seed",
                "1",
                "--width",
                "96",
                "--height",
                "64",
                "--frames",
                "48",
            ),
        ],
        check=True,
    )
    save_classifier(folder / "classifier", frames=8, image_size=64)
    new_database(folder / "mlflow.db")
    return Evaluation(folder)


@pytest.fixture(scope="module")
def undisturbed(evaluation: Evaluation) -> dict[str, bytes]:
    command = evaluation.start("undisturbed")
    assert command.finish() == 0, command.output
    assert f"view {VIDEOS * VIEWS}/{VIDEOS * VIEWS}" in command.output
    return evaluation.results("undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker(evaluation: Evaluation, undisturbed: dict[str, bytes], rank: int) -> None:
    """The driver starts new workers by itself."""
    name = f"killed-rank{rank}"
    command = evaluation.start(name)
    command.read_until(rf"view \d+/{VIDEOS * VIEWS}")
    worker = command.worker(rank)
    command.read_until(SAVED)
    worker.kill()
    command.read_until(CONTINUES)
    assert command.finish() == 0, command.output
    assert evaluation.results(name) == undisturbed


@pytest.mark.slow
def test_killed_driver(evaluation: Evaluation, undisturbed: dict[str, bytes]) -> None:
    """The same command goes on."""
    command = evaluation.start("killed-driver")
    command.read_until(SAVED)
    command.send(signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    again = evaluation.start("killed-driver")
    again.read_until(CONTINUES)
    assert again.finish() == 0, again.output
    assert evaluation.results("killed-driver") == undisturbed
