"""A small run of each method on real clips: a checkpoint after a real optimiser step, and its MLflow run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arvideo_dist.analysis.clips import choose_source, load_clips
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.kinds import build_model
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.draws import TokenDraw
from arvideo_dist.train.tracking.runs import open_run
from tests.data.conftest import encode, write_dataset
from tests.train.distributed import run_ranks, save_checkpoint
from tests.train.engines import engine_of

CLIPS = 3
GEOMETRY = {"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": (2, 8, 8)}
MODELS = {
    "arvideo": ModelConfig(**GEOMETRY, cluster=(1, 2, 2), mask_ratio=0.5),
    "videomae": ModelConfig(**GEOMETRY, kind="videomae", mask_ratio=0.75),
    "randsac": ModelConfig(**GEOMETRY, kind="randsac", cluster=(1, 2, 2), mask_ratio=0.0),
}


def run_config(folder: Path, kind: str) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {"name": kind, "storage_path": str(folder)},
            "data": {"path": str(folder / "data"), "stride": 2},
            "model": MODELS[kind],
            "decoder": DecoderConfig(width=64, depth=1),
            "train": {"global_batch": 1, "micro_batch": 1, "zero_stage": 1, "steps": 1},
        }
    )


def _train(folder: Path) -> None:
    for kind in MODELS:
        config = run_config(folder, kind)
        torch.manual_seed(0)
        model = build_model(config.model, config.decoder)
        clips = load_clips(
            choose_source(config.data, None, None, None), 1, 4, 32, TokenDraw(model.sequences), seed=0
        )
        engine = engine_of(model, config.train)
        engine.accumulate(list(clips), 1.0)
        engine.apply(1e-3)
        save_checkpoint(
            Storage(str(folder)).child(kind), engine, 1, {"config": config.model_dump(mode="json")}
        )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run for each of `MODELS`, by its kind, and of their data set, `data`; not to be changed."""
    folder = tmp_path_factory.mktemp("analysis")
    videos = [encode(folder / f"{i}.mp4", 20 + i, i) for i in range(CLIPS)]
    write_dataset(folder / "data", videos, [20, 21, 22], split="val")
    run_ranks(1, _train, folder)
    for kind in MODELS:
        open_run(run_config(folder, kind), {}, Storage(str(folder)).child(kind))
    return folder
