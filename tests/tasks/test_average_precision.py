"""Frame mAP against an independent computation, hand-made cases, and numbers worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from arvideo_dist.tasks.average_precision import Boxes, average_precision, overlap

ANNOTATIONS = Path(__file__).parents[2].parent / "shared" / "annotations"
WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)

Row = tuple[str, tuple[float, ...], int, float]  # frame, box, class, score


def boxes(*rows: Row) -> Boxes:
    frames, corners, classes, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Boxes(
        np.array(frames, dtype=object),
        np.array(corners, dtype=np.float64).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        np.array(scores, dtype=np.float64),
    )


def iou(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - common
    return common / area if area else 0.0


def slow_average_precision(truth: list[Row], detected: list[Row], number: int) -> float:
    """By the definition, one detection at a time, and the area as a sum of rectangles."""
    truths = [row for row in truth if row[2] == number]
    guesses = sorted((row for row in detected if row[2] == number), key=lambda row: -row[3])
    taken: set[int] = set()
    points, hits = [(0.0, 1.0)], 0
    for count, (frame, box, _, _) in enumerate(guesses, start=1):
        candidates = [(iou(box, row[1]), -i) for i, row in enumerate(truths) if row[0] == frame]
        if candidates:
            best, index = max(candidates)
            if best >= 0.5 and -index not in taken:
                taken.add(-index)
                hits += 1
        points.append((hits / len(truths), hits / count))
    area = 0.0
    for i in range(1, len(points)):
        step = points[i][0] - points[i - 1][0]
        area += step * max(precision for _, precision in points[i:])
    return area


def random_rows(rng: np.random.Generator, count: int, scored: bool) -> list[Row]:
    rows: list[Row] = []
    for _ in range(count):
        x, y = rng.uniform(0, 0.6, 2)
        w, h = rng.uniform(0.2, 0.4, 2)
        score = float(np.round(rng.uniform(), 1)) if scored else 1.0
        rows.append((f"f{rng.integers(6)}", (x, y, x + w, y + h), int(rng.integers(1, 5)), score))
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_an_independent_computation(seed: int) -> None:
    """Among them ties of score, frames without ground truth and classes without detections."""
    rng = np.random.default_rng(seed)
    truth = random_rows(rng, 40, scored=False)
    shaken = [
        (frame, tuple(np.array(box) + rng.normal(0, 0.04, 4)), number, float(np.round(rng.uniform(), 1)))
        for frame, box, number, _ in truth
        for _ in range(rng.integers(0, 3))
    ]
    detected = shaken + random_rows(rng, 60, scored=True)
    rng.shuffle(detected)
    detected = [(f, tuple(map(float, b)), n, s) for f, b, n, s in detected]
    found = average_precision(boxes(*truth), boxes(*detected), range(1, 6))
    assert sorted(found.of_class) == sorted({row[2] for row in truth})
    for number, value in found.of_class.items():
        assert value == pytest.approx(slow_average_precision(truth, detected, number))
    assert found.mean == pytest.approx(np.mean(list(found.of_class.values())))


def test_a_second_detection_of_the_same_box_is_wrong_and_the_better_scored_counts() -> None:
    truth = boxes(("a", LEFT, 1, 1), ("a", RIGHT, 1, 1))
    detected = boxes(("a", LEFT, 1, 0.9), ("a", LEFT, 1, 0.8), ("a", RIGHT, 1, 0.7))
    assert average_precision(truth, detected, [1]).mean == pytest.approx((1 + 2 / 3) / 2)


def test_the_box_that_overlaps_most_decides_though_another_is_free() -> None:
    truth = boxes(("a", WHOLE, 1, 1), ("a", (0.0, 0.0, 1.0, 0.9), 1, 1))
    detected = boxes(("a", WHOLE, 1, 0.9), ("a", WHOLE, 1, 0.8))
    assert average_precision(truth, detected, [1]).mean == pytest.approx(0.5)


def test_a_persons_several_actions_are_judged_apart() -> None:
    truth = boxes(("a", WHOLE, 1, 1), ("a", WHOLE, 2, 1))
    detected = boxes(("a", WHOLE, 1, 0.9), ("a", WHOLE, 3, 0.8))
    found = average_precision(truth, detected, [1, 2, 3])
    assert found.of_class == {1: 1.0, 2: 0.0}
    assert found.mean == 0.5


def test_a_detection_in_a_frame_without_ground_truth_is_wrong() -> None:
    truth = boxes(("a", WHOLE, 1, 1))
    detected = boxes(("b", WHOLE, 1, 0.9), ("a", WHOLE, 1, 0.8))
    assert average_precision(truth, detected, [1]).mean == 0.5


def test_excluded_frames_and_classes_outside_the_label_map_do_not_count() -> None:
    truth = boxes(("a", WHOLE, 1, 1), ("b", WHOLE, 1, 1), ("a", WHOLE, 9, 1))
    detected = boxes(("b", LEFT, 1, 0.95), ("a", WHOLE, 1, 0.9), ("a", LEFT, 9, 0.9))
    assert average_precision(truth, detected, [1], excluded=["b"]).of_class == {1: 1.0}


def test_the_threshold_itself_is_enough() -> None:
    assert overlap(np.array([LEFT]), np.array([WHOLE])) == pytest.approx(np.array([[0.5]]))
    found = average_precision(boxes(("a", WHOLE, 1, 1)), boxes(("a", LEFT, 1, 1)), [1])
    assert found.mean == 1


def test_nothing_to_find_has_no_precision_and_nothing_found_has_none_either() -> None:
    assert average_precision(boxes(), boxes(("a", WHOLE, 1, 1)), [1]).mean is None
    assert average_precision(boxes(("a", WHOLE, 1, 1)), boxes(), [1]).mean == 0


def read(file: Path, score: float = 1.0) -> list[Row]:
    with open(file, newline="") as lines:
        return [
            (f"{video},{int(second):04d}", tuple(map(float, corners)), int(action), score)
            for video, second, *corners, action, _ in csv.reader(lines)
        ]


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="AVA's excerpts are not beside this checkout")
def test_the_excerpt_of_ava_gives_the_numbers_worked_out_by_hand() -> None:
    """v2.2's first key frame: two persons, of classes 12 and 79, and 12 and 17."""
    truth = read(ANNOTATIONS / "ava_v2.2_excerpt.csv")
    (first, second) = dict.fromkeys(row[1] for row in truth)
    frame = truth[0][0]
    detected: list[Row] = [
        (frame, first, 12, 0.9),  # right
        (frame, WHOLE, 12, 0.8),  # overlaps the first person most (0.61), who is found: wrong
        (frame, second, 12, 0.7),  # right: 2 of 3
        (frame, second, 79, 0.9),  # it is the other person who does 79: wrong
        (frame, first, 79, 0.3),  # right: 1 of 2
    ]
    found = average_precision(boxes(*truth), boxes(*detected), range(1, 81))
    assert found.of_class == pytest.approx({12: (1 + 2 / 3) / 2, 17: 0.0, 79: 0.5})
    assert found.mean == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)
