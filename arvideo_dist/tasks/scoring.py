"""The evaluation of a classifier: scores of every view of every video, and what follows from them.

Letters: B views of a micro batch, N videos, V views of each, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


@dataclass(frozen=True)
class Summary:
    """What an evaluation has found."""

    metrics: dict[str, float]
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

    def no_rows(self) -> pa.Table:
        """What `rows` gives of a batch in which nothing could be used."""
        scores = pa.list_(pa.float32(), self.classes)
        return pa.schema([("place", pa.int64()), ("label", pa.int64()), ("scores", scores)]).empty_table()

    def summary(self, rows: pa.Table, index: DatasetIndex) -> Summary:
        """Of the rows of all views. A video of which no view could be used has no part in it.

        Metrics: shares of videos whose label is the first, or among the first five, of the classes by the mean of
        their views' scores, the mean over classes of the first, and numbers. Files: every view's scores with
        sample and view, a table of the classes, the confusion matrix as picture.
        """
        rows = rows.sort_by("place")
        places = rows["place"].to_numpy()
        assert len(np.unique(places)) == len(places), "each view is scored once"
        samples, views = np.divmod(places, len(self.views))
        flat = rows["scores"].combine_chunks().values.to_numpy()
        scores_nvk = np.full((len(index), len(self.views), self.classes), np.nan, dtype=np.float32)
        scores_nvk[samples, views] = flat.reshape(-1, self.classes)
        read = np.unique(samples)
        metrics = {"videos": float(len(read)), "views": float(len(places))}
        files = {SCORES: self._table(rows, samples, views, index)}
        if len(read):
            labels = index.table["label"].to_numpy()[read]
            found = accuracy(video_scores(scores_nvk[read]), labels)
            metrics |= {"accuracy/top1": found.top1, "accuracy/mean_class": found.mean_class}
            if self.classes > 5:
                metrics["accuracy/top5"] = found.top5
            files["classes.txt"] = worst_classes(
                found, names_of_classes(self.config.data, self.classes)
            ).encode()
            files["confusion.png"] = png(confusion_picture(found))
        return Summary({name: value for name, value in metrics.items() if math.isfinite(value)}, files)

    def _table(
        self, rows: pa.Table, samples: NDArray[Any], views: NDArray[Any], index: DatasetIndex
    ) -> bytes:
        columns = {
            "key": index.table["key"].take(pa.array(samples)),
            "view": pa.array(views.astype(np.int32)),
            "label": rows["label"],
            "scores": rows["scores"],
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue().to_pybytes()
