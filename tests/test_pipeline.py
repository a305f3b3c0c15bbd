"""From videos to an accuracy: data_prep, pretrain, finetune and evaluate, by `jobs.pipeline`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from arvideo_dist.train.run.stop import RESULT
from data_prep.synthetic import CLASSES
from jobs import pipeline
from tests import warm
from tests.services.mlflow_server import new_database

TRAIN, HELD_OUT = 960, 120
SHARED: dict[str, Any] = {
    "data": {"stride": 8, "workers": 1},
    "model": {"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16]},
    "cluster": {"workers": 2, "device": "cpu"},
}
PRETRAIN = {
    "model": {"cluster": [1, 1, 1], "mask_ratio": 0, "target_norm": "none"},
    "decoder": {"width": 64, "depth": 1},
    "optim": {"base_lr": 4e-3, "warmup_epochs": 0.1},
    "train": {"steps": 20, "global_batch": 32, "micro_batch": 16},
}
# No augmentation: at this size and length it would only keep the model from learning.
FINETUNE = {
    "optim": {"base_lr": 2.4e-3, "warmup_epochs": 1, "layer_decay": 1.0},
    "model": {"drop_path": 0, "head_init_scale": 1.0},
    "augment": {
        **{"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "rand_augment_operations": 0, "flip": 0},
        **{"erase": 0, "mixup": 0, "cutmix": 0},
    },
    "train": {"steps": 400, "global_batch": 32, "micro_batch": 16, "log_every_steps": 50},
    "validation": {"every_steps": 200},
}


def written(file: Path, *layers: dict[str, Any], **run: Any) -> str:
    names = {name for layer in layers for name in layer}
    merged = {name: {k: v for layer in layers for k, v in layer.get(name, {}).items()} for name in names}
    file.write_text(yaml.safe_dump({**merged, "run": run}))
    return str(file)


def test_one_file_leads_from_videos_to_an_accuracy_five_standard_errors_above_chance(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """And again in seconds, since nothing has changed."""
    uri, runs = new_database(tmp_path / "mlflow.db"), str(tmp_path / "runs")
    pretrain = written(tmp_path / "pretrain.yaml", SHARED, PRETRAIN, name="encoder", storage_path=runs)
    finetune = written(tmp_path / "finetune.yaml", SHARED, FINETUNE, name="classifier", storage_path=runs)
    made = f"data_prep synthetic --out {tmp_path}/data --width 32 --height 32 --frames 26"
    here = "--cluster.workers 2 --cluster.device cpu --data.workers 1"
    stages = {
        "train": f"{made} --split train --num-videos {TRAIN} --seed 1",
        "val": f"{made} --split val --num-videos {HELD_OUT} --seed 2",
        "encoder": f"pretrain --config {pretrain} --data.path {{train}} --tracking.uri {uri}",
        "classifier": (
            f"finetune --config {finetune} --init-from {{encoder}} --data.path {{train}} --tracking.uri {uri}"
        ),
        "accuracy": f"evaluate {{classifier}} --views 1x1 {here}",
    }
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump({"folder": str(tmp_path / "known"), "stages": stages}, sort_keys=False))
    said = finished(file, capfd)
    assert f"starts from {runs}/encoder (encoder)" in said
    (evaluation,) = Path(runs, "classifier", "evaluations").iterdir()
    result = json.loads((evaluation / RESULT).read_text())
    assert result["videos"] == HELD_OUT
    chance = 1 / len(CLASSES)
    error = math.sqrt(chance * (1 - chance) / HELD_OUT)
    assert result["accuracy/top1"] > chance + 5 * error, said
    line = (tmp_path / "known" / "table.md").read_text().splitlines()[-1]
    assert line.startswith(f"| accuracy | {result['accuracy/top1']:.2%} |")

    client = MlflowClient(uri)
    (experiment,) = (each for each in client.search_experiments() if each.name == "arvideo")
    by_name = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = by_name["all"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["accuracy/top-1"] == pytest.approx(result["accuracy/top1"])
    children = [
        name for name, run in by_name.items() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 3

    said = finished(file, capfd)
    assert said.count("nothing has changed") == len(stages)
    assert len(client.search_runs([experiment.experiment_id])) == len(by_name)


def finished(file: Path, capfd: pytest.CaptureFixture) -> str:
    """What the pipeline and its stages have said."""
    with warm.as_sys_executable(), pytest.raises(SystemExit) as ended:
        pipeline.main([str(file)])
    said = capfd.readouterr()
    assert ended.value.code == 0, said.out + said.err
    return said.out
