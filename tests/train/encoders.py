"""An encoder in a folder of transformers, and embeddings by it without Ray."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.config.model import EncoderConfig
from arvideo_dist.embed import of_source
from arvideo_dist.model.interchange import export_encoder
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder
from arvideo_dist.storage import Storage

MODEL = EncoderConfig(encoder="demo", frames=4, image_size=32, tubelet=(2, 16, 16))


def make_encoder() -> Encoder:
    """Of random weights, norms among them."""
    torch.manual_seed(0)
    encoder = Encoder(ENCODER_SIZES[MODEL.encoder], MODEL.tubelet, math.prod(MODEL.token_grid))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def save_encoder(folder: Path) -> str:
    """Its address."""
    export_encoder(make_encoder(), MODEL, Storage(str(folder)), "hf", None)
    return str(folder)


def embed_config(source: str, path: str, runs: str, name: str, **sections: dict[str, Any]) -> EmbedConfig:
    """Of the split `val` at `path`, saved after every second batch of a worker."""
    base: dict[str, dict[str, Any]] = {
        "run": {"storage_path": runs, "name": name, "checkpoint_every_steps": 2},
        "data": {"path": path, "split": "val", "stride": 2, "workers": 0},
        "embedding": {"views": "2x3"},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return of_source(EmbedConfig.model_validate(merged), mock.Mock(source=source))
