"""Seconds and memory of the sample order at a hundred million samples, the index look-up included."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from arvideo_dist.data.index import INDEX_SCHEMA, DatasetIndex, shard_name
from arvideo_dist.data.order import SampleOrder, SampleSequence

SHARD_SAMPLES = 1000
_ROWS_ON_DISK = 10**6


def run(samples: int, seeks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """For a full shuffle and for blocks of 16 shards: seconds until the first sample of an epoch is located,
    the slowest of `seeks` random positions (each in another epoch), and the memory that it took.

    The index is a real memory-mapped one of 10^6 rows; its pieces stand in a table of `samples` rows many times.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        index = large_index(Path(folder), samples)
        for name, block in (("full", None), ("blocks of 16 shards", 16)):
            process = psutil.Process()
            before = process.memory_full_info().uss
            began = time.perf_counter()
            sizes = None if block is None else [SHARD_SAMPLES] * (samples // SHARD_SAMPLES)
            order = SampleOrder(samples, seed=0, shard_sizes=sizes, block_shards=block)
            sequence = SampleSequence([order], seed=0)
            look_up(sequence, index, 0)
            construct = time.perf_counter() - began
            slowest = 0.0
            for place in np.random.default_rng(0).integers(100 * samples, size=seeks).tolist():
                began = time.perf_counter()
                look_up(sequence, index, place)
                slowest = max(slowest, time.perf_counter() - began)
            memory = process.memory_full_info().uss - before
            result[name] = {
                "construct_s": construct,
                "slowest_seek_s": slowest,
                "memory_mb": memory / 1e6,
            }
            say(f"{name}: construct {construct:.3f} s, seek {slowest:.3f} s, {memory / 1e6:.1f} MB")
    return result


def look_up(sequence: SampleSequence, index: DatasetIndex, place: int) -> tuple[str, int, int]:
    """(shard, offset, size) of what stands at `place`."""
    row = index[sequence.locate([place])[0].row]
    return row.shard, row.offset, row.size


def large_index(folder: Path, samples: int) -> DatasetIndex:
    rows = min(samples, _ROWS_ON_DISK)
    numbers = np.arange(rows)
    columns = {
        "key": pa.array(numbers).cast(pa.string()),
        "shard": pa.array([shard_name("train", n) for n in range(rows // SHARD_SAMPLES)]).take(
            pa.array(numbers // SHARD_SAMPLES)
        ),
        "offset": pa.array(numbers % SHARD_SAMPLES * 900_000),
        "size": pa.array(np.full(rows, 887_000)),
        "sha256": pa.array(["0" * 64]).take(pa.array(np.zeros(rows, dtype=np.int64))),
    }
    for field in INDEX_SCHEMA:
        if field.name not in columns:
            empty = pa.nulls(rows, field.type)
            columns[field.name] = empty if pa.types.is_string(field.type) else empty.fill_null(1)
    table = pa.table(columns, schema=None).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    path = folder / "index.arrow"
    with pa.ipc.new_file(str(path), INDEX_SCHEMA) as writer:
        writer.write_table(table, max_chunksize=2**17)
    index = DatasetIndex(path)
    index.table = pa.concat_tables([index.table] * (samples // rows))
    return index
