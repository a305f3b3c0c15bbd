"""Pictures of what the model saw and predicted."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from arvideo_dist.config import ModelConfig
from arvideo_dist.model.pretraining import restore_pixels
from arvideo_dist.model.vit import from_cubes, to_cubes

_UNSEEN = 0.5  # grey level of tokens that the encoder did not see
_UNPREDICTED = (
    0.15  # of tokens that were not asked for: of the first clusters in the order, or left out by sub-sampling
)
_MAX_COLUMNS = 8
_MIN_CELL = 96  # pixels; small clips are enlarged to it
_MARGIN = 78  # pixels for the rows' names


def reconstruction(
    clips_bcthw: torch.Tensor,
    context_ids_bn: torch.Tensor,
    target_ids_bm: torch.Tensor,
    predictions_bmp: torch.Tensor,
    model: ModelConfig,
) -> np.ndarray:
    """Input, seen context and predicted clusters, three rows a clip, as one uint8 picture [H, W, 3].

    Each predicted cluster was predicted from the clusters before it in the order; normalised predictions are
    shown with the true cube's mean and deviation, as MAE does.
    """
    cubes_blp = to_cubes(clips_bcthw.cpu(), model.tubelet)
    seen_blp, predicted_blp = torch.full(cubes_blp.shape, _UNSEEN), torch.full(cubes_blp.shape, _UNPREDICTED)
    for index in range(len(cubes_blp)):
        context, target = context_ids_bn[index].cpu(), target_ids_bm[index].cpu()
        seen_blp[index, context] = cubes_blp[index, context].float() / 255
        predicted_blp[index, target] = restore_pixels(
            predictions_bmp[index].cpu(), cubes_blp[index, target], model.target_norm
        )
    size = (model.frames, model.image_size, model.image_size)
    columns = np.linspace(0, model.frames - 1, min(model.frames, _MAX_COLUMNS)).round().astype(int)
    rows = [
        (name, from_cubes(cubes, model.tubelet, size)[:, :, columns])
        for name, cubes in (
            ("input", cubes_blp.float() / 255),
            ("context", seen_blp),
            ("predicted", predicted_blp),
        )
    ]
    return _grid(rows)


def _grid(rows: list[tuple[str, torch.Tensor]]) -> np.ndarray:
    clips, _, columns, height, width = rows[0][1].shape
    scale = max(1, math.ceil(_MIN_CELL / height))
    cell_h, cell_w = height * scale + 2, width * scale + 2
    page = Image.new("RGB", (_MARGIN + columns * cell_w, clips * (len(rows) * cell_h + 8)), "white")
    draw = ImageDraw.Draw(page)
    for clip in range(clips):
        for number, (name, values_bcthw) in enumerate(rows):
            top = clip * (len(rows) * cell_h + 8) + number * cell_h
            draw.text((4, top + cell_h // 2 - 6), name, fill="black")
            frames_thwc = (values_bcthw[clip].permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()
            for column, frame in enumerate(frames_thwc):
                image = Image.fromarray(frame).resize(
                    (width * scale, height * scale), Image.Resampling.NEAREST
                )
                page.paste(image, (_MARGIN + column * cell_w, top))
    return np.asarray(page)
