"""Augmentation against Pillow, frame by frame, and its draws against timm's rules and distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import kornia.enhance
import kornia.geometry
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from arvideo_dist.data.augment import (
    NO_OPERATION,
    Augmentation,
    ClipDraw,
    ClipDraws,
    Operation,
    ResizedCrop,
    argument,
    draw_clip,
    stack_draws,
)
from arvideo_dist.data.pixels import augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 40
RECIPE = Augmentation()
GEOMETRY = (Operation.ROTATE, *list(Operation)[Operation.SHEAR_X :])


def frames(number: int = 2, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and some noise, uint8 [T, H, W, 3]; no channel of a frame fills 0 to 255."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(30, 220, (5, 7, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        picture[size // 3 : size // 2, size // 4 : size // 2] //= 3
        pictures.append((picture + rng.integers(-6, 7, picture.shape)).clip(3, 247).astype(np.uint8))
    return np.stack(pictures)


def as_clip(frames_thwc: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames_thwc).permute(3, 0, 1, 2)


def draws_of(operations: list[tuple[Operation, float]], clips: int = 1) -> ClipDraws:
    """The same operations for every clip, nothing else."""
    names, arguments = zip(*operations, strict=True)
    draw = ClipDraw(
        np.array(names), np.array(arguments, np.float32), np.array(False), np.zeros(4, np.int64), np.int64(0)
    )
    return stack_draws([draw] * clips)


def warped(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    bicubic = Image.Resampling.BICUBIC
    grey = (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bicubic, fillcolor=grey)


def solarized_and_added(image: Image.Image, addend: float) -> Image.Image:
    return image.point([min(255, v + int(addend)) if v < 128 else v for v in range(256)] * 3)


PILLOW: dict[Operation, Callable[[Image.Image, float], Image.Image]] = {
    Operation.AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Operation.INVERT: lambda image, _: ImageOps.invert(image),
    Operation.ROTATE: lambda image, degrees: image.rotate(
        degrees, resample=Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)
    ),
    Operation.POSTERIZE: lambda image, bits: ImageOps.posterize(image, int(bits)),
    Operation.SOLARIZE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    Operation.SOLARIZE_ADD: solarized_and_added,
    Operation.COLOR: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Operation.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Operation.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    Operation.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    Operation.SHEAR_X: lambda image, shear: warped(image, (1, shear, 0, 0, 1, 0)),
    Operation.SHEAR_Y: lambda image, shear: warped(image, (1, 0, 0, shear, 1, 0)),
    Operation.TRANSLATE_X: lambda image, share: warped(image, (1, 0, share * image.width, 0, 1, 0)),
    Operation.TRANSLATE_Y: lambda image, share: warped(image, (1, 0, 0, 0, 1, share * image.height)),
}


def in_pillow(frames_thwc: np.ndarray, operations: list[tuple[Operation, float]]) -> np.ndarray:
    """[3, T, H, W]: each frame through Pillow's operations, one after the other."""
    pictures = []
    for frame in frames_thwc:
        image = Image.fromarray(frame)
        for operation, value in operations:
            image = PILLOW[operation](image, float(np.float32(value)))
        pictures.append(np.asarray(image))
    return np.stack(pictures).transpose(3, 0, 1, 2)


def changed(frames_thwc: np.ndarray, operations: list[tuple[Operation, float]]) -> np.ndarray:
    return augment(as_clip(frames_thwc)[None], draws_of(operations), MEAN, STD)[0].numpy()


@pytest.mark.parametrize("operation", [o for o in Operation if o not in GEOMETRY], ids=lambda o: o.name)
def test_colour_operations_equal_pillow(operation: Operation) -> None:
    """At all levels and both signs, on pictures, noise, one flat colour, and two colours."""
    noise = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    flat = np.full((1, SIZE, SIZE, 3), 77, np.uint8)
    two = np.where(noise[..., :1] < 100, np.uint8(20), np.uint8(90)).repeat(3, axis=-1)
    pictures = np.concatenate([frames(), noise, flat, two])
    values = {argument(operation, level, sign) for level in (0, 2.2, 6.4, 7, 7.6, 9.9) for sign in (-1, 1)}
    for value in values:
        step = [(operation, value)]
        assert np.array_equal(changed(pictures, step), in_pillow(pictures, step)), value


