"""RoIAlign against the plain loops of its definition; a detector's boxes, padding and drop path."""

from __future__ import annotations

import math

import pytest
import torch

from arvideo_dist.model.detector import CELLS, Detector, roi_align
from arvideo_dist.model.vit import EncoderSize

SIZE = EncoderSize(width=24, depth=2, heads=2)
GRID = (2, 4, 4)


def bilinear(rows: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """A sample of a map [H, W, D] by the rule of Mask R-CNN's code."""
    height, width, depth = rows.shape
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(depth)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return (
        rows[top, left] * (1 - dy) * (1 - dx)
        + rows[top, right] * (1 - dy) * dx
        + rows[bottom, left] * dy * (1 - dx)
        + rows[bottom, right] * dy * dx
    )


def slow_roi_align(rows: torch.Tensor, box: list[float], cells: int) -> torch.Tensor:
    left, top, right, bottom = box
    width, height = max(right - left, 1.0), max(bottom - top, 1.0)
    across, down = math.ceil(width / cells), math.ceil(height / cells)
    out = torch.zeros(cells, cells, rows.shape[-1])
    for s in range(cells):
        for t in range(cells):
            samples = [
                bilinear(
                    rows,
                    top + (s + (i + 0.5) / down) * height / cells,
                    left + (t + (j + 0.5) / across) * width / cells,
                )
                for i in range(down)
                for j in range(across)
            ]
            out[s, t] = torch.stack(samples).mean(0)
    return out


BOXES = [
    [0.0, 0.0, 14.0, 14.0],  # the whole map
    [3.2, 1.7, 5.1, 9.9],
    [6.0, 6.0, 6.0, 6.0],  # a point: one cell of the map
    [12.5, 0.3, 14.0, 0.9],
    [-3.0, 2.0, 4.0, 15.5],  # beyond the map
    [13.9, 13.9, 14.0, 14.0],
    [20.0, 20.0, 25.0, 25.0],  # outside
]


@pytest.mark.parametrize("cells", [1, 2, 7])
def test_roi_align_is_the_mean_of_bilinear_samples_by_its_definition(cells: int) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 14, 14, 3)
    boxes = torch.tensor([BOXES, BOXES[::-1]])
    found = roi_align(maps, boxes, cells)
    for clip in range(2):
        for number, box in enumerate(boxes[clip].tolist()):
            expected = slow_roi_align(maps[clip], box, cells)
            torch.testing.assert_close(found[clip, number], expected, rtol=1e-5, atol=1e-5)


def test_roi_align_passes_gradients_to_the_map() -> None:
    torch.manual_seed(1)
    maps = torch.randn(1, 4, 5, 2, dtype=torch.double, requires_grad=True)
    boxes = torch.tensor([[[0.4, 0.2, 3.1, 3.9], [1.0, 1.0, 1.2, 1.1]]], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda given: roi_align(given, boxes, 3), maps)


def new_detector(**options: float) -> Detector:
    torch.manual_seed(2)
    return Detector(SIZE, (2, 8, 8), GRID, 5, head_init_scale=1.0, **options)


def test_a_box_is_judged_by_its_own_place_and_by_no_other_box() -> None:
    detector = new_detector().eval()
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]] * 2)
    logits = detector(clips, boxes)
    assert logits.shape == (2, 2, 5)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    other = boxes.clone()
    other[:, 1] = torch.tensor([0.2, 0.1, 0.9, 0.3])
    torch.testing.assert_close(detector(clips, other)[:, 0], logits[:, 0])
    torch.testing.assert_close(detector(clips, boxes.flip(1)), logits.flip(1))


def test_a_flipped_map_with_flipped_boxes_gives_the_same_features() -> None:
    """Left and right, top and bottom are where the boxes say. (Non-square, to tell the sides apart.)"""
    torch.manual_seed(3)
    maps = torch.randn(1, 6, 9, 2)
    box = torch.tensor([[[1.3, 0.4, 7.2, 4.9]]])
    flipped = torch.tensor([[[8 - 7.2, 0.4, 8 - 1.3, 4.9]]])  # cell centres stand at 0 to 8
    torch.testing.assert_close(
        roi_align(maps.flip(2), flipped, CELLS).flip(3), roi_align(maps, box, CELLS), rtol=1e-4, atol=1e-5
    )


def test_dropped_branches_are_left_out_and_the_others_scaled_in_training_only() -> None:
    detector = new_detector(drop_path=0.5)
    clips = torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8)
    boxes, none = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), torch.zeros(1, SIZE.depth, 2, dtype=torch.bool)
    detector.eval()
    plain = detector(clips, boxes)
    assert torch.equal(detector(clips, boxes, none), plain)
    detector.train()
    assert not torch.allclose(detector(clips, boxes, none), plain)
    kept = ~none
    with torch.no_grad():
        for block in detector.encoder.blocks[1:]:
            for layer in (block.attn.proj, block.mlp.fc2):  # half of the branch, twice its weight
                layer.weight.mul_(0.5)
                layer.bias.mul_(0.5)
    torch.testing.assert_close(detector(clips, boxes, kept), plain, rtol=1e-4, atol=1e-5)
