"""Whole runs on real Ray Train with two workers: what they leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.export import main as export
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.kinds import build_model
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.trained import open_trained
from tests.train.runs import PretrainProcess, history, run_arguments, runs_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> PretrainProcess:
    """An uninterrupted run."""
    process = PretrainProcess(run_arguments(folder, "whole"))
    assert process.finish() == 0, process.output
    return process


def test_run_says_what_it_will_do_and_where_everything_is(whole: PretrainProcess, folder: Path) -> None:
    assert "14 encoder tokens, 56 decoder queries" in whole.output
    assert "16 clips = 2 workers x 4 clips x 2 accumulation steps (padding 0)" in whole.output
    assert "step 12/12" in whole.output
    assert f"checkpoint  {folder}/runs/whole/checkpoints/step-00000012" in whole.output
    assert "mlflow ui --backend-store-uri" in whole.output


def test_every_step_is_in_mlflow_once_with_all_metrics(whole: PretrainProcess, folder: Path) -> None:
    for metric in (
        "loss/train", "learning_rate", "gradient_norm", "clips_per_second", "clips_per_second_per_worker",
        "data_wait_share", "memory_gib", "failed_saves",
    ):  # fmt: skip
        assert [step for step, _ in history(folder / "runs", "whole", metric)] == list(range(1, 13)), metric
    for metric in ("loss/val", "loss/constant_predictor", "loss/val_other_context"):
        assert [step for step, _ in history(folder / "runs", "whole", metric)] == [6, 12], metric
    losses = [value for _, value in history(folder / "runs", "whole", "loss/train")]
    assert losses[-1] < losses[0]


def test_mlflow_holds_configuration_and_picture(whole: PretrainProcess, folder: Path) -> None:
    record = json.loads((folder / "runs/whole/run.json").read_text())
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "16"
    names = {file.path for file in client.list_artifacts(record["mlflow_run_id"])}
    assert {"config.yaml", "derived.json", "pictures"} <= names
    pictures = {file.path for file in client.list_artifacts(record["mlflow_run_id"], "pictures")}
    assert pictures == {"pictures/step-00000006.png", "pictures/step-00000012.png"}


def test_checkpoint_opens_without_an_engine_and_only_the_newest_are_kept(
    whole: PretrainProcess, folder: Path
) -> None:
    run = Storage(str(folder / "runs/whole"))
    assert complete_checkpoints(run) == ["step-00000008", "step-00000012"]
    checkpoint = Checkpoint(run, "step-00000012")
    checkpoint.verify()
    assert checkpoint.state["position"] == 12 * 16
    assert checkpoint.state["optimizer_steps"] == 12
    assert len(checkpoint.manifest.parts) == 2
    config = PretrainConfig.model_validate(checkpoint.state["config"])
    model = ARVideo(config.model, config.decoder)
    before = model.encoder.patch_embed.proj.weight.clone()
    checkpoint.load_weights(model)
    assert not torch.equal(before, model.encoder.patch_embed.proj.weight)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_same_command_again_says_that_the_run_is_finished_and_starts_nothing(
    whole: PretrainProcess, folder: Path
) -> None:
    run = folder / "runs/whole"
    assert {"step", "loss/train", "loss/val"} <= json.loads((run / "result.json").read_bytes()).keys()
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    run_id = json.loads((run / "run.json").read_text())["mlflow_run_id"]
    before = client.get_run(run_id).info.end_time, sorted(run.rglob("*"))
    again = PretrainProcess(run_arguments(folder, "whole"))
    assert again.finish() == 0, again.output
    assert "run whole is finished: step 12 was its last" in again.output
    assert f"checkpoint  {run}/checkpoints/step-00000012" in again.output
    assert "workers have started" not in again.output
    assert (client.get_run(run_id).info.end_time, sorted(run.rglob("*"))) == before


def test_encoder_starts_from_the_given_weights_and_training_goes_on_from_them(
    whole: PretrainProcess, folder: Path
) -> None:
    export([str(folder / "runs/whole"), "--format", "hf", "--out", str(folder / "initial")])
    process = PretrainProcess(
        [
            *(*run_arguments(folder, "initialised"), "--init-from", str(folder / "initial")),
            *("--train.steps", "4", "--run.checkpoint_every_steps", "1", "--run.keep_last", "4"),
        ]
    )
    assert process.finish() == 0, process.output
    assert f"starts from {folder}/initial (encoder)" in process.output
    models = [
        open_trained(f"{folder}/runs/initialised/checkpoints/step-{n:08d}").load_model() for n in (1, 4)
    ]
    at_start, trained = (dict(model.named_parameters()) for model in models)
    whole_run = open_trained(f"{folder}/runs/whole")
    given, config = dict(whole_run.load_model().named_parameters()), whole_run.pretraining
    torch.manual_seed(0)  # run.seed
    fresh = dict(build_model(config.model, config.decoder).named_parameters())
    rate = 2.5e-4  # at its peak; 0 at the first step of the warm-up, whose checkpoint hence holds the start
    for name, start in at_start.items():
        expected = given if name.startswith("encoder.") else fresh
        assert torch.equal(start, expected[name]), name
        assert not torch.equal(trained[name], start), name
        assert (trained[name] - start).abs().max() < 10 * rate, name


def test_run_with_too_many_bad_samples_stops_without_a_restart_and_names_them(folder: Path) -> None:
    damaged = folder / "damaged"
    shutil.copytree(folder / "data", damaged)
    shards = sorted(damaged.glob("train-*.tar"))
    index = pq.read_table(damaged / "index-train.parquet").to_pylist()
    row = next(row for row in index if row["shard"] == shards[0].name)
    with open(shards[0], "r+b") as tar:
        tar.seek(row["offset"])
        tar.write(bytes(row["size"]))
    process = PretrainProcess([*run_arguments(folder, "bad"), "--data.path", str(damaged)])
    assert process.finish() == 1
    assert "1 bad samples are more than data.max_bad_fraction 0.01 allows" in process.output
    assert process.output.count("starts from random weights") == 1
    listed = pq.read_table(folder / "runs/bad/bad_samples.parquet").to_pylist()
    assert [(bad["shard"], bad["key"], bad["places"]) for bad in listed] == [(row["shard"], row["key"], 1)]
