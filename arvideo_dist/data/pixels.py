"""What augmentation does to the pixels of a batch of clips, on their device; augment.py draws it.

Operations are Pillow's, as timm calls them: whole grey levels in and out of each. A clip's result depends on its
own draws alone, bit by bit, never on its neighbours in the batch: sums are of whole numbers, all else is pixel by
pixel.

All colour operations equal Pillow 13. Rotation, shear and translation differ by 0.1 to 0.4 grey levels in the mean
(real frames; up to 13): torch's cubic kernel has a = -0.75, Pillow's transform a = -1 (and its resize a = -0.5).

kornia serves the operations that it has exactly as Pillow has them. Its blends (colour, contrast, sharpness) differ
by a grey level in 13 to 21 % of the pixels and sum fractions, its warp mixes the fill into the border of the frame
(1 level in the mean, up to 78), and it has neither Pillow's table of autocontrast nor timm's solarize-add: these
are here.

Letters: B clips, C = 3 channels, T frames, H x W pixels, n clips that get one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import kornia.enhance
import torch
import torch.nn.functional as F

from arvideo_dist.data.augment import NO_OPERATION, ClipDraws, Operation

FILL = 128.0  # grey that rotation, shear and translation leave behind
_GREY = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, in 1 / 65536
_ROUNDING = 0.01  # of float coordinates and weights: a whole level must not fall below itself

# Clips float32 [n, 3, T, H, W] of whole numbers 0 to 255 and an argument for each, float32 [n] on the host.
_Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def augment(
    clips_bcthw: torch.Tensor, draws: ClipDraws, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Augmented clips float32 [B, 3, T, H, W] of uint8 ones: RandAugment, flip, erasing.

    `mean`, `std`: of each colour in 0 to 1, by which the model normalises. The result is in 0 to 255, but erased
    pixels, whose normalised colours are drawn from a standard normal, may lie outside.
    """
    clips = clips_bcthw.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for operations, arguments in zip(draws.operations.T, draws.arguments.T, strict=True):
        for operation in operations.unique().tolist():
            if operation != NO_OPERATION:
                chosen = (operations == operation).nonzero()[:, 0]
                on_device = _to(clips, chosen)
                clips[on_device] = _APPLY[Operation(operation)](clips[on_device], arguments[chosen])
    if draws.flip.any():
        flipped = _to(clips, draws.flip.nonzero()[:, 0])
        clips[flipped] = clips[flipped].flip(-1)
    _erase(clips, draws, mean, std)
    return clips


def _erase(clips: torch.Tensor, draws: ClipDraws, mean: Sequence[float], std: Sequence[float]) -> None:
    """Each pixel, channel and frame of a box gets noise of its own; the box is the same in all frames."""
    for clip, (top, bottom, left, right), key in zip(
        clips, draws.erased.tolist(), draws.noise_key.tolist(), strict=True
    ):
        if bottom > top:
            box = clip[:, :, top:bottom, left:right]
            generator = torch.Generator(clips.device).manual_seed(key)
            noise = torch.randn(box.shape, generator=generator, device=clips.device)
            for channel in range(3):
                box[channel] = 255 * (mean[channel] + std[channel] * noise[channel])