@pytest.mark.parametrize("operation", GEOMETRY, ids=lambda o: o.name)
def test_geometry_differs_from_pillow_by_its_cubic_kernel_alone(operation: Operation) -> None:
    """Under half a grey level in the mean, and nothing at all in where the fill is."""
    pictures, outside = frames(2, 112), np.full((1, 112, 112, 3), 200, np.uint8)
    for level in (0, 3, 7, 7.7):
        for sign in (-1, 1):
            step = [(operation, argument(operation, level, sign))]
            difference = np.abs(changed(pictures, step) - in_pillow(pictures, step))
            assert difference.mean() < 0.5
            assert difference.max() < 16
            # Of one colour both kernels make the same, so that the filled part shows.
            assert np.array_equal(changed(outside, step), in_pillow(outside, step))
            if level == 0:
                assert difference.max() == 0


def test_what_is_not_taken_from_kornia_differs_from_pillow_there() -> None:
    """Its blends by a grey level in many pixels, its warp by far more along the border of the frame."""
    pictures = frames(3, 112)
    planes = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    for operation, blend in (
        (Operation.COLOR, kornia.enhance.adjust_saturation_with_gray_subtraction),
        (Operation.CONTRAST, kornia.enhance.adjust_contrast_with_mean_subtraction),
        (Operation.SHARPNESS, kornia.enhance.sharpness),
    ):
        found = (blend(planes, torch.full((3,), 1.63)) * 255 + 1e-3).floor().transpose(0, 1).numpy()
        difference = np.abs(found - in_pillow(pictures, [(operation, 1.63)]))
        assert difference.max() == 1
        assert 0.05 < difference.mean() < 0.4
    matrix = torch.tensor([[[1, -0.21, 0], [0, 1, 0]]]).expand(3, -1, -1)
    fill = torch.full((3,), 128 / 255)
    sheared = kornia.geometry.warp_affine(
        planes, matrix, (112, 112), mode="bicubic", padding_mode="fill", fill_value=fill
    )
    found = (sheared.clamp(0, 1) * 255).floor().transpose(0, 1).numpy()
    step = [(Operation.SHEAR_X, 0.21)]
    theirs, ours = (np.abs(each - in_pillow(pictures, step)) for each in (found, changed(pictures, step)))
    assert theirs.max() > 2 * ours.max()
    assert theirs.mean() > 1.5 * ours.mean()


def test_a_clip_goes_through_its_operations_in_the_drawn_order() -> None:
    steps = [
        (Operation.CONTRAST, 1.6), (Operation.SOLARIZE, 80.0), (Operation.EQUALIZE, 0.0), (Operation.COLOR, 0.4),
    ]  # fmt: skip
    assert np.array_equal(changed(frames(), steps), in_pillow(frames(), steps))
    assert not np.array_equal(changed(frames(), steps), in_pillow(frames(), steps[::-1]))


def batch(number: int, augmentation: Augmentation = RECIPE) -> tuple[torch.Tensor, list[ClipDraw]]:
    clips = torch.stack([as_clip(frames(3, SIZE, seed)) for seed in range(number)])
    drawn = [
        draw_clip(np.random.default_rng([7, place]), augmentation, SIZE, SIZE) for place in range(number)
    ]
    return clips, drawn


def test_a_clips_pixels_do_not_depend_on_its_neighbours() -> None:
    """Bit-equal alone, in other company, and from the loader's memory layout (colours last)."""
    clips, drawn = batch(24, Augmentation(operation_prob=0.9, erase_prob=0.5))
    expected = augment(clips, stack_draws(drawn), MEAN, STD)
    assert {int(o) for draw in drawn for o in draw.operations} == {NO_OPERATION, *Operation}
    for place in range(0, 24, 3):
        alone = augment(clips[[place]], stack_draws([drawn[place]]), MEAN, STD)
        assert torch.equal(alone[0], expected[place])
    order = np.random.default_rng(0).permutation(24)[:17].tolist()
    others = augment(clips[order], stack_draws([drawn[i] for i in order]), MEAN, STD)
    assert torch.equal(others, expected[order])
    colours_last = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(augment(colours_last, stack_draws(drawn), MEAN, STD), expected)


