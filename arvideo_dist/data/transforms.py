"""Temporal windows and spatial crops of a clip, by VideoMAE's rules. Draws come from the generator given in.

Legend: frames are uint8 [T, H, W, 3] as a decoder gives them, clips uint8 [3, T, S, S] as the model wants.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


class Crop(NamedTuple):
    """A rectangle of the frame in pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_window(
    num_frames: int, clip_frames: int, stride: int, rng: np.random.Generator | None
) -> NDArray[np.int64]:
    """Frame indices [clip_frames] of one window of `clip_frames * stride` frames.

    The start is uniform over all starts whose window fits (`rng=None`: the middle one). A shorter video
    starts at 0 and holds the last frame that the stride reaches before the video's final one, as VideoMAE's
    loader does.
    """
    if num_frames < 1:
        raise ValueError(f"a video without frames has no window (num_frames {num_frames})")
    starts = max(1, num_frames - clip_frames * stride + 1)
    start = int(rng.integers(starts)) if rng is not None else (starts - 1) // 2
    reach = max(0, (num_frames - 2 - start) // stride)
    return start + stride * np.minimum(np.arange(clip_frames), reach)


def draw_multi_scale_crop(
    height: int, width: int, size: int, scales: tuple[float, ...], rng: np.random.Generator
) -> Crop:
    """VideoMAE's (and TSN's) multi-scale crop: sides from `scales` times the short side, at most one scale
    apart, at one of 13 fixed positions (corners, edges' middles, centre, the quarters between)."""
    short = min(height, width)
    sides = [size if abs(int(short * scale) - size) < 3 else int(short * scale) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_h, crop_w = pairs[rng.integers(len(pairs))]
    step_h, step_w = (height - crop_h) // 4, (width - crop_w) // 4
    along_h, along_w = CROP_POSITIONS[rng.integers(len(CROP_POSITIONS))]
    return Crop(along_h * step_h, along_w * step_w, crop_h, crop_w)


# (vertical, horizontal) in quarters of the free room
CROP_POSITIONS = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


def center_crop(height: int, width: int) -> Crop:
    """The largest centred square."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def crop_and_resize(frames: NDArray[np.uint8], crop: Crop, size: int) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> uint8 [3, T, size, size]: the crop, antialiased bilinear."""
    view = frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    pixels_tchw = torch.from_numpy(np.ascontiguousarray(view)).permute(0, 3, 1, 2)
    if (crop.height, crop.width) != (size, size):
        pixels_tchw = F.interpolate(
            pixels_tchw, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return pixels_tchw.transpose(0, 1)
