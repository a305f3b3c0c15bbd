"""The evaluation of a classifier: scores of every view of every video, and what follows from them.

Letters: B views of a micro batch, N videos, V views of each, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.config.sources import data_sets
from arvideo_dist.data.index import DatasetIndex
from arvideo_dist.data.loader import Batch, ClipSource
from arvideo_dist.data.views import Views
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.tasks.accuracy import accuracy, confusion_picture, video_scores, worst_classes
from arvideo_dist.tasks.classification import build_classifier, check_labels, names_of_classes
from arvideo_dist.tasks.picture import png

SCORES = "scores.parquet"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Summary:
    """What an evaluation has found."""

    metrics: dict[str, float]
    table: pa.Table  # every view's sample, view, label and scores; goes to SCORES
    files: dict[str, bytes]  # by name


class Scoring:
    """A classifier under evaluation."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.views = config, Views.parse(config.evaluation.views)

    @property
    def classes(self) -> int:
        assert self.config.model.classes is not None, "the classifier says how many"
        return self.config.model.classes

    def build(self) -> Classifier:
        return build_classifier(self.config.model, self.classes)

    def source(self) -> ClipSource:
        data = self.config.data
        storage, split = data_sets(data)[0]
        return ClipSource(storage, split, data.stride, sampling=data.sampling, views=self.views)

    def check(self, indexes: Sequence[DatasetIndex]) -> None:
        """ValueError if a video has no label, or one that the classifier does not know."""
        check_labels(indexes, self.classes)

    def score(self, module: Classifier, batch: Batch) -> torch.Tensor:
        """Softmax of each view float32 [B, K], on the device of `batch`."""
        return module(batch.clips).softmax(dim=-1)

    def rows(self, batch: Batch, scores_bk: NDArray[np.float32]) -> pa.Table:
        """A row for each view that could be used: place, label, scores. `batch`: on the host."""
        used = batch.weights.numpy() > 0
        scores = pa.FixedSizeListArray.from_arrays(pa.array(scores_bk[used].ravel()), self.classes)
        places, labels = batch.places.numpy()[used], batch.inputs["label"].numpy()[used]
        return pa.table({"place": places, "label": labels, "scores": scores})

    def summary(self, parts: Iterable[pa.Table], index: DatasetIndex) -> Summary:
        """Of the rows of all views. A video of which no view could be used has no part in it.

        Metrics: shares of videos whose label is the first, or among the first five, of the classes by the mean of
        their views' scores, the mean over classes of the first, and numbers. Files: a table of the classes, the
        confusion matrix as picture. Memory: the scores once, as float32, and one of `parts`.
        """
        scores_nvk, read_nv = self._joined(parts, len(index))
        read = np.flatnonzero(read_nv.any(axis=1))
        metrics, files = {"videos": float(len(read)), "views": float(read_nv.sum())}, dict[str, bytes]()
        if len(read):
            labels = index.table["label"].to_numpy()[read]
            found = accuracy(video_scores(scores_nvk, read), labels)
            metrics |= {"accuracy/top1": found.top1, "accuracy/mean_class": found.mean_class}
            if self.classes > 5:
                metrics["accuracy/top5"] = found.top5
            files["classes.txt"] = worst_classes(
                found, names_of_classes(self.config.data, self.classes)
            ).encode()
            files["confusion.png"] = png(confusion_picture(found))
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Summary(metrics, self._table(scores_nvk, read_nv, index), files)

    def _joined(
        self, parts: Iterable[pa.Table], videos: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Scores [N, V, K], and which of them were read [N, V]; the others are NaN."""
        views = len(self.views)
        scores_pk = np.full((videos * views, self.classes), np.nan, dtype=np.float32)
        read_p = np.zeros(videos * views, dtype=bool)
        for part in parts:
            for rows in part.to_batches():
                places = rows["place"].to_numpy()
                assert not read_p[places].any(), "each view is scored once"
                scores_pk[places] = rows["scores"].flatten().to_numpy().reshape(-1, self.classes)
                read_p[places] = True
        return scores_pk.reshape(videos, views, self.classes), read_p.reshape(videos, views)

    def _table(
        self, scores_nvk: NDArray[np.float32], read_nv: NDArray[np.bool_], index: DatasetIndex
    ) -> pa.Table:
        """On the memory of `scores_nvk`, whose rows that were not read give way to those that were."""
        samples, views = np.nonzero(read_nv)
        flat_pk, places = scores_nvk.reshape(-1, self.classes), np.flatnonzero(read_nv)
        if len(places) < len(flat_pk):
            for first in range(0, len(places), _ROWS_AT_ONCE):
                chosen = places[first : first + _ROWS_AT_ONCE]
                flat_pk[first : first + len(chosen)] = flat_pk[chosen]
        scores = pa.array(flat_pk[: len(places)].reshape(-1))
        return pa.table(
            {
                "key": index.table["key"].take(pa.array(samples)),
                "view": pa.array(views.astype(np.int32)),
                "label": pa.array(index.table["label"].to_numpy()[samples]),
                "scores": pa.FixedSizeListArray.from_arrays(scores, self.classes),
            }
        )
