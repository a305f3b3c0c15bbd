"""Frame mAP of actions in boxes, as AVA's official evaluation defines it (PASCAL's average precision at IoU 0.5).

Of each class: detections of all frames by falling score; one is right if the ground truth box that it overlaps
most, by at least the threshold, has not been found by a better one. Average precision is the area under the curve
of precision over recall, each precision being the best at that recall or above. A class without ground truth has
none, and the mean is over the others. Frames that are excluded, and classes that are not evaluated, do not count.

(activitynet/ActivityNet, Evaluation/get_ava_performance.py; TensorFlow's object_detection/metrics.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IOU = 0.5


@dataclass(frozen=True)
class Boxes:
    """Boxes with one action each; a person with several actions stands there several times. N rows."""

    frames_n: NDArray[Any]  # any name or number of the frame
    boxes_n4: NDArray[np.float64]  # left, top, right, bottom, in any unit
    classes_n: NDArray[np.int64]
    scores_n: NDArray[np.float64]  # 1 for ground truth

    def without(self, excluded: Iterable[Any], classes: Iterable[int]) -> Boxes:
        """Those of `classes`, in frames that are not `excluded`."""
        kept_n = np.isin(self.classes_n, list(classes)) & ~np.isin(self.frames_n, list(excluded))
        return Boxes(
            self.frames_n[kept_n], self.boxes_n4[kept_n], self.classes_n[kept_n], self.scores_n[kept_n]
        )


@dataclass(frozen=True)
class Precision:
    """What an evaluation of boxes says."""

    mean: float | None  # None if no class has ground truth
    of_class: dict[int, float]  # of classes with ground truth


def average_precision(
    truth: Boxes, detected: Boxes, classes: Iterable[int], excluded: Iterable[Any] = (), iou: float = IOU
) -> Precision:
    """Of `classes`, over all frames but the `excluded` ones. Detections with equal scores count in their order."""
    classes, excluded = list(classes), list(excluded)
    truth, detected = truth.without(excluded, classes), detected.without(excluded, classes)
    found = {}
    for number in sorted(set(truth.classes_n.tolist())):
        own, guesses = truth.classes_n == number, detected.classes_n == number
        order = np.argsort(-detected.scores_n[guesses], kind="stable")
        frames, boxes = detected.frames_n[guesses][order], detected.boxes_n4[guesses][order]
        right = _right(frames, boxes, truth.frames_n[own], truth.boxes_n4[own], iou)
        found[number] = _area(right, int(own.sum()))
    return Precision(float(np.mean(list(found.values()))) if found else None, found)


def _right(
    frames: NDArray[Any],
    boxes_n4: NDArray[np.float64],
    true_frames: NDArray[Any],
    true_boxes_m4: NDArray[np.float64],
    iou: float,
) -> NDArray[np.bool_]:
    """Which of one class's detections [N], the best first, are right."""
    right = np.zeros(len(frames), dtype=bool)
    of_frame: dict[Any, list[int]] = {}
    for number, frame in enumerate(frames.tolist()):
        of_frame.setdefault(frame, []).append(number)
    by_frame: dict[Any, list[int]] = {}
    for number, frame in enumerate(true_frames.tolist()):
        by_frame.setdefault(frame, []).append(number)
    for frame, truths in by_frame.items():
        guesses = of_frame.get(frame, [])
        overlaps = overlap(boxes_n4[guesses], true_boxes_m4[truths])
        taken: set[int] = set()
        for guess, row in zip(guesses, overlaps, strict=True):
            best = int(row.argmax())
            if row[best] >= iou and best not in taken:
                right[guess] = True
                taken.add(best)
    return right


def overlap(boxes_n4: NDArray[np.float64], others_m4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union [N, M]; 0 of boxes without an area."""
    low = np.maximum(boxes_n4[:, None, :2], others_m4[None, :, :2])
    high = np.minimum(boxes_n4[:, None, 2:], others_m4[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas_n, areas_m = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_n4, others_m4))
    union = areas_n[:, None] + areas_m[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _area(right: NDArray[np.bool_], truths: int) -> float:
    """Area under the curve of precision over recall, of detections with the best one first."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[right].sum() / truths)  # recall rises by 1 / truths at each right one
