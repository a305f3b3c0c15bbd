"""Rendered clips: what tells a class is motion, and a clip depends on nothing but its own numbers."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.synthetic import CLASSES, Clip, draw_scene, partner, render, render_scene

SIZE = {"width": 48, "height": 32, "frames": 9}
BOUNCE, PASS = CLASSES.index("bounce off each other"), CLASSES.index("pass through each other")


def scene(seed: int = 0):
    return draw_scene(np.random.default_rng(seed))


@pytest.mark.parametrize("label", [label for label in range(len(CLASSES)) if label not in (BOUNCE, PASS)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_class_played_backwards_is_its_partner(label: int, seed: int) -> None:
    assert partner(partner(label)) == label != partner(label)
    forwards = render_scene(scene(seed), label, **SIZE)
    backwards = render_scene(scene(seed), partner(label), **SIZE)
    assert np.array_equal(forwards[::-1], backwards)
    assert not np.array_equal(forwards, backwards)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounce_and_pass_show_the_same_pictures(seed: int) -> None:
    here = scene(seed)
    exchanged = here | {"exchanged": not here["exchanged"]}
    bounce, through = render_scene(here, BOUNCE, **SIZE), render_scene(here, PASS, **SIZE)
    other_side = render_scene(exchanged, BOUNCE, **SIZE)
    middle = SIZE["frames"] // 2
    assert np.array_equal(bounce[::-1], bounce)
    # Until they meet one looks like a bounce, after it like the bounce that began on the other side.
    assert np.array_equal(through[: middle + 1], bounce[: middle + 1])
    assert np.array_equal(through[middle:], other_side[middle:])
    assert not np.array_equal(through[middle:], bounce[middle:])


def test_a_clip_depends_on_seed_split_and_index_only() -> None:
    clip = Clip(seed=3, split="train", index=17, **SIZE)
    first = render(clip)
    render(Clip(seed=3, split="train", index=16, **SIZE))
    assert np.array_equal(first, render(clip))
    for other in (
        Clip(seed=4, split="train", index=17, **SIZE),
        Clip(seed=3, split="val", index=17, **SIZE),
        Clip(seed=3, split="train", index=29, **SIZE),
    ):
        assert not np.array_equal(first, render(other))


def test_labels_are_balanced_and_sources_unique() -> None:
    clips = [Clip(seed=0, split="train", index=index) for index in range(3 * len(CLASSES))]
    assert [clip.label for clip in clips] == list(range(len(CLASSES))) * 3
    assert len({clip.source for clip in clips}) == len(clips)


def test_every_class_moves_and_backgrounds_are_smooth() -> None:
    for label in range(len(CLASSES)):
        pictures = render(Clip(seed=5, split="train", index=label)).astype(np.int16)
        assert pictures.shape == (40, 96, 96, 3)
        assert np.abs(pictures[0] - pictures[20]).max() > 40, CLASSES[label]
        # All but the sprites' edges: neighbouring pixels differ by a few grey levels at most.
        steps = np.abs(np.diff(pictures, axis=2))
        assert np.quantile(steps, 0.9) <= 4, CLASSES[label]


def test_a_plain_clip_is_the_same_scene_before_grey() -> None:
    """Same motion, same sprite; what is no sprite is 127 or 128 in all clips."""
    for index in range(8):  # without the occluder's classes
        coloured = render(Clip(seed=3, split="train", index=index))
        plain = render(Clip(seed=3, split="train", index=index, plain=True))
        same = (coloured == plain).all(axis=-1)
        grey = np.isin(plain, (127, 128)).all(axis=-1)
        assert same.any(axis=(1, 2)).all(), CLASSES[index]
        assert 0.5 < grey.mean() < 1
        # Neither: edges, which are a mixture of both.
        assert (~same & ~grey).mean() < 0.05
