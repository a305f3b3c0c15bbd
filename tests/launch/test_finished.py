"""A finished run, started again: it says so at once, starts nothing, and MLflow keeps its end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from arvideo_dist import command
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.data.index import FileEntry
from arvideo_dist.launch import finished
from arvideo_dist.launch.finished import already_finished
from arvideo_dist.launch.start import check_resume
from arvideo_dist.pretrain import main
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, checkpoint_name
from arvideo_dist.train.checkpoint.manifest import CheckpointManifest
from arvideo_dist.train.run.changes import data_digests
from arvideo_dist.train.run.stop import RESULT
from arvideo_dist.train.tracking import outbox
from arvideo_dist.train.tracking.outbox import Points
from arvideo_dist.train.tracking.runs import close_run, open_run, tracking_uri
from tests.data.conftest import FRAMES, write_dataset
from tests.train.runs import TINY

SAMPLES, BATCH, STEPS = 8, 4, 6
METRICS = {"loss/train": 0.5, "loss/val": 0.25, "loss/constant_predictor": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and an MLflow database for all: to make one takes seconds."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data", [b"x"] * SAMPLES, FRAMES[:SAMPLES])
    return folder


def _config(folder: Path, name: str, **train: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            **TINY,
            "run": {
                "name": name,
                "storage_path": str(folder),
                "allow_change": ["train.steps", "train.global_batch"],
            },
            "data": {"path": str(folder / "data"), "val_split": None},
            "optim": {"warmup_epochs": 0},
            "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, **train},
        }
    )


def _leave(config: PretrainConfig, step: int = STEPS, result: dict[str, Any] | None = None) -> None:
    """The folder of a run that has come to `step` and left `result`."""
    run = run_folder(config)
    derived = derive(config, SAMPLES)
    state = {
        "config": config.model_dump(mode="json"),
        **{"data_digests": data_digests(config.data), "precision": "fp32"},
        **{"step": step, "position": step * BATCH, "total_places": derived.total_places},
        "derived": {"samples": SAMPLES, "total_steps": derived.total_steps, "global_batch": BATCH},
    }
    content = json.dumps(state).encode()
    entry = FileEntry(name=STATE, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = CheckpointManifest(shapes={}, fragments=[], parts=[], state=entry)
    run.write_bytes(f"{FOLDER}/{checkpoint_name(step)}/{STATE}", content)
    run.write_bytes(f"{FOLDER}/{checkpoint_name(step)}/{MANIFEST}", manifest.model_dump_json().encode())
    result = {"step": step, **METRICS} if result is None else result
    run.write_bytes(RESULT, json.dumps(result).encode())


def _mlflow(config: PretrainConfig, status: str) -> str:
    """Its MLflow run, ended with `status`."""
    run_id = open_run(config, {}, run_folder(config))
    close_run(config, run_id, status)
    return run_id


def _info(config: PretrainConfig, run_id: str) -> Any:
    return MlflowClient(tracking_uri=tracking_uri(config)).get_run(run_id).info


def _arguments(config: PretrainConfig, file: Path) -> list[str]:
    file.write_text(config.model_dump_json(exclude_defaults=True))  # JSON is YAML
    return ["--config", str(file)]


def test_a_finished_run_says_so_with_its_results_and_touches_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, "done")
    _leave(config)
    run_id = _mlflow(config, "FINISHED")
    before = _info(config, run_id).end_time
    files = sorted(str(file) for file in Path(run_folder(config).root).rglob("*"))

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run starts nothing")

    for name in ("launch", "acquire", "check_driver"):
        monkeypatch.setattr(command, name, refuse)
    monkeypatch.setattr(finished, "acquire", refuse)
    main(_arguments(config, tmp_path / "config.yaml"))
    said = capsys.readouterr().out
    assert "run done is finished: step 6 was its last, nothing is left to train" in said
    assert f"checkpoint  {folder}/done/checkpoints/step-00000006" in said
    assert "validation  loss 0.2500, best constant predictor 0.5000 (50.0% below it)" in said
    assert f"mlflow      run {run_id}; dashboard: " in said
    assert _info(config, run_id).end_time == before
    assert sorted(str(file) for file in Path(run_folder(config).root).rglob("*")) == files


def test_a_run_that_was_made_longer_goes_on(folder: Path) -> None:
    config = _config(folder, "longer")
    _leave(config)
    assert already_finished(_config(folder, "longer", steps=STEPS + 1)) is None


def test_the_result_of_an_earlier_end_is_none_of_a_run_that_went_on(folder: Path) -> None:
    config = _config(folder, "went-on", steps=2 * STEPS)
    _leave(config, step=STEPS + 3, result={"step": STEPS, **METRICS})
    assert already_finished(config) is None
    assert already_finished(_config(folder, "went-on", steps=STEPS)) is None, "its end has no validation yet"


def test_a_run_without_a_result_or_before_its_end_goes_on(folder: Path) -> None:
    config = _config(folder, "short")
    _leave(config, step=STEPS - 1)
    assert already_finished(config) is None
    Storage(config.run.storage_path).child("short").delete(RESULT)
    assert already_finished(config) is None


def test_another_batch_does_not_make_a_finished_run_an_unfinished_one(folder: Path) -> None:
    config = _config(folder, "batch")
    _leave(config)
    _mlflow(config, "FINISHED")
    assert already_finished(_config(folder, "batch", global_batch=2 * BATCH)) is not None
    assert already_finished(_config(folder, "batch", global_batch=BATCH // 2)) is not None


def test_what_is_no_leave_is_refused_also_of_a_finished_run(folder: Path) -> None:
    config = _config(folder, "refused")
    _leave(config)
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"base_lr": 1.0})})
    with pytest.raises(ValueError, match=r"optim\.base_lr: 0\.00015 in the checkpoint, 1\.0 now"):
        already_finished(changed)


def test_what_mlflow_did_not_get_of_a_finished_run_is_sent_and_its_status_set(folder: Path) -> None:
    config = _config(folder, "unsent")
    _leave(config)
    run, run_id = run_folder(config), _mlflow(config, "KILLED")
    kept = Points(step=STEPS, time_ms=1, metrics={"loss/train": 0.5}).model_dump_json()
    run.write_bytes(f"{outbox.FOLDER}/00000001-00000000.jsonl", kept.encode() + b"\n")
    found = already_finished(config)
    assert found is not None
    assert _info(config, run_id).status == "FINISHED"
    client = MlflowClient(tracking_uri=tracking_uri(config))
    assert [p.step for p in client.get_metric_history(run_id, "loss/train")] == [STEPS]
    assert not outbox.holds_entries(run)


def test_an_mlflow_that_is_gone_does_not_hide_that_the_run_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(folder, "gone")
    _leave(config)
    _mlflow(config, "FINISHED")
    record = json.loads(run_folder(config).read_bytes("run.json")) | {"mlflow_run_id": "0" * 32}
    run_folder(config).write_bytes("run.json", json.dumps(record).encode())
    found = already_finished(config)
    assert found is not None
    assert "does not tell whether it has all of the run" in capsys.readouterr().out


def test_another_batch_on_the_way_is_said_with_the_steps_that_are_left(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(_config(folder, "half"), step=STEPS // 2)
    doubled = _config(folder, "half", global_batch=2 * BATCH)
    command._print_start(doubled, derive(doubled, SAMPLES), check_resume(doubled))
    said = capsys.readouterr().out
    assert (
        "schedule: 5 steps (3 of them done, some with another train.global_batch: the run keeps the 24 clips"
        in said
    )
    plain = _config(folder, "half")
    command._print_start(plain, derive(plain, SAMPLES), check_resume(plain))
    assert "schedule: 6 steps over 8 samples" in capsys.readouterr().out
