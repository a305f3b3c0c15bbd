"""Mixup and cutmix of pairs of clips, with label smoothing (timm's Mixup as VideoMAE uses it).

The places of a run come in units of 2 R, with R the number of repeats of a sample, and the partner of a place is
R places away in its unit: another visit, which is another sample except when one epoch follows the other. A micro
batch holds whole units, so a clip and its partner always share one, at any world size, and everything drawn for a
pair is keyed by its first place.

VideoMAE draws one share and one box for a whole micro batch, which would tie the clips to the size of it. Here each
pair draws its own, from the same distributions.

Letters: B clips, C channels, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixing:
    """How clips are mixed; the defaults are the fine-tuning recipe's."""

    mixup: float = 0.8  # share ~ Beta(mixup, mixup); 0: no mixup
    cutmix: float = 1.0  # share ~ Beta(cutmix, cutmix); 0: no cutmix
    prob: float = 1.0  # of a pair to be mixed at all
    switch_prob: float = 0.5  # of a mixed pair to be cut, if both are on


class PairDraw(NamedTuple):
    """What was drawn for one pair; both of its clips carry it."""

    # []: of a clip's own label, the rest is its partner's; 1: the pair stays unmixed.
    share: NDArray[np.float32]
    box: NDArray[np.int64]  # [4] top, bottom, left, right of what is cut from the partner; no area: mixup


class MixDraws(NamedTuple):
    """The `PairDraw`s of a micro batch."""

    share: torch.Tensor  # float32 [B]
    box: torch.Tensor  # int64 [B, 4]


def unit_places(repeats: int) -> int:
    """Places in a unit: batch sizes are multiples of it."""
    return 2 * repeats


def first_place_of_pair(place: int, repeats: int) -> int:
    """The place that keys the draws of `place` and its partner."""
    return place - repeats if place % unit_places(repeats) >= repeats else place


def partner_slots(clips: int, repeats: int, device: torch.device | None = None) -> torch.Tensor:
    """Slot [B] (int64) of each clip's partner in a micro batch that holds whole units."""
    unit = unit_places(repeats)
    assert clips % unit == 0, f"a micro batch of {clips} clips does not hold whole units of {unit}"
    slots = torch.arange(clips, device=device)
    return slots - slots % unit + (slots + repeats) % unit


def draw_pair(rng: np.random.Generator, mixing: Mixing, height: int, width: int) -> PairDraw:
    """Share and box of one pair of clips of `height` x `width` pixels (timm: rand_bbox, correct_lam).

    The box has 1 - share of the area before the frame's border cuts it; the share is then that of what remains.
    """
    mixed, cut = rng.random() < mixing.prob, rng.random() < mixing.switch_prob
    cut = mixing.cutmix > 0 and (cut or not mixing.mixup > 0)
    concentration = mixing.cutmix if cut else mixing.mixup
    share = rng.beta(concentration, concentration) if mixed and concentration > 0 else 1.0
    box = np.zeros(4, dtype=np.int64)
    if cut and share < 1:
        centre = rng.integers([height, width])
        half = (np.array([height, width]) * np.sqrt(1 - share)).astype(np.int64) // 2
        top, left = np.maximum(centre - half, 0)
        bottom, right = np.minimum(centre + half, [height, width])
        box[:] = top, bottom, left, right
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return PairDraw(np.array(share, dtype=np.float32), box)


def soft_targets(labels_b: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Class probabilities float32 [B, K]: 1 - smoothing at the label, and smoothing / K everywhere.

    A label below 0 (of a clip of weight 0) counts as 0.
    """
    off = smoothing / classes
    targets_bk = torch.full((len(labels_b), classes), off, device=labels_b.device)
    return targets_bk.scatter_(1, labels_b.clamp(min=0)[:, None], 1 - smoothing + off)


def mix(
    clips_bcthw: torch.Tensor,
    targets_bk: torch.Tensor,
    weights_b: torch.Tensor,
    draws: MixDraws,
    repeats: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed clips (float32) and targets. If one of a pair has weight 0, the other stays as it is.

    `targets_bk`: as from `soft_targets`. Everything lies on one device. Clips of any range: mixing before or after
    the colours are normalised is the same.
    """
    partner_b = partner_slots(len(clips_bcthw), repeats, clips_bcthw.device)
    both_b = (weights_b > 0) & (weights_b[partner_b] > 0)
    share_b = torch.where(both_b, draws.share, 1.0)
    own_b11hw = _own_share(draws.box, share_b, both_b, clips_bcthw.shape[3], clips_bcthw.shape[4])
    clips_bcthw = clips_bcthw.float()
    mixed_bcthw = torch.lerp(clips_bcthw[partner_b], clips_bcthw, own_b11hw)
    return mixed_bcthw, torch.lerp(targets_bk[partner_b], targets_bk, share_b[:, None])


def _own_share(
    box_b4: torch.Tensor, share_b: torch.Tensor, both_b: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """How much of each pixel is the clip's own, [B, 1, 1, H, W]: its share, or 0 in the box and 1 around it."""
    top, bottom, left, right = box_b4[:, :, None].unbind(1)
    rows = torch.arange(height, device=box_b4.device)
    columns = torch.arange(width, device=box_b4.device)
    in_rows_bh, in_columns_bw = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside_bhw = in_rows_bh[:, :, None] & in_columns_bw[:, None, :] & both_b[:, None, None]
    is_cut_b = ((bottom > top) & (right > left))[:, 0]
    around_b = torch.where(is_cut_b, 1.0, share_b)
    return torch.where(inside_bhw, 0.0, around_b[:, None, None])[:, None, None]
