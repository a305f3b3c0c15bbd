"""What became of a run's inputs, slice by slice: in a temporary database on disk until the split is published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from arvideo_dist.data.index import INDEX_SCHEMA, REJECTS_SCHEMA, ShardEntry
from data_prep.shards import SliceRecord
from data_prep.table import temporary_database

_BATCH_ROWS = 2**16


class Ledger:
    """Records by the numbers of their slices; only counts of them are in memory."""

    def __init__(self) -> None:
        self.samples = self.rejects = 0
        self._base = temporary_database()
        self._base.execute("create table slices (number integer primary key, rows blob, shard text)")
        self._base.execute("create table rejects (source text, reason text)")
        self._done: set[int] = set()

    def __contains__(self, number: int) -> bool:
        return number in self._done

    def add(self, number: int, record: SliceRecord) -> None:
        """Keep what became of slice `number`."""
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        table = pa.Table.from_pylist(record.rows, INDEX_SCHEMA)
        with pa.ipc.new_stream(sink, INDEX_SCHEMA, options=options) as writer:
            writer.write_table(table)
        shard = record.shard.model_dump_json() if record.shard else None
        rows = sink.getvalue().to_pybytes()
        self._base.execute("insert into slices values (?, ?, ?)", (number, rows, shard))
        self.refuse(record.rejects)
        self._done.add(number)
        self.samples += len(record.rows)

    def refuse(self, rejects: Iterable[tuple[str, str]]) -> None:
        """Keep rejects that are of no slice."""
        self._base.execute("begin")
        self._base.executemany("insert into rejects values (?, ?)", rejects)
        self._base.execute("commit")
        (self.rejects,) = self._base.execute("select count(*) from rejects").fetchone()

    def index(self) -> Iterator[pa.Table]:
        """Rows of the index, a slice at a time, in the slices' order."""
        for (rows,) in self._base.execute("select rows from slices order by number"):
            with pa.ipc.open_stream(rows) as reader:
                yield reader.read_all()

    def shards(self) -> Iterator[ShardEntry]:
        for (shard,) in self._base.execute(
            "select shard from slices where shard is not null order by number"
        ):
            yield ShardEntry.model_validate_json(shard)

    def rejected(self) -> Iterator[pa.Table]:
        """All rejects by their sources' names."""
        rows = self._base.execute("select source, reason from rejects order by source, rowid")
        while batch := rows.fetchmany(_BATCH_ROWS):
            columns = zip(*batch, strict=True)
            yield pa.table([pa.array(column, pa.string()) for column in columns], REJECTS_SCHEMA)
