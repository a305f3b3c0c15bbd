"""A classifier in a folder of transformers, and evaluations of it without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.evaluate import of_source
from arvideo_dist.model.interchange import export_classifier
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.classification import build_classifier
from data_prep.synthetic import CLASSES

VIEWS, TEMPORAL_AND_SPATIAL = 6, "2x3"


def save_classifier(folder: Path, frames: int = 4, image_size: int = 32) -> str:
    """Of `model.encoder` demo and random weights; its address."""
    model = ClassifierConfig(
        encoder="demo", frames=frames, image_size=image_size, tubelet=(2, 16, 16), head_init_scale=1.0
    )
    torch.manual_seed(0)
    classifier = build_classifier(model, len(CLASSES))
    export_classifier(classifier, model, Storage(str(folder)), "hf", list(CLASSES))
    return str(folder)


def evaluate_config(
    classifier: str, data: str, runs: str, name: str, views: str = TEMPORAL_AND_SPATIAL, **run: Any
) -> EvaluateConfig:
    """Of the split `val` at `data`, saved after every second batch of a worker."""
    given = {
        "run": {"storage_path": runs, "name": name, "checkpoint_every_steps": 2, **run},
        "data": {"path": data, "split": "val", "stride": 2, "workers": 0},
        "evaluation": {"views": views},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    return of_source(EvaluateConfig.model_validate(given), mock.Mock(source=classifier))