def test_all_frames_of_a_clip_are_changed_alike_and_the_input_stays() -> None:
    still = as_clip(np.repeat(frames(1), 3, axis=0))[None].repeat(8, 1, 1, 1, 1)
    drawn = [draw_clip(np.random.default_rng(i), Augmentation(erase_prob=0), SIZE, SIZE) for i in range(8)]
    before = still.clone()
    found = augment(still, stack_draws(drawn), MEAN, STD)
    assert torch.equal(still, before)
    assert torch.equal(found[:, :, 0], found[:, :, 1])
    assert torch.equal(found[:, :, 0], found[:, :, 2])
    assert found.min() >= 0
    assert found.max() <= 255
    assert torch.equal(found, found.round())


def test_flipped_clips_are_mirrored() -> None:
    clips, _ = batch(4)
    drawn = [
        draw_clip(np.random.default_rng(i), Augmentation(operations=0, erase_prob=0), SIZE, SIZE)
        for i in range(4)
    ]
    flips = [bool(draw.flip) for draw in drawn]
    assert 0 < sum(flips) < 4
    found = augment(clips, stack_draws(drawn), MEAN, STD)
    for clip, flip, result in zip(clips, flips, found, strict=True):
        assert torch.equal(result, (clip.flip(-1) if flip else clip).float())


def test_an_erased_box_holds_fresh_standard_noise_in_every_frame() -> None:
    clips, drawn = batch(40, Augmentation(operations=0, flip_prob=0, erase_prob=1))
    found = augment(clips, stack_draws(drawn), MEAN, STD)
    values = []
    for clip, result, draw in zip(clips, found, drawn, strict=True):
        top, bottom, left, right = draw.erased.tolist()
        outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert torch.equal(result[..., outside], clip[..., outside].float())
        box = result[:, :, top:bottom, left:right]
        mean, std = (torch.tensor(v)[:, None, None, None] for v in (MEAN, STD))
        noise = (box / 255 - mean) / std
        assert not torch.isclose(noise[:, 0], noise[:, 1]).all(dim=-1).any(), "frames differ"
        values.append(noise.flatten())
    noise = torch.cat(values)
    assert abs(noise.mean().item()) < 5 / math.sqrt(len(noise))
    assert noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / len(noise)))


def slow_erased(number: int, height: int, width: int) -> list[tuple[int, int]]:
    """Sides of boxes by timm's rule, with Python's generator."""
    rng, sides = random.Random(3), []
    while len(sides) < number:
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            sides.append((h, w))
    return sides


def test_boxes_are_erased_as_often_and_as_large_as_timms() -> None:
    number = 8000
    augmentation = Augmentation(operations=0)
    rng = np.random.default_rng(0)
    boxes = np.array([draw_clip(rng, augmentation, 96, 128).erased for _ in range(number)])
    erased = boxes[boxes[:, 1] > 0]
    assert abs(len(erased) / number - 0.25) < 5 * math.sqrt(0.25 * 0.75 / number)
    assert boxes[boxes[:, 1] == 0].sum() == 0
    heights, widths = erased[:, 1] - erased[:, 0], erased[:, 3] - erased[:, 2]
    assert erased.min() >= 0
    assert erased[:, 1].max() <= 96
    assert erased[:, 3].max() <= 128
    slow = np.array(slow_erased(number, 96, 128))
    for found, expected in (
        (heights, slow[:, 0]), (widths, slow[:, 1]), (heights * widths, slow.prod(axis=1)),
    ):  # fmt: skip
        error = 5 * expected.std() * math.sqrt(1 / len(found) + 1 / number)
        assert abs(found.mean() - expected.mean()) < error
    # Anywhere: the free room is used evenly.
    places = erased[:, 0] / (96 - heights)
    assert abs(places.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(places)) + 0.002


def test_operations_and_levels_are_drawn_as_timm_draws_them() -> None:
    """Fifteen with replacement, each applied half the time, levels 7 +- 0.5, signs even."""
    number = 6000
    rng = np.random.default_rng(0)
    drawn = [draw_clip(rng, RECIPE, SIZE, SIZE) for _ in range(number)]
    operations = np.stack([draw.operations for draw in drawn])
    arguments = np.stack([draw.arguments for draw in drawn])
    assert operations.shape == arguments.shape == (number, 4)
    total = operations.size
    for operation in Operation:
        share = (operations == operation).mean()
        assert abs(share - 1 / 30) < 5 * math.sqrt(1 / 30 / total)
    assert abs((operations == NO_OPERATION).mean() - 0.5) < 5 * math.sqrt(0.25 / total)
    assert any(len(set(row)) < 4 for row in operations[(operations != NO_OPERATION).all(axis=1)].tolist())
    degrees = arguments[operations == Operation.ROTATE].astype(float)
    levels = np.abs(degrees) / 3
    assert abs(levels.mean() - 7) < 5 * 0.5 / math.sqrt(len(levels))
    assert levels.std() == pytest.approx(0.5, rel=0.15)
    assert abs((degrees > 0).mean() - 0.5) < 5 * math.sqrt(0.25 / len(degrees))
    flips = np.mean([draw.flip for draw in drawn])
    assert abs(flips - 0.5) < 5 * math.sqrt(0.25 / number)
    for extreme, limit in ((50.0, 10), (-50.0, 0)):
        draw = draw_clip(rng, Augmentation(level=extreme, operations=100), SIZE, SIZE)
        rotations = draw.arguments[draw.operations == Operation.ROTATE]
        assert len(rotations)
        assert np.abs(rotations) == pytest.approx(3 * limit)


