"""Accuracy from stored scores equals what scikit-learn and plain loops make of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from arvideo_dist.tasks.accuracy import accuracy, confusion_picture, video_scores, worst_classes

CLASSES = 7


def drawn(videos: int, views: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(CLASSES), size=(videos, views)).astype(np.float32)
    return scores, rng.integers(CLASSES, size=videos)


@pytest.mark.parametrize("views", [1, 6])
def test_shares_equal_scikit_learns(views: int) -> None:
    scores, labels = drawn(211, views)
    mean = video_scores(scores, np.arange(len(scores)))
    found = accuracy(mean, labels)
    every = np.arange(CLASSES)
    assert found.top1 == pytest.approx(top_k_accuracy_score(labels, mean, k=1, labels=every), abs=1e-12)
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, mean, k=5, labels=every), abs=1e-12)
    assert found.mean_class == pytest.approx(balanced_accuracy_score(labels, mean.argmax(1)), abs=1e-12)
    assert (found.confusion == confusion_matrix(labels, mean.argmax(1), labels=every)).all()


def test_views_that_were_not_read_have_no_part_in_a_videos_scores() -> None:
    scores, _ = drawn(3, 4)
    scores[1, [0, 2]] = np.nan
    mean = video_scores(scores, np.arange(len(scores)))
    for video, views in ((0, [0, 1, 2, 3]), (1, [1, 3]), (2, [0, 1, 2, 3])):
        expected = sum(scores[video, view].astype(np.float64) for view in views) / len(views)
        np.testing.assert_allclose(mean[video], expected, rtol=1e-12)


def test_a_class_without_a_video_has_no_accuracy_and_no_part_in_the_mean() -> None:
    scores = np.eye(3)[[0, 0, 1]]
    found = accuracy(scores, np.array([0, 1, 1]))
    assert found.by_class[:2].tolist() == [1.0, 0.5]
    assert np.isnan(found.by_class[2])
    assert found.mean_class == 0.75


def test_the_worst_class_stands_first_with_what_it_is_taken_for() -> None:
    scores = np.eye(3)[[0, 0, 1, 2, 2, 2]]
    found = accuracy(scores, np.array([0, 1, 1, 2, 2, 0]))
    lines = worst_classes(found, ["run", "walk", "swim"]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["50.00%", "50.00%", "100.00%"]
    assert lines[1].endswith("run  swim (50.0%)")
    assert lines[2].endswith("walk  run (50.0%)")
    assert lines[3].endswith("swim  -")


def test_the_confusion_picture_is_black_where_a_whole_row_is() -> None:
    picture = confusion_picture(accuracy(np.eye(2)[[0, 1, 1]], np.array([0, 0, 1])))
    side = picture.shape[0] - 24
    quarter = side // 4
    cells = picture[24:, 24:, 0]
    assert cells[3 * quarter, 3 * quarter] == 0  # all of class 1 are right
    assert cells[3 * quarter, quarter] == 255
    assert cells[quarter, quarter] == cells[quarter, 3 * quarter] == round(255 * (1 - 0.5**0.5))
