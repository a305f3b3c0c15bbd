"""The evaluation of a classifier: scores of every view of every video, and what follows from them.

Letters: B views of a micro batch, N videos, V views of each, K classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.data.index import DatasetIndex
from arvideo_dist.data.loader import Batch
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.storage import shown
from arvideo_dist.tasks.accuracy import accuracy, confusion_picture, video_scores, worst_classes
from arvideo_dist.tasks.activations import forward_activation_bytes
from arvideo_dist.tasks.classification import build_classifier, check_labels, names_of_classes
from arvideo_dist.tasks.flops import classifier_forward_flops
from arvideo_dist.tasks.picture import png
from arvideo_dist.tasks.sequence import Readers, SequenceTask, Summary, Write, used_places
from arvideo_dist.tasks.task import Costs

SCORES = "scores.parquet"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Scored(Summary):
    """What an evaluation has found."""

    table: pa.Table  # every view's sample, view, label and scores; goes to SCORES


class Scoring(SequenceTask[EvaluateConfig]):
    """A classifier under evaluation."""

    parts_folder = "scores"

    @property
    def classes(self) -> int:
        assert self.config.model.classes is not None, "the classifier says how many"
        return self.config.model.classes

    def costs(self) -> Costs:
        model = self.config.model
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self.build().parameters())
        return Costs(
            parameters=parameters,
            flops_per_clip=classifier_forward_flops(model, self.classes),
            activation_bytes_per_clip=forward_activation_bytes(model),
            activation_bytes_per_pass=0,
            encoder_tokens=math.prod(model.token_grid),
        )

    def build(self) -> Classifier:
        return build_classifier(self.config.model, self.classes)

    def load(self, module: nn.Module, readers: Readers) -> None:
        source = self.config.model.init_from or ""
        weights, own = readers.classifier(source), module.state_dict()
        differing = sorted(
            name
            for name in weights.keys() | own.keys()
            if name not in weights or name not in own or weights[name].shape != own[name].shape
        )
        if differing:
            raise ValueError(
                f"{shown(source)} holds another classifier; parameters that differ: {differing[:5]}"
            )
        module.load_state_dict(weights)

    def check(self, indexes: Sequence[DatasetIndex]) -> None:
        """ValueError if a video has no label, or one that the classifier does not know."""
        check_labels(indexes, self.classes)

    def compute(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Softmax of each view float32 [B, K], on the device of `batch`."""
        scores_bk: torch.Tensor = module(batch.clips).softmax(dim=-1)
        return scores_bk

    def rows(self, batch: Batch, values: NDArray[np.float32]) -> pa.Table:
        """A row for each view that could be used: place, label, scores."""
        used, places = used_places(batch)
        scores = pa.FixedSizeListArray.from_arrays(pa.array(values[used].ravel()), self.classes)
        return pa.table({"place": places, "label": batch.inputs["label"].numpy()[used], "scores": scores})

    def finish(self, parts: Iterable[pa.Table], index: DatasetIndex, write: Write) -> Summary:
        found = self.summary(parts, index)
        write(SCORES, functools.partial(pq.write_table, found.table))
        return found

    def result_lines(self, metrics: Mapping[str, float], folder: str) -> list[str]:
        lines = [f"scores      {folder}/{SCORES}"]
        if "accuracy/top1" in metrics:
            lines += [f"classes     {folder}/classes.txt", f"confusion   {folder}/confusion.png"]
            shares = [
                f"{title} {metrics[name]:.2%}"
                for title, name in (
                    ("top-1", "accuracy/top1"),
                    ("top-5", "accuracy/top5"),
                    ("mean over classes", "accuracy/mean_class"),
                )
                if name in metrics
            ]
            lines.append(f"accuracy    {', '.join(shares)} of {metrics['videos']:.0f} videos")
        return lines

    def summary(self, parts: Iterable[pa.Table], index: DatasetIndex) -> Scored:
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
        return Scored(metrics, files, self._table(scores_nvk, read_nv, index))

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
