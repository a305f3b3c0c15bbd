"""Windows and crops follow VideoMAE's rules; pixels are what the rules say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_dist.data.transforms import (
    CROP_POSITIONS,
    Crop,
    center_crop,
    crop_and_resize,
    draw_multi_scale_crop,
    sample_segments,
    sample_window,
)

SCALES = (1.0, 0.875, 0.75, 0.66)


def videomae_window(num_frames: int, clip_frames: int, stride: int, start: int) -> list[int]:
    """VideoMAE's frame list for a drawn start, step by step as its loader walks (1-based offsets inside)."""
    offset, frames = start + 1, []
    for _ in range(clip_frames):
        frames.append(min(offset, num_frames) - 1)
        if offset + stride < num_frames:
            offset += stride
    return frames


@given(st.integers(1, 400), st.integers(1, 32), st.integers(1, 8), st.integers(0, 2**32))
def test_window_is_videomaes_for_the_drawn_start(frames: int, clip: int, stride: int, seed: int) -> None:
    window = sample_window(frames, clip, stride, np.random.default_rng(seed))
    start = int(window[0])
    assert 0 <= start <= max(0, frames - clip * stride)
    assert window.tolist() == videomae_window(frames, clip, stride, start)


def test_every_start_that_fits_is_drawn_equally_often() -> None:
    rng = np.random.default_rng(0)
    starts = np.bincount([sample_window(70, 16, 4, rng)[0] for _ in range(7000)])
    assert len(starts) == 7  # 70 - 64 + 1
    assert starts.min() > 850
    assert starts.max() < 1150


def test_short_clip_holds_its_last_reachable_frame() -> None:
    assert sample_window(10, 6, 4, np.random.default_rng(0)).tolist() == [0, 4, 8, 8, 8, 8]
    assert sample_window(9, 6, 4, np.random.default_rng(0)).tolist() == [0, 4, 4, 4, 4, 4]
    assert sample_window(1, 4, 4, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


def test_without_a_generator_the_window_is_the_middle_one() -> None:
    assert sample_window(100, 16, 4, None).tolist() == list(range(18, 82, 4))


@given(st.integers(1, 400), st.integers(1, 32))
def test_middle_segments_are_videomaes_first_test_view(frames: int, clip: int) -> None:
    tick = frames / clip
    assert sample_segments(frames, clip, None).tolist() == [int(tick / 2 + tick * x) for x in range(clip)]


@given(st.integers(1, 400), st.integers(1, 32), st.integers(0, 2**32))
def test_segments_in_training_are_videomaes_for_the_drawn_offsets(frames: int, clip: int, seed: int) -> None:
    drawn = sample_segments(frames, clip, np.random.default_rng(seed))
    average = frames // clip
    if average:
        offsets = drawn - np.multiply(range(clip), average)
        assert offsets.min() >= 0
        assert offsets.max() < average
    else:  # TSN's rule
        assert drawn.tolist() == sorted(drawn.tolist())
        assert drawn.min() >= 0
        assert drawn.max() < frames


def test_every_offset_in_a_segment_is_drawn_equally_often() -> None:
    rng = np.random.default_rng(0)
    # Segments of 8; frames 32 to 34 unused.
    drawn = np.array([sample_segments(35, 4, rng) for _ in range(4000)])
    for segment in range(4):
        counts = np.bincount(drawn[:, segment] - 8 * segment, minlength=8)
        assert len(counts) == 8
        assert counts.min() > 420
        assert counts.max() < 580


def videomae_crops(height: int, width: int, size: int) -> set[tuple[int, int, int, int]]:
    """All crops that VideoMAE's multi-scale crop can draw, as (top, left, height, width)."""
    sides = [int(min(height, width) * scale) for scale in SCALES]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    crops = set()
    for i, crop_h in enumerate(sides):
        for j, crop_w in enumerate(sides):
            if abs(i - j) > 1:
                continue
            h, w = (height - crop_h) // 4, (width - crop_w) // 4
            offsets = [
                (0, 0),
                (4 * w, 0),
                (0, 4 * h),
                (4 * w, 4 * h),
                (2 * w, 2 * h),
                (0, 2 * h),
                (4 * w, 2 * h),
            ]
            offsets += [(2 * w, 4 * h), (2 * w, 0), (w, h), (3 * w, h), (w, 3 * h), (3 * w, 3 * h)]
            crops |= {(top, left, crop_h, crop_w) for left, top in offsets}
    return crops


@pytest.mark.parametrize(("height", "width"), [(256, 340), (340, 256), (226, 300), (64, 80)])
def test_multi_scale_crop_draws_exactly_videomaes_crops(height: int, width: int) -> None:
    rng = np.random.default_rng(1)
    drawn = {tuple(draw_multi_scale_crop(height, width, 224, SCALES, rng)) for _ in range(4000)}
    assert drawn == videomae_crops(height, width, 224)
    for top, left, crop_h, crop_w in drawn:
        assert 0 <= top <= height - crop_h
        assert 0 <= left <= width - crop_w


def test_there_are_13_crop_positions() -> None:
    assert len(set(CROP_POSITIONS)) == 13


def test_center_crop_is_the_middle_square() -> None:
    assert center_crop(64, 80) == Crop(0, 8, 64, 64)


def test_crop_without_resize_keeps_the_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    clip = crop_and_resize(list(frames), Crop(2, 5, 16, 16), 16)
    assert np.array_equal(clip.numpy(), frames[:, 2:18, 5:21].transpose(3, 0, 1, 2))


def test_resize_stays_within_a_grey_level_of_the_float_filter() -> None:
    import torch

    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    crop = Crop(3, 7, 80, 64)
    clip = crop_and_resize(frames, crop, 32)
    view = torch.from_numpy(frames[:, 3:83, 7:71]).permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(view, size=(32, 32), mode="bilinear", antialias=True)
    assert clip.shape == (3, 2, 32, 32)
    assert clip.dtype == torch.uint8
    assert (clip.transpose(0, 1).float() - exact).abs().max() <= 1.01
