"""Fine-tuning and evaluation whose data and runs are in object storage: interrupted, continued, started from."""

from __future__ import annotations

import contextlib
import io
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.commands import EvaluateConfig, FinetuneConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.evaluate import of_source
from arvideo_dist.finetune import with_geometry
from arvideo_dist.launch.start import check_initial_weights, derive_checked, with_absolute_paths
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.interchange import export_encoder
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.tasks.scoring import SCORES
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.compose import train
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RESULT
from arvideo_dist.train.sequence import run_sequence
from arvideo_dist.train.trained import open_trained, read_weights
from tests.services.s3 import S3
from tests.train.distributed import run_ranks
from tests.train.runs import make_data
from tests.train.test_finetuning import finetune_config, logged
from tests.train.test_length import Told, _LeavesAfter

STEPS, VIDEOS, VIEWS = 4, 16, 6
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Start:
    """One start of a run, which may be told to leave."""

    assignment: Assignment
    leave_after: int | None = None


@dataclass(frozen=True)
class Made:
    """Two runs alike, one on a disk and one in object storage, and what was logged of them."""

    local: Storage
    remote: Storage
    whole: dict[int, dict[str, float]]
    interrupted: dict[int, dict[str, float]]


def _start_all(starts: list[Start]) -> list[dict[int, dict[str, float]]]:
    """What each start logs."""
    points = []
    for start in starts:
        told, control = Told(), dist.new_group(backend="gloo")
        watch = _LeavesAfter(start.assignment.lease, control, start.leave_after)
        run = run_sequence if isinstance(start.assignment.config, EvaluateConfig) else train
        with contextlib.redirect_stdout(io.StringIO()):
            tracker: Any = told if dist.get_rank() == 0 else None
            run(start.assignment, torch.device("cpu"), control, watch, tracker)
        points.append(told.points)
    return points


def _run(*runs: tuple[Any, list[int | None]]) -> list[dict[int, dict[str, float]]]:
    """What each start of each run logs: two workers do them one after the other."""
    with contextlib.ExitStack() as held:
        starts = []
        for config, leaves in runs:
            guard = held.enter_context(acquire(run_folder(config), lease_s=600)).guard
            assignment = Assignment(config, derive_checked(config), "", "", guard)
            starts += [Start(assignment, leave_after) for leave_after in leaves]
        return run_ranks(2, _start_all, starts)[0]


@pytest.fixture(scope="module")
def store(s3: S3) -> Iterator[str]:
    """An empty bucket, as `s3://BUCKET%s?OPTIONS`; credentials are in the environment, as on a cluster."""
    s3.make_bucket("finetuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"s3://finetuning%s?endpoint_override={s3.address}&scheme=http&region=us-east-1"


def _config(folder: Path, name: str, **sections: Any) -> FinetuneConfig:
    sections["run"] = {"keep_last": 2, "checkpoint_every_steps": 2, **sections.get("run", {})}
    sections["train"] = {"steps": STEPS, **sections.get("train", {})}
    return finetune_config(folder, name, **sections)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, s3: S3, store: str) -> Made:
    folder = tmp_path_factory.mktemp("on-s3")
    data = make_data(folder / "data")
    s3.put(Storage(str(data)), "finetuning/data")
    local = _config(folder, "run")
    remote = _config(folder, "run", run={"storage_path": store % "/runs"}, data={"path": store % "/data"})
    whole, before, after = _run((local, [None]), (remote, [3, None]))
    return Made(run_folder(local), run_folder(remote), logged(whole), logged(before | after))


def test_an_interrupted_fine_tuning_in_object_storage_goes_on_to_the_bit(made: Made) -> None:
    assert sorted(made.whole) == list(range(1, STEPS + 1))
    assert made.interrupted == made.whole
    ended = [json.loads(run.read_bytes(RESULT)) for run in (made.local, made.remote)]
    for name in ("step", "best_step", "best_value", "loss/val", "accuracy/top1"):
        assert ended[0][name] == ended[1][name], name
    assert complete_checkpoints(made.remote)[-1] == f"step-{STEPS:08d}"


@pytest.mark.parametrize("checkpoint", ["step-00000003", None])
def test_a_run_and_a_checkpoint_in_object_storage_are_started_from(
    made: Made, store: str, tmp_path: Path, checkpoint: str | None
) -> None:
    """What was not set of the encoder's geometry is taken from there."""
    assert "step-00000003" in complete_checkpoints(made.remote), "made on leaving"
    source = store % (f"/runs/run/{FOLDER}/{checkpoint}" if checkpoint else "/runs/run")
    given = {
        "run": {"name": "next", "storage_path": str(tmp_path)},
        "model": {"init_from": source, "classes": 5},
        "data": {"path": store % "/data"},
        "cluster": {"device": "cpu"},
    }
    config = with_geometry(FinetuneConfig.model_validate(given), Namespace())
    config = with_absolute_paths(config)
    assert (config.model.frames, config.model.image_size, config.model.encoder) == (4, 32, "demo")
    check_initial_weights(config)
    task = task_of(config)
    module = task.build()
    assert isinstance(module, Classifier)
    said = task.start_from(module, read_weights)
    assert re.search(r"/runs/run.* \(encoder", said)
    expected = made.remote.child(FOLDER).child(checkpoint or f"step-{STEPS:08d}").address
    trained = open_trained(expected).load_encoder().state_dict()
    for name, weight in module.encoder.state_dict().items():
        assert torch.equal(weight, trained[name]), name


def test_a_file_of_weights_in_object_storage_is_started_from(made: Made, store: str, tmp_path: Path) -> None:
    """Its address carries options after the file's name."""
    trained = open_trained(made.remote.address)
    export_encoder(trained.load_encoder(), trained.config.model, Storage(store % "/exports"), "torch", None)
    source = store % "/exports/checkpoint.pth"
    geometry = {"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16], "classes": 5}
    given = {"run": {"name": "next", "storage_path": str(tmp_path)}, "data": {"path": store % "/data"}}
    config = FinetuneConfig.model_validate({**given, "model": {**geometry, "init_from": source}})
    config = with_geometry(config, Namespace())
    check_initial_weights(config)
    task = task_of(config)
    module = task.build()
    assert isinstance(module, Classifier)
    task.start_from(module, read_weights)
    expected = trained.load_encoder().state_dict()
    for name, weight in module.encoder.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_its_evaluation_lies_beside_it_and_equals_that_of_the_run_on_a_disk(made: Made, store: str) -> None:
    """Interrupted and continued, too; the data set is taken from the run."""
    given = {
        "run": {"checkpoint_every_steps": 2},
        "data": {"workers": 0},
        "evaluation": {"views": "2x3"},
        "tracking": {"uri": "http://there"},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    local, remote = (
        of_source(EvaluateConfig.model_validate(given), mock.Mock(source=source))
        for source in (made.local.address, store % "/runs/run")
    )
    assert remote.data.path == store % "/data"
    name = f"step-{STEPS:08d}-val-2x3"
    assert run_folder(remote).uri == made.remote.child("evaluations").child(name).uri
    _run((local, [None]), (remote, [6, None]))
    for file in (SCORES, RESULT, "classes.txt"):
        assert run_folder(remote).read_bytes(file) == run_folder(local).read_bytes(file)
    result = json.loads(run_folder(remote).read_bytes(RESULT))
    assert (result["videos"], result["views"]) == (VIDEOS, VIDEOS * VIEWS)