def test_levels_mean_what_they_mean_in_timm() -> None:
    """Its formulas at level 7 and 7.6, written out as numbers."""
    expected = {
        Operation.AUTO_CONTRAST: (0, 0), Operation.EQUALIZE: (0, 0), Operation.INVERT: (0, 0),
        Operation.ROTATE: (21, -22.8), Operation.POSTERIZE: (2, 1), Operation.SOLARIZE: (77, 62),
        Operation.SOLARIZE_ADD: (77, 83), Operation.COLOR: (1.63, 0.316), Operation.CONTRAST: (1.63, 0.316),
        Operation.BRIGHTNESS: (1.63, 0.316), Operation.SHARPNESS: (1.63, 0.316), Operation.SHEAR_X: (0.21, -0.228),
        Operation.SHEAR_Y: (0.21, -0.228), Operation.TRANSLATE_X: (0.315, -0.342),
        Operation.TRANSLATE_Y: (0.315, -0.342),
    }  # fmt: skip
    found = {o: (argument(o, 7, 1), argument(o, 7.6, -1)) for o in Operation}
    assert found == {o: pytest.approx(values) for o, values in expected.items()}


def test_the_recipe_is_the_default() -> None:
    assert Augmentation() == Augmentation(7, 4, 0.5, 0.5, 0.5, 0.25)


def test_draws_are_of_fixed_shapes_and_decided_by_their_key() -> None:
    first, again = (draw_clip(np.random.default_rng(3), RECIPE, SIZE, SIZE) for _ in range(2))
    other = draw_clip(np.random.default_rng(4), RECIPE, SIZE, SIZE)
    for name, shape in {
        "operations": (4,),
        "arguments": (4,),
        "flip": (),
        "erased": (4,),
        "noise_key": (),
    }.items():
        assert np.shape(getattr(first, name)) == shape
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.noise_key != other.noise_key
    stacked = stack_draws([first, other])
    assert [field.shape[0] for field in stacked] == [2] * 5
    assert (stacked.operations.dtype, stacked.noise_key.dtype) == (torch.int64, torch.int64)


def slow_crop(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Random resized crop as VideoMAE draws it, with Python's generator."""
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(0.75), math.log(1.3333)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < 0.75:
        w, h = width, round(width / 0.75)
    elif width / height > 1.3333:
        w, h = round(height * 1.3333), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (128, 128)])
def test_crops_are_distributed_as_videomaes(height: int, width: int) -> None:
    rng, slow_rng, number = np.random.default_rng(0), random.Random(0), 4000
    found = np.array([ResizedCrop().draw(height, width, 224, rng) for _ in range(number)])
    expected = np.array([slow_crop(slow_rng, height, width) for _ in range(number)])
    assert found.min() >= 0
    assert (found[:, 0] + found[:, 2]).max() <= height
    assert (found[:, 1] + found[:, 3]).max() <= width
    for column in range(4):
        spread = expected[:, column].std()
        error = 5 * spread * math.sqrt(2 / number)
        assert abs(found[:, column].mean() - expected[:, column].mean()) < error
        assert found[:, column].std() == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize(("height", "width"), [(2, 400), (400, 2)])
def test_a_frame_too_narrow_for_any_crop_gives_its_centre(height: int, width: int) -> None:
    found = {tuple(ResizedCrop().draw(height, width, 224, np.random.default_rng(i))) for i in range(20)}
    assert found == {slow_crop(random.Random(i), height, width) for i in range(20)}
    assert len(found) == 1
