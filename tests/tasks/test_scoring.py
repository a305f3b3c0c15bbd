"""What an evaluation makes of its rows: a table in the order of the samples, in the memory of one copy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.data.index import DatasetIndex, open_index
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.scoring import Scoring
from tests.data.conftest import write_dataset

VIDEOS, VIEWS, CLASSES, PARTS = 1600, 15, 100, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    videos = [b""] * VIDEOS
    return write_dataset(tmp_path_factory.mktemp("scoring") / "data", videos, [8] * VIDEOS, "val", VIDEOS)


@pytest.fixture(scope="module")
def index(data: Storage) -> DatasetIndex:
    index = open_index(data, "val")
    labels = pa.array(np.arange(VIDEOS) % CLASSES)
    index.table = index.table.set_column(index.table.schema.get_field_index("label"), "label", labels)
    return index


def scoring(data: Storage) -> Scoring:
    given = {"model": {"classes": CLASSES}, "data": {"path": data.uri}, "evaluation": {"views": "5x3"}}
    return Scoring(EvaluateConfig.model_validate(given))


def score_of(places: np.ndarray) -> np.ndarray:
    """Of view `place`, class k: unlike any other's."""
    return (places[:, None] + np.arange(CLASSES) / CLASSES).astype(np.float32)


def parts(read: np.ndarray) -> Iterator[pa.Table]:
    """Rows of the places `read`, in an order that is not theirs."""
    for places in np.array_split(np.random.default_rng(0).permutation(read), PARTS):
        scores = pa.FixedSizeListArray.from_arrays(pa.array(score_of(places).ravel()), CLASSES)
        labels = pa.array(places // VIEWS % CLASSES)
        yield pa.table({"place": pa.array(places), "label": labels, "scores": scores})


@pytest.mark.parametrize("bad", [0, 5, 1])
def test_each_view_that_was_read_has_its_row_in_the_order_of_samples_and_views(
    data: Storage, index: DatasetIndex, bad: int
) -> None:
    """None is missing, some of many videos, or all but a few."""
    read = np.arange(VIDEOS * VIEWS)
    if bad:
        read = read[read % 7 >= bad] if bad > 1 else read[VIEWS * 3 - 2 : VIEWS * 5]
    summary = scoring(data).summary(parts(read), index)
    keys = index.table["key"].to_pylist()
    assert summary.table["key"].to_pylist() == [keys[place // VIEWS] for place in read]
    assert (summary.table["view"].to_numpy() == read % VIEWS).all()
    assert (summary.table["label"].to_numpy() == read // VIEWS % CLASSES).all()
    found = summary.table["scores"].combine_chunks().flatten().to_numpy().reshape(-1, CLASSES)
    assert (found == score_of(read)).all()
    assert summary.metrics["views"] == len(read)
    assert summary.metrics["videos"] == len(set(read // VIEWS))


def test_a_view_is_not_scored_twice(data: Storage, index: DatasetIndex) -> None:
    read = np.arange(VIDEOS * VIEWS)
    with pytest.raises(AssertionError, match="each view is scored once"):
        scoring(data).summary([*parts(read), *parts(read[:1])], index)


def test_the_scores_are_held_once(data: Storage, index: DatasetIndex) -> None:
    """Beside them one part, and the means over the views with their order: together less than another copy."""
    read, size = np.arange(VIDEOS * VIEWS), VIDEOS * VIEWS * CLASSES * 4
    task, before = scoring(data), pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        task.summary(parts(read), index)
        of_python, of_arrow = tracemalloc.get_traced_memory()[1], pool.max_memory() or 0
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert size <= of_python + of_arrow < 1.7 * size
