"""What a pretraining model predicts, step by step, as pictures; for every method alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from arvideo_dist.config.model import ModelConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.model.clusters import PredictionStep
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.tasks.picture import Page, reconstruction, reconstruction_rows, shown_frames

MAX_PAGES = 40  # of an animation: longer sequences (TokenGPT's 1567 steps) advance by several steps a page


@dataclass(frozen=True)
class Predicted:
    """One clip and what the model made of it; fields as in `PretrainingModel.forward`."""

    clip_bcthw: torch.Tensor
    context_ids_bn: torch.Tensor
    target_ids_bm: torch.Tensor
    predictions_bmp: torch.Tensor
    error_m: torch.Tensor  # mean squared error of each target


def predict(model: PretrainingModel, batch: Batch) -> Predicted:
    """The model on a batch of one clip, in fp32 on its device; the result is on the host."""
    batch = batch.to(model.pixel_mean.device)
    with torch.no_grad():
        output = model(batch.clips, batch.inputs["context_ids"], batch.inputs["target_ids"])
    error_m = (output.predictions_bmp - output.targets_bmp).square().mean(dim=(0, 2))
    fields = (
        batch.clips,
        batch.inputs["context_ids"],
        batch.inputs["target_ids"],
        output.predictions_bmp,
        error_m,
    )
    return Predicted(*(field.cpu() for field in fields))


def overview(clips: list[Predicted], model: ModelConfig) -> NDArray[np.uint8]:
    """Input, the whole context and all predictions of every clip on one page."""
    return reconstruction(
        torch.cat([clip.clip_bcthw for clip in clips]),
        torch.cat([clip.context_ids_bn for clip in clips]),
        torch.cat([clip.target_ids_bm for clip in clips]),
        torch.cat([clip.predictions_bmp for clip in clips]),
        model,
    )


def pages(clip: Predicted, steps: list[PredictionStep], model: ModelConfig) -> Iterator[NDArray[np.uint8]]:
    """The prediction of one clip as it proceeds: before the first step, then after each (at most `MAX_PAGES`).

    Rows: the input; the tokens that the step sees; all that is predicted so far. What the page's step predicts
    is outlined in red; if several steps share a page, the last one's context is shown.
    """
    shown = sorted(
        set(np.linspace(0, len(steps), min(len(steps) + 1, MAX_PAGES)).round().astype(int).tolist())
    )
    for page, (before, number) in enumerate(zip([0, *shown], shown, strict=False)):
        seen = steps[max(number - 1, 0)].context
        first, last = (steps[n - 1].targets if n else 0 for n in (before, number))
        new = slice(first, last)
        caption = f"before the first of {len(steps)} steps: {seen} tokens are seen"
        if page:
            which = f"step {number}" if number == before + 1 else f"steps {before + 1} to {number}"
            caption = (
                f"{which} of {len(steps)}: {last - first} tokens from {seen} seen, mean squared error "
                f"{clip.error_m[new].mean():.4f}"
            )
        yield _page(clip, seen, last, clip.target_ids_bm[0, new], caption, model)


def _page(
    clip: Predicted, seen: int, predicted: int, new_ids: torch.Tensor, caption: str, model: ModelConfig
) -> NDArray[np.uint8]:
    rows = reconstruction_rows(
        clip.clip_bcthw,
        clip.context_ids_bn[:, :seen],
        clip.target_ids_bm[:, :predicted],
        clip.predictions_bmp[:, :predicted],
        model,
    )
    new_thw = np.zeros(model.token_grid, dtype=bool)
    new_thw.reshape(-1)[new_ids.numpy()] = True
    frames = shown_frames(model.frames)
    page = Page(list(rows), len(frames), (model.image_size, model.image_size), caption=caption)
    for row, frames_bthwc in enumerate(rows.values()):
        for column, frame in enumerate(frames):
            page.frame(row, column, frames_bthwc[0, frame])
            page.outline(row, column, new_thw[frame // model.tubelet[0]])
    return page.pixels()
