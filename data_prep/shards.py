"""From finished videos to files: a tar and a record for each slice, and tables of their rows.

A slice is the fixed run of inputs that one shard is made from. Its record says what became of each of them
and is written after the shard, so a slice is either done or not begun, whenever the program ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from arvideo_dist.data.index import FileEntry, ShardEntry, shard_name
from arvideo_dist.storage import Storage

_READERS = 16  # of records at a time: a store answers each after some tens of milliseconds
_BATCH_ROWS = 2**16
RETRIED_MANIFEST = "base-manifest.json"  # in the progress folder: of the split whose rejects are retried


class Sample(BaseModel):
    """A finished video before it has a place in a shard."""

    key: str
    size: int
    sha256: str
    width: int
    height: int
    fps: float
    frames: int
    duration: float
    label: int
    label_name: str | None
    source: str
    extra: dict[str, Any] = {}

    def json_member(self) -> bytes:
        """The sample's `<key>.json`."""
        fields = self.model_dump(exclude={"size", "sha256", "extra"}) | self.extra
        return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


@dataclass(frozen=True)
class Outcome:
    """What became of one input: a sample with its video, or a reason."""

    source: str
    reason: str | None = None
    sample: Sample | None = None
    video: Path | bytes | None = None


class SliceRecord(BaseModel):
    """`progress-<split>/slice-<number>.json`."""

    shard: ShardEntry | None  # none if every input of the slice was rejected
    rows: list[dict[str, Any]]  # of the index
    rejects: list[tuple[str, str]]


def progress_folder(split: str) -> str:
    return f"progress-{split}"


def labels_name(split: str) -> str:
    """Label names, one a line in the order of their numbers."""
    return f"labels-{split}.txt"


def record_name(split: str, number: int) -> str:
    return f"{progress_folder(split)}/slice-{number:06d}.json"


def write_slice(storage: Storage, split: str, number: int, outcomes: Iterable[Outcome]) -> SliceRecord:
    """Publish slice `number`: its shard, then its record. Videos are read one at a time."""
    from webdataset import TarWriter  # imports torch: seconds that `--help` and errors need not wait

    rows: list[dict[str, Any]] = []
    rejects: list[tuple[str, str]] = []
    name = shard_name(split, number)
    shard = None
    with storage.writing(name) as aside:
        with TarWriter(str(aside), user="root", group="root", mode=0o644, mtime=0, encoder=False) as writer:
            for outcome in outcomes:
                if outcome.sample is None or outcome.video is None:
                    rejects.append((outcome.source, outcome.reason or "no reason"))
                    continue
                sample = outcome.sample
                video = outcome.video if isinstance(outcome.video, bytes) else outcome.video.read_bytes()
                assert len(video) == sample.size, f"{sample.source}: staged video changed"
                writer.write({"__key__": sample.key, "json": sample.json_member(), "mp4": video})
                # Members go in sorted order, so the video is the last thing written, padded to 512 bytes.
                offset = writer.tarstream.offset - -(-sample.size // 512) * 512
                rows.append(sample.model_dump(exclude={"extra"}) | {"shard": name, "offset": offset})
        if rows:
            with open(aside, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shard = ShardEntry(name=name, size=aside.stat().st_size, sha256=digest, samples=len(rows))
        else:
            aside.unlink()  # nothing to publish
    record = SliceRecord(shard=shard, rows=rows, rejects=rejects)
    storage.write_bytes(record_name(split, number), record.model_dump_json().encode())
    return record


def finished_slices(storage: Storage, split: str, numbers: range) -> Iterator[tuple[int, SliceRecord]]:
    """The slices among `numbers` that have a record and whose shard is there in the size that it states.

    Two listings say what is there; the records are read some at a time.
    """
    noted, sizes = storage.sizes(progress_folder(split)), storage.sizes()
    names = {number: record_name(split, number) for number in numbers}
    begun = [number for number in numbers if names[number].rpartition("/")[2] in noted]
    with ThreadPoolExecutor(_READERS) as threads:
        for first in range(0, len(begun), 4 * _READERS):
            batch = begun[first : first + 4 * _READERS]
            contents = threads.map(lambda number: storage.read_bytes(names[number]), batch)
            for number, content in zip(batch, contents, strict=True):
                record = SliceRecord.model_validate_json(content)
                if record.shard is None or sizes.get(record.shard.name) == record.shard.size:
                    yield number, record


def clear_progress(storage: Storage, split: str) -> None:
    """Remove what a run that has ended noted on its way.

    A retry is in progress while its manifest stands there: that goes first, so a folder of which only a part
    was removed is never taken for a retry again.
    """
    storage.delete(f"{progress_folder(split)}/{RETRIED_MANIFEST}")
    storage.delete(progress_folder(split))


def read_table(storage: Storage, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet member of the storage, or some columns of it.

    By one thread: the readers that `pq.read_table` starts may still hold the bytes, a Python object, while the
    interpreter ends, which aborts the process (github.com/apache/arrow/issues/34314).
    """
    with _opened(storage, name) as file:
        return file.read(columns, use_threads=False)


def table_batches(storage: Storage, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The same, some rows at a time."""
    with _opened(storage, name) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])


@contextlib.contextmanager
def _opened(storage: Storage, name: str) -> Iterator[pq.ParquetFile]:
    with (
        tempfile.TemporaryDirectory() as scratch,
        pq.ParquetFile(storage.local_copy(name, Path(scratch)), memory_map=True, pre_buffer=False) as file,
    ):
        yield file


def write_table(storage: Storage, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> FileEntry:
    """Publish the rows of `tables` as a Parquet member, holding some thousands of them at a time."""
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch) / name
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            waiting = [schema.empty_table()]
            for table in tables:
                waiting.append(table)
                if sum(each.num_rows for each in waiting) >= _BATCH_ROWS:
                    writer.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
        with open(aside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        storage.put_file(aside, name)
        return FileEntry(name=name, size=aside.stat().st_size, sha256=digest)
