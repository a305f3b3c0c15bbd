"""From finished videos to published files: a tar and a record for each slice, then the index and manifest.

A slice is the fixed run of inputs that one shard is made from. Its record says what became of each of them
and is written after the shard, so a slice is either done or not begun, whenever the program ends.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from arvideo_dist.data.index import (
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    DatasetManifest,
    FileEntry,
    ShardEntry,
    index_name,
    manifest_name,
    rejects_name,
    shard_name,
)
from arvideo_dist.storage import Storage

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

    shard: ShardEntry | None  # none where every input of the slice was rejected
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


@dataclass(frozen=True)
class Part:
    """Some of the split's rows, as tables: index rows are all that grows with the number of videos."""

    index: pa.Table
    rejects: pa.Table
    shards: list[ShardEntry]

    @classmethod
    def of(cls, record: SliceRecord) -> Part:
        rejects = {
            "source": [source for source, _ in record.rejects],
            "reason": [reason for _, reason in record.rejects],
        }
        return cls(
            pa.Table.from_pylist(record.rows, INDEX_SCHEMA),
            pa.table(rejects, REJECTS_SCHEMA),
            [record.shard] if record.shard else [],
        )


def finished_parts(storage: Storage, split: str, numbers: range) -> dict[int, Part]:
    """The slices among `numbers` that have a record and whose shard is there in the size that it states."""
    names = set(storage.names(progress_folder(split)))
    parts = {}
    for number in numbers:
        name = record_name(split, number)
        if name.rpartition("/")[2] not in names:
            continue
        record = SliceRecord.model_validate_json(storage.read_bytes(name))
        shard = record.shard
        if shard is None or (storage.exists(shard.name) and storage.size(shard.name) == shard.size):
            parts[number] = Part.of(record)
    return parts


def publish(
    storage: Storage,
    split: str,
    parts: list[Part],
    labels: list[str],
    settings: dict[str, Any],
    fingerprint: str,
) -> DatasetManifest:
    """Write index, rejects and label names, then the manifest that makes the split exist."""
    index = pa.concat_tables(part.index for part in parts)
    rejects = pa.concat_tables(part.rejects for part in parts).sort_by([("source", "ascending")])
    if labels:
        storage.write_bytes(labels_name(split), "".join(f"{label}\n" for label in labels).encode())
    manifest = DatasetManifest(
        split=split,
        samples=index.num_rows,
        rejects=rejects.num_rows,
        labels=labels,
        settings=settings,
        fingerprint=fingerprint,
        index=_write_table(storage, index_name(split), index),
        rejects_file=_write_table(storage, rejects_name(split), rejects),
        shards=[shard for part in parts for shard in part.shards],
    )
    storage.write_bytes(manifest_name(split), manifest.model_dump_json(indent=1).encode())
    clear_progress(storage, split)
    return manifest


def clear_progress(storage: Storage, split: str) -> None:
    """Remove what a run that has ended noted on its way.

    A retry is in progress while its manifest stands there: that goes first, so a folder of which only a part
    was removed is never taken for a retry again.
    """
    storage.delete(f"{progress_folder(split)}/{RETRIED_MANIFEST}")
    storage.delete(progress_folder(split))


def read_table(storage: Storage, name: str) -> pa.Table:
    """A Parquet member of the storage.

    By one thread: the readers that `pq.read_table` starts may still hold the bytes, a Python object, while the
    interpreter ends, which aborts the process (github.com/apache/arrow/issues/34314).
    """
    with pq.ParquetFile(pa.BufferReader(storage.read_bytes(name))) as file:
        return file.read(use_threads=False)


def _write_table(storage: Storage, name: str, table: pa.Table) -> FileEntry:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    storage.write_bytes(name, data)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
