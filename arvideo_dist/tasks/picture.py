"""Pictures of what the model saw and predicted: pages of named rows, a column for each frame shown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from arvideo_dist.config.model import ModelConfig
from arvideo_dist.model.pretraining import restore_pixels
from arvideo_dist.model.vit import from_cubes, to_cubes

_UNSEEN = 0.5  # grey level of tokens that the encoder did not see
# Of tokens that were not asked for: of the first clusters in the order, or left out by sub-sampling.
_UNPREDICTED = 0.15
MAX_COLUMNS = 8
_MIN_CELL = 96  # pixels; small pictures are enlarged to it
_MARGIN = 78  # pixels for the rows' names
_CAPTION = 18  # pixels
_GAP, _GROUP_GAP = 2, 8  # pixels between cells, and more between groups of rows


class Page:
    """A picture of `rows` x `columns` cells, each an enlarged frame of `size` (height, width) pixels."""

    def __init__(
        self,
        rows: Sequence[str],
        columns: int,
        size: tuple[int, int],
        *,
        group: int | None = None,
        caption: str | None = None,
        margin: int = _MARGIN,
    ) -> None:
        """`rows`: their names, of one or more lines; after every `group` of them stands a gap. `caption`: a line
        above the cells. `margin`: pixels for the names."""
        self.size, self.scale = size, max(1, math.ceil(_MIN_CELL / size[0]))
        self._top = 0 if caption is None else _CAPTION
        self._group, self._margin = group or len(rows), margin
        self._cell = size[0] * self.scale + _GAP, size[1] * self.scale + _GAP
        width, height = self.corner(len(rows), columns)
        width = max(width, 8 + math.ceil(ImageFont.load_default().getlength(caption or "")))
        self._image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self._image)
        if caption is not None:
            self._draw.text((4, 3), caption, fill="black")
        for row, name in enumerate(rows):
            middle = self.corner(row, 0)[1] + self._cell[0] // 2
            self._draw.text((4, middle), name, fill="black", anchor="lm")

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Where a cell's first pixel stands on the page: x, y."""
        gaps = row // self._group * _GROUP_GAP
        return self._margin + column * self._cell[1], self._top + row * self._cell[0] + gaps

    def frame(self, row: int, column: int, pixels_hwc: NDArray[np.uint8]) -> None:
        """Fill a cell."""
        height, width = self.size
        enlarged = Image.fromarray(pixels_hwc).resize(
            (width * self.scale, height * self.scale), Image.Resampling.NEAREST
        )
        self._image.paste(enlarged, self.corner(row, column))

    def outline(self, row: int, column: int, tokens_hw: NDArray[np.bool_]) -> None:
        """Draw the edge of a set of tokens, given on the frame's grid of tokens."""
        x, y = self.corner(row, column)
        unit_h, unit_w = (
            self.scale * size // count for size, count in zip(self.size, tokens_hw.shape, strict=True)
        )
        padded = np.pad(tokens_hw, 1)
        for h, w in np.argwhere(tokens_hw).tolist():
            left, top = x + w * unit_w, y + h * unit_h
            right, bottom = left + unit_w - 1, top + unit_h - 1
            for beside, line in (
                (padded[h, w + 1], (left, top, right, top)),
                (padded[h + 2, w + 1], (left, bottom, right, bottom)),
                (padded[h + 1, w], (left, top, left, bottom)),
                (padded[h + 1, w + 2], (right, top, right, bottom)),
            ):
                if not beside:
                    self._draw.line(line, fill="red", width=1)

    def text(self, row: int, column: int, place: tuple[float, float], text: str) -> None:
        """Write `text` around `place` (down, right), in pixels of the frame; legible on any colour."""
        x, y = self.corner(row, column)
        at = x + place[1] * self.scale, y + place[0] * self.scale
        self._draw.text(at, text, fill="white", anchor="mm", stroke_width=1, stroke_fill="black")

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]."""
        return np.asarray(self._image)


def reconstruction(
    clips_bcthw: torch.Tensor,
    context_ids_bn: torch.Tensor,
    target_ids_bm: torch.Tensor,
    predictions_bmp: torch.Tensor,
    model: ModelConfig,
) -> NDArray[np.uint8]:
    """Input, seen context and predicted clusters, three rows a clip, as one uint8 picture [H, W, 3].

    Each predicted cluster was predicted from the clusters before it in the order; normalised predictions are
    shown with the true cube's mean and deviation, as MAE does.
    """
    rows = reconstruction_rows(clips_bcthw, context_ids_bn, target_ids_bm, predictions_bmp, model)
    names = [name for _ in range(len(clips_bcthw)) for name in rows]
    columns = min(model.frames, MAX_COLUMNS)
    page = Page(names, columns, (model.image_size, model.image_size), group=len(rows))
    for number, frames_bthwc in enumerate(rows.values()):
        for clip, frames_thwc in enumerate(frames_bthwc):
            for column, frame in enumerate(shown_frames(model.frames)):
                page.frame(clip * len(rows) + number, column, frames_thwc[frame])
    return page.pixels()


def reconstruction_rows(
    clips_bcthw: torch.Tensor,
    context_ids_bn: torch.Tensor,
    target_ids_bm: torch.Tensor,
    predictions_bmp: torch.Tensor,
    model: ModelConfig,
) -> dict[str, NDArray[np.uint8]]:
    """The rows `input`, `context` and `predicted` of uint8 clips as whole clips [B, T, H, W, 3]."""
    cubes_blp = to_cubes(clips_bcthw.cpu(), model.tubelet)
    pixels_blp = cubes_blp.float() / 255
    seen_blp, predicted_blp = torch.full(cubes_blp.shape, _UNSEEN), torch.full(cubes_blp.shape, _UNPREDICTED)
    for index in range(len(cubes_blp)):
        context, target = context_ids_bn[index].cpu(), target_ids_bm[index].cpu()
        seen_blp[index, context] = pixels_blp[index, context]
        if len(target):
            predicted_blp[index, target] = restore_pixels(
                predictions_bmp[index].cpu(), cubes_blp[index, target], model.target_norm
            )
    size = (model.frames, model.image_size, model.image_size)
    return {
        name: (from_cubes(cubes, model.tubelet, size).permute(0, 2, 3, 4, 1) * 255)
        .round()
        .to(torch.uint8)
        .numpy()
        for name, cubes in (("input", pixels_blp), ("context", seen_blp), ("predicted", predicted_blp))
    }


def shown_frames(frames: int) -> list[int]:
    """The frames of a clip that a page has room for, evenly from the first to the last."""
    return np.linspace(0, frames - 1, min(frames, MAX_COLUMNS)).round().astype(int).tolist()


def png(picture_hwc: NDArray[np.uint8]) -> bytes:
    """A uint8 picture [H, W, 3] as a file."""
    buffer = io.BytesIO()
    Image.fromarray(picture_hwc).save(buffer, format="PNG")
    return buffer.getvalue()


def gif(pages_hwc: Sequence[NDArray[np.uint8]], seconds: float) -> bytes:
    """Pages of one size as an animated file, each shown for `seconds`, the last one four times as long."""
    buffer = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages_hwc]
    durations = [int(1000 * seconds)] * len(others) + [int(4000 * seconds)]
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()
