"""What fine-tuning draws to change a clip: crop, RandAugment, flip and erased box; pixels.py applies it.

All numbers of a clip come from the generator given in, into arrays of fixed shapes that ride in the batch, so that
the step itself draws nothing. The rules are those of timm that VideoMAE took over: RandAugment
`rand-m7-n4-mstd0.5-inc1`, random erasing in mode `pixel` with one box for all frames, random resized crop.

VideoMAE applies RandAugment to whole frames and crops after it. Here the crop comes first, as in timm's recipe for
images, because whole frames have different sizes and some five times the pixels: translations are then shares of
the crop's side, and histograms those of the crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arvideo_dist.data.transforms import Crop

MAX_LEVEL = 10.0
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
NO_OPERATION = -1


class Operation(IntEnum):
    """timm's increasing set, in its order: all grow stronger with the level."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


@dataclass(frozen=True)
class Augmentation:
    """How strongly clips are changed; the defaults are the fine-tuning recipe's for Kinetics-400."""

    level: float = 7.0  # mean of the operations' levels, 0 to 10
    operations: int = 4  # drawn for a clip, with replacement
    level_std: float = 0.5
    operation_prob: float = 0.5  # of a drawn operation to be applied
    flip_prob: float = 0.5  # 0 on SSv2, whose labels tell left from right
    erase_prob: float = 0.25


class ClipDraw(NamedTuple):
    """What was drawn for one clip; the same for all its frames."""

    operations: NDArray[np.int64]  # [n] of `Operation`, or NO_OPERATION
    arguments: NDArray[np.float32]  # [n], see `argument`
    flip: NDArray[np.bool_]  # []
    erased: NDArray[np.int64]  # [4] top, bottom, left, right of the erased box; no area: none
    noise_key: NDArray[np.int64]  # [] what the erased box is filled with is drawn from this


class ClipDraws(NamedTuple):
    """The `ClipDraw`s of a micro batch. They stay on the host, where they decide what runs on the device."""

    operations: torch.Tensor  # int64 [B, n]
    arguments: torch.Tensor  # float32 [B, n]
    flip: torch.Tensor  # bool [B]
    erased: torch.Tensor  # int64 [B, 4]
    noise_key: torch.Tensor  # int64 [B]


def draw_clip(rng: np.random.Generator, augmentation: Augmentation, height: int, width: int) -> ClipDraw:
    """All draws of one clip of `height` x `width` pixels but its crop."""
    number = augmentation.operations
    operations = rng.integers(len(Operation), size=number)
    applied = rng.random(number) < augmentation.operation_prob
    levels = np.clip(rng.normal(augmentation.level, augmentation.level_std, number), 0, MAX_LEVEL)
    signs = np.where(rng.random(number) < 0.5, -1, 1)
    arguments = [
        argument(Operation(operation), float(level), int(sign))
        for operation, level, sign in zip(operations, levels, signs, strict=True)
    ]
    return ClipDraw(
        np.where(applied, operations, NO_OPERATION),
        np.array(arguments, dtype=np.float32),
        np.array(rng.random() < augmentation.flip_prob),
        _draw_erased(rng, augmentation.erase_prob, height, width),
        np.array(rng.integers(2**63 - 1)),
    )


def stack_draws(draws: list[ClipDraw]) -> ClipDraws:
    """One micro batch's."""
    return ClipDraws(*(torch.from_numpy(np.stack(field)) for field in zip(*draws, strict=True)))


def argument(operation: Operation, level: float, sign: int) -> float:
    """What a level in 0 to 10 means to an operation. `sign` -1 or 1 goes to those that have two directions.

    Rotation: degrees. Posterize: bits that stay. Solarize: the level from which colours are inverted. Solarize-add:
    what is added below 128. Colour, contrast, brightness, sharpness: 1 changes nothing. Shear: pixels a line.
    Translation: share of the side.
    """
    share = level / MAX_LEVEL
    match operation:
        case Operation.AUTO_CONTRAST | Operation.EQUALIZE | Operation.INVERT:
            return 0.0
        case Operation.ROTATE:
            return sign * share * 30
        case Operation.POSTERIZE:
            return 4 - int(share * 4)
        case Operation.SOLARIZE:
            return 256 - int(share * 256)
        case Operation.SOLARIZE_ADD:
            return int(share * 110)
        case Operation.SHEAR_X | Operation.SHEAR_Y:
            return sign * share * 0.3
        case Operation.TRANSLATE_X | Operation.TRANSLATE_Y:
            return sign * share * 0.45
        case _:
            return 1 + sign * share * 0.9


@dataclass(frozen=True)
class ResizedCrop:
    """Random resized crop (a `transforms.CropDraw`); the defaults are the recipe's.

    VideoMAE resizes it bilinearly without antialiasing; `transforms.crop_and_resize` antialiases.
    """

    scale: tuple[float, float] = (0.08, 1.0)  # share of the frame's area
    ratio: tuple[float, float] = (0.75, 1.3333)  # width to height

    def draw(self, height: int, width: int, size: int, rng: np.random.Generator) -> Crop:
        """Anywhere in the frame; after ten that do not fit, the largest one in its centre."""
        for _ in range(10):
            area = rng.uniform(*self.scale) * height * width
            ratio = math.exp(rng.uniform(*np.log(self.ratio)))
            crop_w, crop_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_w <= width and 0 < crop_h <= height:
                top, left = rng.integers([height - crop_h + 1, width - crop_w + 1]).tolist()
                return Crop(top, left, crop_h, crop_w)
        crop_h = min(height, round(width / self.ratio[0]))
        crop_w = min(width, round(height * self.ratio[1]))
        return Crop((height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)


def _draw_erased(rng: np.random.Generator, prob: float, height: int, width: int) -> NDArray[np.int64]:
    """A box of 2 to 33 % of the area, 3:10 to 10:3, that fits in; nothing after a hundred misses."""
    if rng.random() < prob:
        for _ in range(100):
            area = rng.uniform(*ERASED_AREA) * height * width
            ratio = math.exp(rng.uniform(*np.log(ERASED_RATIO)))
            box_h, box_w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if box_h < height and box_w < width:
                top, left = rng.integers([height - box_h + 1, width - box_w + 1]).tolist()
                return np.array([top, top + box_h, left, left + box_w], dtype=np.int64)
    return np.zeros(4, dtype=np.int64)
