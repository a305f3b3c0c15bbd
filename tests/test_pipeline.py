"""The three commands that make a classifier, one after the other: pretrain, finetune, evaluate."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from arvideo_dist.train.run.stop import RESULT
from data_prep.synthetic import CLASSES
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


def python(*arguments: str) -> str:
    done = subprocess.run(
        [warm.python(), "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def written(file: Path, *layers: dict[str, Any], **run: Any) -> str:
    names = {name for layer in layers for name in layer}
    merged = {name: {k: v for layer in layers for k, v in layer.get(name, {}).items()} for name in names}
    file.write_text(yaml.safe_dump({**merged, "run": run}))
    return str(file)


def test_a_classifier_from_a_pretrained_encoder_beats_chance_by_five_standard_errors(tmp_path: Path) -> None:
    data, runs = str(tmp_path / "data"), str(tmp_path / "runs")
    for split, number, seed in (("train", TRAIN, 1), ("val", HELD_OUT, 2)):
        size = ["--width", "32", "--height", "32", "--frames", "26"]
        python("data_prep", "synthetic", "--out", data, "--split", split, "--num-videos", str(number),
               "--seed", str(seed), *size)  # fmt: skip
    places = ["--data.path", data, "--tracking.uri", new_database(tmp_path / "mlflow.db")]
    pretrain = written(tmp_path / "pretrain.yaml", SHARED, PRETRAIN, name="encoder", storage_path=runs)
    python("arvideo_dist.pretrain", "--config", pretrain, *places)
    finetune = written(tmp_path / "finetune.yaml", SHARED, FINETUNE, name="classifier", storage_path=runs)
    said = python("arvideo_dist.finetune", "--config", finetune, "--init-from", f"{runs}/encoder", *places)
    assert f"starts from {runs}/encoder (encoder)" in said
    here = ["--cluster.workers", "2", "--cluster.device", "cpu", "--data.workers", "1"]
    said = python("arvideo_dist.evaluate", f"{runs}/classifier", "--views", "1x1", *here)
    (evaluation,) = Path(runs, "classifier", "evaluations").iterdir()
    result = json.loads((evaluation / RESULT).read_text())
    assert result["videos"] == HELD_OUT
    chance = 1 / len(CLASSES)
    error = math.sqrt(chance * (1 - chance) / HELD_OUT)
    assert result["accuracy/top1"] > chance + 5 * error, said
