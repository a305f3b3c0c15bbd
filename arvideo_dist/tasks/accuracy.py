"""How well a classifier does, from its scores of every view.

Letters: N videos, V views, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_CELLS = 800  # pixels of the confusion picture's side, at most
_MARGIN = 24


@dataclass(frozen=True)
class Accuracy:
    """Shares of videos. A class without a video has no accuracy (NaN) and no part in the mean over classes."""

    top1: float
    top5: float
    mean_class: float
    by_class: NDArray[np.float64]  # [K]
    videos_by_class: NDArray[np.int64]  # [K]
    confusion: NDArray[np.int64]  # [K, K]: label, first guess


def video_scores(scores_nvk: NDArray[np.float32], videos: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of `videos` over their views that were read [len(videos), K]; a view that was not is NaN.

    Video by video, so that no second copy of the scores is made.
    """
    means = np.empty((len(videos), scores_nvk.shape[2]))
    for row, video in enumerate(videos):
        means[row] = np.nanmean(scores_nvk[video].astype(np.float64), axis=0)
    return means


def accuracy(scores_nk: NDArray[np.float64], labels_n: NDArray[np.int64]) -> Accuracy:
    """Of classes with equal scores the one of the higher number goes first, as in scikit-learn."""
    classes = scores_nk.shape[1]
    order_nk = np.argsort(scores_nk, axis=1, kind="stable")[:, ::-1]
    hits_nk = order_nk == labels_n[:, None]
    first_n = order_nk[:, 0]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels_n, first_n), 1)
    videos = confusion.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_class = np.where(videos > 0, confusion.diagonal() / videos, np.nan)
    return Accuracy(
        top1=float(hits_nk[:, :1].any(axis=1).mean()),
        top5=float(hits_nk[:, :5].any(axis=1).mean()),
        mean_class=float(np.nanmean(by_class)),
        by_class=by_class,
        videos_by_class=videos,
        confusion=confusion,
    )


def worst_classes(found: Accuracy, names: list[str]) -> str:
    """A table, the worst class first: accuracy, number of videos, what it is taken for most often."""
    lines = ["accuracy  videos  class  taken for"]
    for label in np.argsort(found.by_class, kind="stable").tolist():
        if not found.videos_by_class[label]:
            continue
        others = found.confusion[label].copy()
        others[label] = 0
        most = int(others.argmax())
        share = others[most] / found.videos_by_class[label]
        taken = f"{names[most]} ({share:.1%})" if others[most] else "-"
        lines.append(
            f"{found.by_class[label]:8.2%}  {found.videos_by_class[label]:6d}  {names[label]}  {taken}"
        )
    return "\n".join(lines) + "\n"


def confusion_picture(found: Accuracy) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: a row a class, a column a guess, darker for a larger share of the row's videos."""
    shares = found.confusion / np.maximum(found.confusion.sum(axis=1, keepdims=True), 1)
    cell = max(1, _CELLS // len(shares))
    grey = (255 * (1 - np.sqrt(shares))).round().astype(np.uint8)
    cells = Image.fromarray(grey).resize((cell * len(shares),) * 2, Image.Resampling.NEAREST)
    page = Image.new("RGB", (cells.width + _MARGIN, cells.height + _MARGIN), "white")
    page.paste(cells.convert("RGB"), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 6), f"guess, 0 to {len(shares) - 1}", fill="black")
    draw.text((4, _MARGIN + 2), "l\na\nb\ne\nl", fill="black")
    return np.asarray(page)
