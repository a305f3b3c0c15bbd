"""The analyses from their inputs to the files that they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arvideo_dist.analysis import attention_rank as ranks
from arvideo_dist.analysis import order as orders
from arvideo_dist.analysis import reconstruct as predictions
from arvideo_dist.analysis.clips import choose_source, load_clips
from arvideo_dist.analysis.encoders import open_encoders
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.data import TrainDataConfig
from arvideo_dist.data.index import SampleRow
from arvideo_dist.data.loader import ClipSource
from arvideo_dist.hardware import environment
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.draws import TokenDraw
from arvideo_dist.tasks.picture import gif, png
from arvideo_dist.train.trained import Trained

_SECONDS_A_PAGE = 0.8


@dataclass(frozen=True)
class Clips:
    """Which clips, as the command line says; None: as the run has it."""

    data: str | None
    split: str | None
    stride: int | None
    number: int

    def source(self, run: TrainDataConfig | None) -> ClipSource:
        return choose_source(run, self.data, self.split, self.stride)


@dataclass(frozen=True)
class Found:
    """The outcome of an analysis."""

    text: str  # for the terminal
    files: dict[str, bytes]  # content by name
    runs: list[Storage]  # the training runs that it is about


def attention_rank(sources: Sequence[str], clips: Clips, tolerance: float | None) -> Found:
    """Figure 3 of `sources` (see `open_encoders`): attention-rank.png and .json. Raises ValueError."""
    opened = open_encoders(sources)
    tokens = opened[0].tokens
    tolerance = ranks.default_tolerance(tokens) if tolerance is None else tolerance
    if not 0 < tolerance < 1:
        raise ValueError(f"--tolerance {tolerance:g}: give a share of the largest singular value, in (0, 1)")
    source = clips.source(next((encoder.data for encoder in opened if encoder.data), None))
    results = {}
    for encoder in opened:
        frames, image_size = encoder.clip
        batches = load_clips(source, clips.number, frames, image_size, _nothing, seed=0)
        found = ranks.attention_ranks(
            encoder.encoder.to(_device()), encoder.tubelet, batches, tolerance, _say_on_stderr
        )
        results[encoder.label] = {"source": encoder.source, "clips": len(found), **ranks.summary(found)}
    report = {
        "definition": ranks.DEFINITION,
        "tolerance": tolerance,
        "tokens": tokens,
        "data": {"path": source.storage.uri, "split": source.split, "stride": source.stride},
        **environment(),
        "encoders": results,
    }
    lines = [f"rank by layer of {tokens} tokens: {ranks.DEFINITION}; tolerance {tolerance:.3g}"]
    lines += [f"{label}: " + " ".join(f"{rank:.1f}" for rank in r["mean"]) for label, r in results.items()]
    files = {
        "attention-rank.png": ranks.plot(results, tokens, tolerance),
        "attention-rank.json": (json.dumps(report, indent=1) + "\n").encode(),
    }
    return Found("\n".join(lines), files, [encoder.run for encoder in opened if encoder.run is not None])


def reconstruct(trained: Trained, clips: Clips) -> Found:
    """reconstruct.png of all clips and reconstruct-<clip>.gif of each. Raises ValueError."""
    config = trained.pretraining
    model_config = config.model
    # All of a cluster's tokens, also if training asked for a share of them: queries do not see each other.
    model = trained.load_model(config.decoder.model_copy(update={"target_ratio": 1.0}))
    model = model.to(_device()).eval()
    batches = load_clips(
        clips.source(config.data),
        clips.number,
        model_config.frames,
        model_config.image_size,
        TokenDraw(model.sequences),
        config.run.seed,
    )
    predicted = [predictions.predict(model, batch) for batch in batches]
    files = {"reconstruct.png": png(predictions.overview(predicted, model_config))}
    steps = model.sequences.prediction_steps()
    for number, clip in enumerate(predicted):
        pages = list(predictions.pages(clip, steps, model_config))
        files[f"reconstruct-{number:03d}.gif"] = gif(pages, _SECONDS_A_PAGE)
    lines = [
        f"clip {number}: mean squared error {clip.error_m.mean():.4f}"
        for number, clip in enumerate(predicted)
    ]
    return Found(
        "\n".join([f"{trained.label}, {len(steps)} steps of prediction", *lines]), files, [trained.run]
    )


def order(config: PretrainConfig, runs: list[Storage]) -> Found:
    """order.png and order.gif of what a run of `config` draws at the first place of its sample sequence."""
    drawn = orders.draw_orders(config.model, config.decoder, config.run.seed)
    files = {
        "order.png": png(orders.strip(drawn)),
        "order.gif": gif(list(orders.pages(drawn)), _SECONDS_A_PAGE),
    }
    grid = " x ".join(str(size) for size in config.model.token_grid)
    lines = [f"{name}: {drawn_order.steps} steps over {grid} tokens" for name, drawn_order in drawn.items()]
    return Found("\n".join(lines), files, runs)


def _nothing(seed: int, place: int, row: SampleRow) -> dict[str, np.ndarray]:
    """All that an encoder is given are clips."""
    return {}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
