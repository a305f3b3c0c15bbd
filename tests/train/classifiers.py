"""A classifier in a folder of transformers, and evaluations of it without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.evaluate import of_source
from data_prep.synthetic import CLASSES

VIEWS, TEMPORAL_AND_SPATIAL = 6, "2x3"


def save_classifier(folder: Path, frames: int = 4, image_size: int = 32) -> str:
    """Of `model.encoder` demo and random weights, with tubelets of 2 x 16 x 16; its address."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification  # takes seconds

    config = VideoMAEConfig(
        image_size=image_size, patch_size=16, num_frames=frames, tubelet_size=2, hidden_size=192,
        num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, use_mean_pooling=True,
    )  # fmt: skip
    config.num_labels = len(CLASSES)
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    return str(folder)


def evaluate_config(classifier: str, data: str, runs: str, name: str, **run: Any) -> EvaluateConfig:
    """Of the split `val` at `data`, saved after every second batch of a worker."""
    given = {
        "run": {"storage_path": runs, "name": name, "checkpoint_every_steps": 2, **run},
        "data": {"path": data, "split": "val", "stride": 2, "workers": 0},
        "evaluation": {"views": TEMPORAL_AND_SPATIAL},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    return of_source(EvaluateConfig.model_validate(given), mock.Mock(source=classifier))
