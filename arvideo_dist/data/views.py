"""Test views of a video: clips at several times and places, whose scores are averaged (VideoMAE's evaluation).

View v of a video is temporal view v // spatial at spatial view v % spatial. All spatial views of a clip come from
the same resized frames, and all views of a video from one decode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from arvideo_dist.data.transforms import Crop, sample_segments


@dataclass(frozen=True)
class Views:
    """How many views a video has: 5 x 3 on Kinetics-400, 2 x 3 on SSv2 (VideoMAE)."""

    temporal: int
    spatial: int

    def __post_init__(self) -> None:
        if self.temporal < 1 or self.spatial < 1:
            raise ValueError(f"views {self}: at least 1x1 is needed")

    def __str__(self) -> str:
        return f"{self.temporal}x{self.spatial}"

    def __len__(self) -> int:
        return self.temporal * self.spatial

    @classmethod
    def parse(cls, text: str) -> Views:
        """From `TEMPORALxSPATIAL`, as in 5x3. Raises ValueError for any other text."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"views {text!r}: give temporal and spatial views as in 5x3")
        return cls(int(match[1]), int(match[2]))

    def locate(self, view: int) -> tuple[int, int]:
        """Temporal and spatial number of a view."""
        return divmod(view, self.spatial)


def temporal_views(
    num_frames: int, clip_frames: int, stride: int, sampling: Literal["window", "segments"], count: int
) -> NDArray[np.int64]:
    """Frame indices [count, clip_frames] of a video's temporal views; one view is the middle of the video.

    Raises ValueError for more than 2 views of segments, which VideoMAE does not define.
    """
    if num_frames < 1:
        raise ValueError(f"a video without frames has no views (num_frames {num_frames})")
    if sampling == "window":
        return _dense_windows(num_frames, clip_frames, stride, count)
    return _segments(num_frames, clip_frames, count)


def _dense_windows(num_frames: int, clip_frames: int, stride: int, count: int) -> NDArray[np.int64]:
    """Windows at even distances over every `stride`-th frame, the first at the start, the last at the end.

    A video that is too short holds its last frame, so that all its views are the same.
    """
    strided = np.arange(0, num_frames, stride)
    strided = np.pad(strided, (0, max(0, clip_frames - len(strided))), mode="edge")
    room = len(strided) - clip_frames
    # VideoMAE's rounding: a float step, then the whole part of each start.
    starts = [int(view * (room / (count - 1))) for view in range(count)] if count > 1 else [room // 2]
    return np.stack([strided[start : start + clip_frames] for start in starts])


def _segments(num_frames: int, clip_frames: int, count: int) -> NDArray[np.int64]:
    """View 0: the first frame of each of `clip_frames` equal segments; view 1: the middle one.

    Both in one sorted list, of which a view takes every second frame: in a video of few frames, in which both are
    partly the same, this order decides.
    """
    middle = sample_segments(num_frames, clip_frames, None)
    if count == 1:
        return middle[None]
    if count > 2:
        raise ValueError(f"{count} temporal views: segments have 1 or 2 (sampling of SSv2)")
    length = num_frames / clip_frames
    first = (length * np.arange(clip_frames)).astype(np.int64)
    frames = np.sort(np.concatenate([middle, first]))
    return np.stack([frames[0::2], frames[1::2]])


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of a frame whose short side is brought to `size`; the long side is rounded down."""
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


def spatial_crops(height: int, width: int, count: int) -> list[Crop]:
    """Squares of the short side at even distances along the long one: left, centre, right or top, centre, bottom.

    One is the centre. `height`, `width`: of a resized frame.
    """
    side = min(height, width)
    room = max(height, width) - side
    starts = [int(view * (room / (count - 1))) for view in range(count)] if count > 1 else [room // 2]
    if height >= width:
        return [Crop(start, 0, side, side) for start in starts]
    return [Crop(0, start, side, side) for start in starts]


def spatial_views(frames: Sequence[NDArray[np.uint8]], size: int, count: int) -> torch.Tensor:
    """The spatial views of T frames uint8 [H, W, 3]: uint8 [count, 3, T, size, size].

    The short side becomes `size` by antialiased bilinear, as in training; VideoMAE's bilinear is without
    antialiasing. In memory the three colours of a pixel stay together.
    """
    pixels_tchw = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    height, width = resized(pixels_tchw.shape[2], pixels_tchw.shape[3], size)
    if tuple(pixels_tchw.shape[2:]) != (height, width):
        pixels_tchw = F.interpolate(
            pixels_tchw, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    views = [
        pixels_tchw[:, :, crop.top : crop.top + size, crop.left : crop.left + size]
        for crop in spatial_crops(height, width, count)
    ]
    return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 4, 1, 2, 3)
