"""Test views are VideoMAE's: its test-mode rules, written out as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arvideo_dist.data.transforms import Crop, sample_segments, sample_window
from arvideo_dist.data.views import Views, resized, spatial_crops, spatial_views, temporal_views


def kinetics_clip(num_frames: int, clip_frames: int, stride: int, views: int, view: int) -> list[int]:
    """Kinetics-400 in test mode: all strided frames are decoded, then one stretch of them is taken."""
    decoded = []
    frame = 0
    while frame < num_frames:
        decoded.append(frame)
        frame += stride
    while len(decoded) < clip_frames:
        decoded.append(decoded[-1])
    step = 1.0 * (len(decoded) - clip_frames) / (views - 1)
    start = int(view * step)
    return decoded[start : start + clip_frames]


def ssv2_clip(num_frames: int, clip_frames: int, view: int) -> list[int]:
    """SSv2 in test mode: two frames a segment are decoded in order, a view takes every second one."""
    tick = num_frames / float(clip_frames)
    decoded = []
    for segment in range(clip_frames):
        decoded.append(int(tick / 2.0 + tick * segment))
        decoded.append(int(tick * segment))
    decoded.sort()
    return decoded[view::2]


@given(st.integers(1, 600), st.integers(1, 32), st.integers(1, 8), st.integers(2, 10))
def test_dense_views_are_those_of_kinetics(frames: int, clip: int, stride: int, views: int) -> None:
    found = temporal_views(frames, clip, stride, "window", views)
    assert found.shape == (views, clip)
    assert found.dtype == np.int64
    for view in range(views):
        assert found[view].tolist() == kinetics_clip(frames, clip, stride, views, view)


@given(st.integers(1, 600), st.integers(1, 32))
def test_segment_views_are_those_of_ssv2(frames: int, clip: int) -> None:
    found = temporal_views(frames, clip, 2, "segments", 2)
    for view in range(2):
        assert found[view].tolist() == ssv2_clip(frames, clip, view)


def test_views_of_a_ten_second_clip_as_numbers() -> None:
    """Kinetics-400: 300 frames, 16 x 4, 5 views: 75 strided frames, starts 0, 14, 29, 44, 59."""
    starts = temporal_views(300, 16, 4, "window", 5)[:, 0]
    assert starts.tolist() == [0, 56, 116, 176, 236]
    assert temporal_views(300, 16, 4, "window", 5)[4, -1] == 296
    assert temporal_views(32, 16, 4, "segments", 2)[:, :3].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_short_video_holds_its_last_strided_frame_in_all_views() -> None:
    found = temporal_views(10, 6, 4, "window", 3)
    assert found.tolist() == [[0, 4, 8, 8, 8, 8]] * 3


def test_one_temporal_view_is_the_middle() -> None:
    assert temporal_views(101, 16, 4, "window", 1).tolist() == [list(range(20, 84, 4))]
    middle = sample_window(101, 16, 4, None)
    assert abs(temporal_views(101, 16, 4, "window", 1)[0] - middle).max() < 4
    assert temporal_views(50, 16, 4, "segments", 1)[0].tolist() == sample_segments(50, 16, None).tolist()


def videomae_view(
    frames_thwc: np.ndarray, size: int, views: int, view: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Which part of resized frames is taken: starts along the longer side, in whole pixels."""
    step = 1.0 * (max(frames_thwc.shape[1], frames_thwc.shape[2]) - size) / (views - 1)
    start = int(view * step)
    if frames_thwc.shape[1] >= frames_thwc.shape[2]:
        taken = frames_thwc[:, start : start + size, :, :]
    else:
        taken = frames_thwc[:, :, start : start + size, :]
    return taken.shape, taken


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 113), (97, 64), (64, 66)])
@pytest.mark.parametrize("views", [2, 3, 5])
def test_spatial_views_of_frames_that_need_no_resize_are_their_pixels(
    height: int, width: int, views: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = spatial_views(list(frames), 64, views)
    assert found.shape == (views, 3, 2, 64, 64)
    for view in range(views):
        shape, expected = videomae_view(frames, 64, views, view)
        assert shape == (2, 64, 64, 3)
        assert np.array_equal(found[view].numpy(), expected.transpose(3, 0, 1, 2))


@pytest.mark.parametrize(("height", "width"), [(256, 340), (340, 256), (240, 321), (200, 200)])
def test_spatial_views_are_cut_from_resized_frames(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    shape = (int(112 * height / width), 112) if width < height else (112, int(112 * width / height))
    assert resized(height, width, 112) == shape
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(pixels, size=shape, mode="bilinear", antialias=True)
    found = spatial_views(list(frames), 112, 3)
    assert found.dtype == torch.uint8
    for view in range(3):
        _, expected = videomae_view(exact.permute(0, 2, 3, 1).numpy(), 112, 3, view)
        difference = np.abs(found[view].numpy().astype(float) - expected.transpose(3, 0, 1, 2))
        assert difference.max() <= 1.01, "rounding to whole grey levels"


def test_three_crops_are_the_ends_and_the_middle_of_the_longer_side() -> None:
    assert spatial_crops(224, 298, 3) == [Crop(0, 0, 224, 224), Crop(0, 37, 224, 224), Crop(0, 74, 224, 224)]
    assert [crop.top for crop in spatial_crops(299, 224, 3)] == [0, 37, 75]
    assert spatial_crops(224, 298, 1) == [Crop(0, 37, 224, 224)]
    assert spatial_crops(224, 224, 3) == [Crop(0, 0, 224, 224)] * 3


def test_colours_of_a_pixel_stay_together_in_memory() -> None:
    assert spatial_views([np.zeros((64, 80, 3), np.uint8)] * 2, 32, 3).stride(1) == 1


def test_views_are_named_and_counted() -> None:
    views = Views.parse("5x3")
    assert (views, len(views), str(views)) == (Views(5, 3), 15, "5x3")
    assert [views.locate(view) for view in (0, 1, 3, 14)] == [(0, 0), (0, 1), (1, 0), (4, 2)]
    for text in ("5", "5x", "0x3", "axb", "5x3x1"):
        with pytest.raises(ValueError, match="views"):
            Views.parse(text)


def test_what_has_no_views_is_refused() -> None:
    with pytest.raises(ValueError, match="without frames"):
        temporal_views(0, 16, 4, "window", 5)
    with pytest.raises(ValueError, match="segments have 1 or 2"):
        temporal_views(50, 16, 4, "segments", 3)