def _to(clips: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """On the clips' device, without waiting for it."""
    return values.to(clips.device, non_blocking=True)


def _per_clip(clips: torch.Tensor, arguments_n: torch.Tensor) -> torch.Tensor:
    return _to(clips, arguments_n)[:, None, None, None, None]


def _planes(clips: torch.Tensor) -> torch.Tensor:
    """As kornia takes them: [n, 3 T, H, W] in 0 to 1.

    A quarter of a level higher, so that no rounding of a product takes a level to the one below when kornia cuts
    the fraction off or compares.
    """
    return (clips.flatten(1, 2) + 0.25) / 255


def _levels(planes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (planes * 255).round().view_as(like)


def _equalize(clips: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return _levels(kornia.enhance.equalize(_planes(clips)), clips)


def _invert(clips: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return 255 - clips


def _posterize(clips: torch.Tensor, bits_n: torch.Tensor) -> torch.Tensor:
    return _levels(kornia.enhance.posterize(_planes(clips), _to(clips, bits_n.int())), clips)


def _solarize(clips: torch.Tensor, threshold_n: torch.Tensor) -> torch.Tensor:
    return _levels(kornia.enhance.solarize(_planes(clips), _to(clips, threshold_n / 255)), clips)


def _solarize_add(clips: torch.Tensor, addend_n: torch.Tensor) -> torch.Tensor:
    """Brightens what is darker than the middle."""
    return torch.where(clips < 128, (clips + _per_clip(clips, addend_n)).clamp(max=255), clips)


def _auto_contrast(clips: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Stretches each channel of each frame to 0 to 255, by Pillow's table in float64."""
    low, high = clips.amin((-2, -1)).double(), clips.amax((-2, -1)).double()
    span = (high - low).clamp(min=1)
    scale = torch.full_like(span, 255) / span  # `255 / span` would round twice
    levels = torch.arange(256, device=clips.device, dtype=torch.float64)
    table = (levels * scale[..., None] + (-low * scale)[..., None]).trunc().clamp(0, 255).float()
    table = torch.where((high > low)[..., None], table, levels.float())
    return table.gather(-1, clips.flatten(-2).long()).view_as(clips)


def _blend(base: torch.Tensor, clips: torch.Tensor, factor_n: torch.Tensor) -> torch.Tensor:
    """Factor 0 gives `base`, 1 the clips; beyond, away from it. Pillow cuts off fractions of a level."""
    return (base + _per_clip(clips, factor_n) * (clips - base)).clamp(0, 255).floor()


def _grey(clips: torch.Tensor) -> torch.Tensor:
    red, green, blue = (weight * clips[:, i] for i, weight in enumerate(_GREY))
    return ((red + green + blue + 2**15) / 2**16).floor()[:, None]


def _color(clips: torch.Tensor, factor_n: torch.Tensor) -> torch.Tensor:
    return _blend(_grey(clips), clips, factor_n)


def _contrast(clips: torch.Tensor, factor_n: torch.Tensor) -> torch.Tensor:
    """Against each frame's mean grey, in whole numbers."""
    pixels = clips.shape[-2] * clips.shape[-1]
    total = _grey(clips).sum(dim=(-2, -1), keepdim=True, dtype=torch.int64)
    mean = (2 * total + pixels) // (2 * pixels)
    return _blend(mean.float(), clips, factor_n)


def _brightness(clips: torch.Tensor, factor_n: torch.Tensor) -> torch.Tensor:
    return _blend(torch.zeros_like(clips), clips, factor_n)


def _sharpness(clips: torch.Tensor, factor_n: torch.Tensor) -> torch.Tensor:
    """Against the mean over 3 x 3 pixels with the middle one counted five times; border pixels stay."""
    height, width = clips.shape[-2:]
    total = 4 * clips[..., 1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total = total + clips[..., y : height - 2 + y, x : width - 2 + x]
    smooth = clips.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(smooth, clips, factor_n)


def _rotate(clips: torch.Tensor, degrees_n: torch.Tensor) -> torch.Tensor:
    """About the centre, counter-clockwise."""
    height, width = clips.shape[-2:]
    maps = []
    for degrees in degrees_n.tolist():
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = width / 2, height / 2
        maps.append((cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))
    return _warp(clips, torch.tensor(maps))


def _shear_x(clips: torch.Tensor, shear_n: torch.Tensor) -> torch.Tensor:
    return _warp(clips, torch.tensor([(1, shear, 0, 0, 1, 0) for shear in shear_n.tolist()]))


def _shear_y(clips: torch.Tensor, shear_n: torch.Tensor) -> torch.Tensor:
    return _warp(clips, torch.tensor([(1, 0, 0, shear, 1, 0) for shear in shear_n.tolist()]))


def _translate_x(clips: torch.Tensor, share_n: torch.Tensor) -> torch.Tensor:
    width = clips.shape[-1]
    return _warp(clips, torch.tensor([(1, 0, share * width, 0, 1, 0) for share in share_n.tolist()]))


def _translate_y(clips: torch.Tensor, share_n: torch.Tensor) -> torch.Tensor:
    height = clips.shape[-2]
    return _warp(clips, torch.tensor([(1, 0, 0, 0, 1, share * height) for share in share_n.tolist()]))


def _warp(clips: torch.Tensor, maps_n6: torch.Tensor) -> torch.Tensor:
    """Bicubic. `maps_n6`: a, b, c, d, e, f, as Pillow's AFFINE has them: the pixel at (x, y) comes from
    (a x + b y + c, d x + e y + f). What comes from outside the frame is filled."""
    height, width = clips.shape[-2:]
    a, b, c, d, e, f = _to(clips, maps_n6).float()[:, :, None, None].unbind(1)
    x = torch.arange(width, device=clips.device) + 0.5
    y = (torch.arange(height, device=clips.device) + 0.5)[:, None]
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([from_x * (2 / width) - 1, from_y * (2 / height) - 1], dim=-1)
    # One grid serves all channels and frames of a clip.
    sampled = F.grid_sample(
        clips.flatten(1, 2), grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    levels = (sampled + _ROUNDING).floor().clamp(0, 255)
    return torch.where(inside[:, None], levels, FILL).view_as(clips)


_APPLY: dict[Operation, _Apply] = {
    Operation.AUTO_CONTRAST: _auto_contrast,
    Operation.EQUALIZE: _equalize,
    Operation.INVERT: _invert,
    Operation.ROTATE: _rotate,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.COLOR: _color,
    Operation.CONTRAST: _contrast,
    Operation.BRIGHTNESS: _brightness,
    Operation.SHARPNESS: _sharpness,
    Operation.SHEAR_X: _shear_x,
    Operation.SHEAR_Y: _shear_y,
    Operation.TRANSLATE_X: _translate_x,
    Operation.TRANSLATE_Y: _translate_y,
}
