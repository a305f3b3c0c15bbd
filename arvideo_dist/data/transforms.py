"""Temporal windows and spatial crops of a clip, by VideoMAE's rules. Draws come from the generator given in.

Legend: frames are uint8 [T, H, W, 3] as a decoder gives them, clips uint8 [3, T, S, S] as the model wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from arvideo_dist.data.decode import Planes


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


def sample_segments(num_frames: int, clip_frames: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    """Frame indices [clip_frames]: one frame from each of `clip_frames` equal segments of the whole video, drawn
    uniformly (`rng=None`: the middle one). The sampling of TSN and of VideoMAE's SSv2 fine-tuning.

    A video of fewer frames than segments gives a sorted draw of its frames with repetition, as in TSN; VideoMAE's
    loader shows its first frame for the whole clip.
    """
    if num_frames < 1:
        raise ValueError(f"a video without frames has no segments (num_frames {num_frames})")
    if rng is None:
        length = num_frames / clip_frames
        return (length / 2 + length * np.arange(clip_frames)).astype(np.int64)
    length = num_frames // clip_frames
    if length == 0:
        return np.sort(rng.integers(num_frames, size=clip_frames))
    return np.arange(clip_frames) * length + rng.integers(length, size=clip_frames)


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


class CropDraw(Protocol):
    """How the crop of a training clip is drawn."""

    def draw(self, height: int, width: int, size: int, rng: np.random.Generator) -> Crop:
        """Of a frame of `height` x `width` pixels; it will be resized to `size` x `size`."""


@dataclass(frozen=True)
class MultiScaleCrop:
    """`draw_multi_scale_crop` with these scales."""

    scales: tuple[float, ...]

    def draw(self, height: int, width: int, size: int, rng: np.random.Generator) -> Crop:
        return draw_multi_scale_crop(height, width, size, self.scales, rng)


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


def crop_and_resize(frames: Sequence[NDArray[np.uint8]], crop: Crop, size: int) -> torch.Tensor:
    """T frames uint8 [H, W, 3] -> uint8 [3, T, size, size]: the crop, antialiased bilinear.

    In memory the three colours of a pixel stay together: a view of [T, size, size, 3].
    """
    rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
    pixels_tchw = torch.from_numpy(np.stack([frame[rows, columns] for frame in frames])).permute(0, 3, 1, 2)
    if (crop.height, crop.width) != (size, size):
        pixels_tchw = F.interpolate(
            pixels_tchw, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return pixels_tchw.transpose(0, 1)


@dataclass
class PlanarClips:
    """Cropped clips as the decoder had them: YUV 4:2:0 on a canvas that holds the batch's largest crop.

    A sample's crop starts at row and column 0 or 1 of its canvas, since chroma wants even positions; what lies
    beyond the crop is undefined.
    """

    y: torch.Tensor  # uint8 [B, T, H, W], H and W even
    uv: torch.Tensor  # uint8 [B, T, 2, H/2, W/2]
    crops: torch.Tensor  # int64 [B, 4]: top, left, height, width on the canvas
    size: int  # pixels of a side of the clips to be made

    def to(self, device: torch.device) -> PlanarClips:
        y, uv, crops = (tensor.to(device, non_blocking=True) for tensor in (self.y, self.uv, self.crops))
        return PlanarClips(y, uv, crops, self.size)

    def pin_memory(self) -> PlanarClips:
        return PlanarClips(self.y.pin_memory(), self.uv.pin_memory(), self.crops.pin_memory(), self.size)

    def to_clips(self) -> torch.Tensor:
        """uint8 [B, 3, T, size, size] on the device of the planes: conversion (BT.601, limited range, as
        decoders assume and data_prep writes), crop and antialiased bilinear resize, batched."""
        clips = []
        # A few at a time: the float pictures of a clip take some 13 MB.
        for y, uv, crops in zip(self.y.split(8), self.uv.split(8), self.crops.split(8), strict=True):
            rows = _resize_weights(crops[:, 0], crops[:, 2], y.shape[2], self.size)
            columns = _resize_weights(crops[:, 1], crops[:, 3], y.shape[3], self.size)
            rgb = _rgb_from_planes(y, uv)
            resized = torch.einsum("bsh,bcthw,brw->bctsr", rows, rgb, columns)
            clips.append(resized.round_().clamp_(0, 255).to(torch.uint8))
        return torch.cat(clips)


def _rgb_from_planes(y: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, T, H, W], whole numbers in 0 to 255. The integer steps are those of swscale's x86 code,
    which the host path uses: 13-bit coefficients, each product rounded down, one chroma sample for 2 x 2 pixels.
    A rounded float conversion is brighter by a grey level on average and by up to three."""
    luma = (y.int() * 8 - 128) * 9539 >> 16
    u, v = ((uv.int() - 128) * 8).unbind(2)
    chroma = torch.stack([v * 13075 >> 16, (u * -3209 >> 16) + (v * -6660 >> 16), u * 16525 >> 16], dim=1)
    rgb = luma[:, None] + chroma.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    return rgb.clamp_(0, 255).float()


def _resize_weights(start: torch.Tensor, length: torch.Tensor, canvas: int, size: int) -> torch.Tensor:
    """[B, size, canvas]: how much of each canvas line goes into each output line. Triangle filter as wide as
    the reduction, normalised at the borders: what torch's and PIL's antialiased bilinear resize does."""
    scale = (length / size)[:, None, None]
    centre = scale * (torch.arange(size, device=start.device)[None, :, None] + 0.5)
    line = torch.arange(canvas, device=start.device)[None, None, :] - start[:, None, None]
    weights = (1 - (line + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((line >= 0) & (line < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def copy_crop(frames: Sequence[Planes], crop: Crop, y: NDArray[np.uint8], uv: NDArray[np.uint8]) -> Crop:
    """Copy the crop of T frames to one sample's canvas (y [T, H, W], uv [T, 2, H/2, W/2]); the crop there."""
    top, left = crop.top // 2, crop.left // 2  # in chroma samples
    bottom, right = -(-(crop.top + crop.height) // 2), -(-(crop.left + crop.width) // 2)
    for t, frame in enumerate(frames):
        part = frame.y[2 * top : 2 * bottom, 2 * left : 2 * right]
        y[t, : part.shape[0], : part.shape[1]] = part
        uv[t, 0, : bottom - top, : right - left] = frame.u[top:bottom, left:right]
        uv[t, 1, : bottom - top, : right - left] = frame.v[top:bottom, left:right]
    return Crop(crop.top - 2 * top, crop.left - 2 * left, crop.height, crop.width)
