"""Mixed clips and targets against loops over pairs; draws against timm's distributions; keys by place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arvideo_dist.data.mixing import (
    MixDraws,
    Mixing,
    PairDraw,
    draw_pair,
    first_place_of_pair,
    mix,
    partner_slots,
    soft_targets,
    unit_places,
)

SIZE, CLASSES = 12, 5
RECIPE = Mixing()


def drawn(number: int, mixing: Mixing = RECIPE, size: int = SIZE, seed: int = 0) -> list[PairDraw]:
    rng = np.random.default_rng(seed)
    return [draw_pair(rng, mixing, size, size) for _ in range(number)]


def stacked(places: list[int], repeats: int, seed: int = 0) -> MixDraws:
    """As a loader makes them: keyed by the first place of each pair."""
    draws = []
    for place in places:
        rng = np.random.default_rng([seed, first_place_of_pair(place, repeats)])
        draws.append(draw_pair(rng, RECIPE, SIZE, SIZE))
    return MixDraws(*(torch.from_numpy(np.stack(each)) for each in zip(*draws, strict=True)))


def clips_of(places: list[int]) -> torch.Tensor:
    clips = [
        np.random.default_rng(place).integers(0, 256, (3, 2, SIZE, SIZE), dtype=np.uint8) for place in places
    ]
    return torch.from_numpy(np.stack(clips))


def slow_mix(
    clips: np.ndarray, labels: list[int], weights: list[float], draws: MixDraws, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """timm's pair of formulas, for one clip after another."""
    mixed, targets = clips.astype(np.float64), np.zeros((len(clips), CLASSES))
    for i in range(len(clips)):
        j = i + repeats if (i // repeats) % 2 == 0 else i - repeats
        share = float(draws.share[i])
        if weights[i] == 0 or weights[j] == 0:
            share = 1.0
        top, bottom, left, right = draws.box[i].tolist()
        if share < 1 and bottom > top and right > left:
            mixed[i, :, :, top:bottom, left:right] = clips[j, :, :, top:bottom, left:right]
        else:
            mixed[i] = clips[i] * share + clips[j] * (1 - share)
        for k in range(CLASSES):
            own, other = (0.1 / CLASSES + 0.9 * (labels[n] == k) for n in (i, j))
            targets[i, k] = own * share + other * (1 - share)
    return mixed, targets


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clips_and_targets_are_those_of_the_formulas(repeats: int, seed: int) -> None:
    places = list(range(12))
    clips, draws = clips_of(places), stacked(places, repeats, seed)
    labels = np.random.default_rng(seed).integers(0, CLASSES, 12)
    weights = torch.ones(12)
    weights[[1, 6]] = 0
    targets = soft_targets(torch.from_numpy(labels), CLASSES, 0.1)
    mixed, mixed_targets = mix(clips, targets, weights, draws, repeats)
    expected, expected_targets = slow_mix(clips.numpy(), labels.tolist(), weights.tolist(), draws, repeats)
    assert mixed.dtype == torch.float32
    assert np.abs(mixed.numpy() - expected).max() < 1e-3
    assert np.abs(mixed_targets.numpy() - expected_targets).max() < 1e-6
    assert mixed_targets.sum(dim=1).tolist() == pytest.approx([1.0] * 12)


def test_both_kinds_occur_in_a_batch_and_change_it() -> None:
    places = list(range(16))
    draws = stacked(places, 1)
    is_cut = (draws.box[:, 1] > draws.box[:, 0]) & (draws.box[:, 3] > draws.box[:, 2])
    assert 0 < is_cut.sum() < 16
    clips = clips_of(places)
    mixed, _ = mix(clips, torch.ones(16, 1), torch.ones(16), draws, 1)
    for i in range(16):
        from_partner = (mixed[i] == clips[i ^ 1]).float().mean()
        own = (mixed[i] == clips[i]).float().mean()
        if is_cut[i]:
            assert own + from_partner > 0.99
            assert own.item() == pytest.approx(draws.share[i].item(), abs=0.02)


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_clip_and_its_target_do_not_depend_on_the_micro_batch(repeats: int) -> None:
    """Bit-equal, in micro batches of one unit, of two, and of all."""
    places = list(range(8, 24))
    labels = torch.tensor([place // repeats % CLASSES for place in places])
    targets = soft_targets(labels, CLASSES, 0.1)
    expected = mix(clips_of(places), targets, torch.ones(16), stacked(places, repeats), repeats)
    for size in (unit_places(repeats), 2 * unit_places(repeats)):
        for start in range(0, 16, size):
            part = places[start : start + size]
            own_targets = targets[start : start + size]
            found = mix(clips_of(part), own_targets, torch.ones(size), stacked(part, repeats), repeats)
            assert torch.equal(found[0], expected[0][start : start + size])
            assert torch.equal(found[1], expected[1][start : start + size])


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_partners_are_of_different_samples_and_of_one_key(repeats: int) -> None:
    unit = unit_places(repeats)
    slots = partner_slots(3 * unit, repeats).tolist()
    for slot, partner in enumerate(slots):
        assert slots[partner] == slot
        assert slot // unit == partner // unit
        assert slot // repeats != partner // repeats, "visits, so samples"
        assert first_place_of_pair(slot, repeats) == min(slot, partner)


@pytest.mark.parametrize("bad", [0, 3])
def test_the_partner_of_a_bad_clip_stays_unmixed(bad: int) -> None:
    places = [0, 1, 2, 3]
    clips = clips_of(places)
    clips[bad] = 0
    weights, targets = torch.ones(4), soft_targets(torch.tensor([0, 1, 2, -1]), CLASSES, 0.1)
    weights[bad] = 0
    mixed, mixed_targets = mix(clips, targets, weights, stacked(places, 1), 1)
    partner = bad ^ 1
    assert torch.equal(mixed[partner], clips[partner].float())
    assert torch.equal(mixed_targets[partner], targets[partner])
    others = [slot for slot in places if slot not in (bad, partner)]
    assert not torch.equal(mixed[others], clips[others].float())


def test_a_micro_batch_of_half_units_is_an_error() -> None:
    with pytest.raises(AssertionError, match="whole units of 4"):
        partner_slots(6, 2)


def test_smoothed_targets_are_timms() -> None:
    targets = soft_targets(torch.tensor([3, 0, -1]), 4, 0.1)
    off, on = 0.025, 0.925
    expected = [off, off, off, on, on, off, off, off, on, off, off, off]
    assert targets.flatten().tolist() == pytest.approx(expected)
    assert soft_targets(torch.tensor([1]), 2, 0.0).tolist() == [[0, 1]]


def test_half_the_pairs_are_cut_and_shares_are_beta_distributed() -> None:
    """Mean 1/2, variance 1 / (4 (2 a + 1)) for mixup; for cutmix the share is that of what the border leaves."""
    number = 20_000
    pairs = drawn(number, size=224)
    is_cut = np.array([pair.box[1] > pair.box[0] for pair in pairs])
    # A cut so small that no pixel is left of it counts as none.
    assert abs(is_cut.mean() - 0.5) < 5 * math.sqrt(0.25 / number) + 1e-3
    mixup = np.array([float(pair.share) for pair in pairs])[~is_cut]
    variance = 1 / (4 * (2 * 0.8 + 1))
    assert abs(mixup.mean() - 0.5) < 5 * math.sqrt(variance / len(mixup))
    assert mixup.var() == pytest.approx(variance, rel=0.05)
    for pair in pairs:
        top, bottom, left, right = pair.box.tolist()
        assert 0 <= top <= bottom <= 224
        assert 0 <= left <= right <= 224
        if bottom > top:
            area = (bottom - top) * (right - left)
            assert float(pair.share) == pytest.approx(1 - area / 224**2, abs=1e-6)


def test_boxes_are_distributed_as_timms() -> None:
    """Share ~ U(0, 1), sides int(size sqrt(1 - share)), a uniform centre, clipped: mean and spread of shares."""
    rng, slow = np.random.default_rng(9), []
    for _ in range(20_000):
        side = int(224 * math.sqrt(1 - rng.beta(1.0, 1.0)))
        edges = []
        for centre in rng.integers(0, 224, 2):
            edges += [min(max(centre - side // 2, 0), 224), min(max(centre + side // 2, 0), 224)]
        slow.append(1 - (edges[1] - edges[0]) * (edges[3] - edges[2]) / 224**2)
    found = [float(pair.share) for pair in drawn(20_000, Mixing(mixup=0), size=224)]
    assert np.mean(found) == pytest.approx(np.mean(slow), abs=5 * np.std(slow) * math.sqrt(2 / 20_000))
    assert np.std(found) == pytest.approx(np.std(slow), rel=0.03)


def test_kinds_can_be_switched_off() -> None:
    for pair in drawn(50, Mixing(cutmix=0)):
        assert pair.box.tolist() == [0, 0, 0, 0]
        assert 0 <= pair.share <= 1
    assert all(pair.box[1] > pair.box[0] for pair in drawn(50, Mixing(mixup=0, switch_prob=0), size=224))
    for pair in [*drawn(50, Mixing(mixup=0, cutmix=0)), *drawn(50, Mixing(prob=0))]:
        assert (pair.share, pair.box.tolist()) == (1, [0, 0, 0, 0])
    unmixed = sum(float(pair.share) == 1 for pair in drawn(2000, Mixing(prob=0.3, cutmix=0)))
    assert abs(unmixed / 2000 - 0.7) < 5 * math.sqrt(0.21 / 2000)
