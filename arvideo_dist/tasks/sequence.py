"""What is computed over a sequence of (video, view) places without updates, behind one interface.

How such a run lives (`train/sequence.py`) knows no task. Place p is view p % V of the split's video p // V, in the
order of the index. Letters: B views of a micro batch, V views of each video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from arvideo_dist.config.commands import SequenceConfig
from arvideo_dist.config.sources import data_sets
from arvideo_dist.data.index import DatasetIndex
from arvideo_dist.data.loader import Batch, ClipSource
from arvideo_dist.data.views import Views
from arvideo_dist.tasks.task import Costs, ReadWeights

Config = TypeVar("Config", bound=SequenceConfig)

# Publishes a file by name; fills a local path with its content, again if the storage fails.
Write = Callable[[str, Callable[[Path], None]], None]


class Readers(NamedTuple):
    """All weights of what stands at a file, folder, run or checkpoint."""

    encoder: ReadWeights  # by the names of `model.vit.Encoder`
    classifier: ReadWeights  # by the names of `model.classifier.Classifier`


@dataclass(frozen=True)
class Summary:
    """What a finished sequence has found."""

    metrics: dict[str, float]
    files: dict[str, bytes]  # small ones by name, for the run's folder and MLflow


class SequenceTask(ABC, Generic[Config]):
    """A task of one configuration. Its methods keep nothing, so a task is the same on every rank."""

    parts_folder: ClassVar[str]  # of the run, for the rows until all are there

    def __init__(self, config: Config) -> None:
        self.config, self.views = config, Views.parse(config.sequence.views)

    @abstractmethod
    def costs(self) -> Costs:
        """Of the forward pass of a view alone."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The module, before it has its weights."""

    @abstractmethod
    def load(self, module: nn.Module, readers: Readers) -> None:
        """Fill `module`. Raises ValueError if the weights cannot be read or do not fit."""

    def source(self) -> ClipSource:
        """The videos and their views. Raises ValueError if the path is not set or cannot be opened."""
        data = self.config.data
        storage, split = data_sets(data)[0]
        return ClipSource(storage, split, data.stride, sampling=data.sampling, views=self.views)

    def check(self, indexes: Sequence[DatasetIndex]) -> None:
        """ValueError if the task cannot use these videos."""

    @abstractmethod
    def compute(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """What the module makes of each view [B, ...], on the device of `batch`."""

    @abstractmethod
    def rows(self, batch: Batch, values: NDArray[np.float32]) -> pa.Table:
        """A row for each view that could be used, in the order of the batch: `place`, and what is kept of it.

        `batch`: on the host; `values`: what `compute` gave.
        """

    @abstractmethod
    def finish(self, parts: Iterable[pa.Table], index: DatasetIndex, write: Write) -> Summary:
        """Write what follows from the rows of all views.

        `parts`: tables of rows in the order of their first places, each sorted by place; may be gone through again.
        """

    @abstractmethod
    def result_lines(self, metrics: Mapping[str, float], folder: str) -> list[str]:
        """What the run has left and found, for a person, at its end. `folder`: the run's."""


def used_places(batch: Batch) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which views of a batch on the host could be used [B], and the places of these."""
    used = batch.weights.numpy() > 0
    return used, batch.places.numpy()[used]


def in_order(parts: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of `parts` in the order of their places, `rows` at a time, the last ones fewer.

    `parts`: as `SequenceTask.finish` has them. In memory is what overlaps: the rows of one save.
    """
    waiting: pa.Table | None = None
    for part in parts:
        if not len(part):
            continue
        if waiting is not None:
            # No later part has a place before this one's first.
            complete = np.searchsorted(waiting["place"].to_numpy(), part["place"][0].as_py())
            whole = int(complete) // rows * rows
            yield from (waiting.slice(begin, rows) for begin in range(0, whole, rows))
            part = _sorted(pa.concat_tables([waiting.slice(whole), part]))
        waiting = part
    if waiting is not None:
        yield from (waiting.slice(begin, rows) for begin in range(0, len(waiting), rows))


def _sorted(rows: pa.Table) -> pa.Table:
    places = rows["place"].to_numpy()
    if (np.diff(places) > 0).all():
        return rows
    order = np.argsort(places)
    assert (np.diff(places[order]) > 0).all(), "each view is computed once"
    return rows.take(pa.array(order))
