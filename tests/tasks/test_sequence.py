"""Rows of several ranks and saves in the order of their places, while no more of them are read than overlap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from arvideo_dist.tasks.sequence import in_order

RANKS, SAVES, BATCHES, BATCH = 3, 4, 5, 2  # of each rank in each save; places of a batch
PLACES = SAVES * BATCHES * RANKS * BATCH


def parts(missing: set[int], read: list[int]) -> Iterator[pa.Table]:
    """A part of each rank at each save, by their first places; `read` gets the number of the save of each that is
    read."""
    dealt = np.arange(PLACES).reshape(SAVES, BATCHES, RANKS, BATCH)
    for save in range(SAVES):
        for rank in range(RANKS):
            places = [place for place in dealt[save, :, rank].ravel().tolist() if place not in missing]
            read.append(save)
            values = pa.array(np.repeat(places, 2).astype(np.float32))
            yield pa.table({"place": places, "values": pa.FixedSizeListArray.from_arrays(values, 2)})


@pytest.mark.parametrize("missing", [set(), {0, 7, 8, 9, 50, 119}, set(range(30)), set(range(PLACES))])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_rows_come_in_their_order_in_tables_of_one_size(missing: set[int], rows: int) -> None:
    tables = list(in_order(parts(missing, []), rows))
    expected = [place for place in range(PLACES) if place not in missing]
    assert [place for table in tables for place in table["place"].to_pylist()] == expected
    assert all(len(table) == rows for table in tables[:-1])
    for table in tables:
        values = table["values"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
        assert (values == table["place"].to_numpy()[:, None]).all()


def test_no_part_is_read_before_those_of_the_save_before_are_written() -> None:
    read: list[int] = []
    of_a_save = PLACES // SAVES
    for number, _ in enumerate(in_order(parts(set(), read), 1)):
        assert read[-1] <= number // of_a_save + 1
