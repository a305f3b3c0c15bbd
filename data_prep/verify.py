"""`python -m data_prep verify OUT`: read a finished split again, all of it, and say what is not as promised."""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import av
import pyarrow as pa
import pyarrow.compute as pc

from arvideo_dist.data.index import (
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    DatasetManifest,
    FileEntry,
    ShardEntry,
    load_manifest,
)
from arvideo_dist.storage import Storage, lasts, patiently
from data_prep.prepare import fingerprint
from data_prep.probe import slice_is_reference
from data_prep.shards import read_table

_JSON_FIELDS = ("key", "width", "height", "fps", "frames", "duration", "label", "label_name", "source")

_Picture = tuple[tuple[int, ...], bytes]  # shape and digest of the YUV planes


@dataclass
class Report:
    """What was read of one split, and every promise that does not hold."""

    split: str
    shards: int = 0
    samples: int = 0
    decoded: int = 0
    problems: list[str] = field(default_factory=list)


def verify(storage: Storage, split: str, decode: int | None, workers: int) -> Report:
    """Check manifest, index, rejects, and each shard byte for byte; decode `decode` samples, or all (None).

    Raises ValueError if the split does not exist.
    """
    manifest = load_manifest(storage, split)
    report = Report(split)
    if fingerprint(manifest.settings) != manifest.fingerprint:
        report.problems.append("manifest: the fingerprint is not that of its settings")
    index = _checked_index(storage, manifest, report)
    chosen = None if decode is None else _spread(index["key"], decode)
    by_shard = _by_shard(index)
    names = {shard.name for shard in manifest.shards}
    for name in sorted(by_shard.keys() - names, key=str):
        rows = sum(run.num_rows for run in by_shard[name])
        report.problems.append(f"index: {rows} row(s) are in {name}, which the manifest does not name")
    droppable = manifest.settings.get("transcode", {}).get("bframes", 0) > 0
    with ThreadPoolExecutor(workers) as threads:
        futures = [
            threads.submit(
                patiently,  # a shard that the storage stops giving on the way is read again from its start
                partial(_check_shard, storage, shard, by_shard.get(shard.name, []), chosen, droppable),
                is_answer=lasts,
            )
            for shard in manifest.shards
        ]
        for future in futures:
            part = future.result()
            report.shards += 1
            report.samples += part.samples
            report.decoded += part.decoded
            report.problems += part.problems
    for name in storage.names():
        if name.startswith(f"{split}-") and name.endswith(".tar") and name not in names:
            report.problems.append(f"{name}: the manifest does not name this shard")
    return report


def _checked_index(storage: Storage, manifest: DatasetManifest, report: Report) -> pa.Table:
    """The index; without rows if it cannot be relied on."""

    def checked(entry: FileEntry) -> bool:
        if not storage.exists(entry.name):
            report.problems.append(f"{entry.name}: missing")
        elif (storage.size(entry.name), storage.sha256(entry.name)) != (entry.size, entry.sha256):
            report.problems.append(f"{entry.name}: size or checksum differ from the manifest's")
        else:
            return True
        return False

    if checked(manifest.rejects_file):
        rejects = read_table(storage, manifest.rejects_file.name)
        if not rejects.schema.equals(REJECTS_SCHEMA) or rejects.num_rows != manifest.rejects:
            report.problems.append(f"{manifest.rejects_file.name}: other columns or rows than promised")
    if not checked(manifest.index):
        return INDEX_SCHEMA.empty_table()
    index = read_table(storage, manifest.index.name)
    if not index.schema.equals(INDEX_SCHEMA) or index.num_rows != manifest.samples:
        report.problems.append(f"{manifest.index.name}: other columns or rows than promised")
    if not index.schema.equals(INDEX_SCHEMA):
        return INDEX_SCHEMA.empty_table()
    if pc.count_distinct(index["key"]).as_py() != index.num_rows:
        report.problems.append(f"{manifest.index.name}: a key appears twice")
    return index


def _spread(keys: pa.ChunkedArray, count: int) -> set[str]:
    """`count` keys drawn by their hash: the same ones each time, from all over the split."""
    drawn = (str(key) for key in keys)
    return set(heapq.nsmallest(count, drawn, key=lambda key: hashlib.sha256(key.encode()).digest()))


def _by_shard(index: pa.Table) -> dict[str, list[pa.Table]]:
    """Views of the runs of rows that stand in one shard."""
    runs: dict[str, list[pa.Table]] = {}
    place = 0
    for chunk in index["shard"].chunks:
        encoded = pc.run_end_encode(chunk)
        ends = encoded.run_ends.to_pylist()
        for name, begin, end in zip(encoded.values.to_pylist(), [0, *ends], ends, strict=False):
            runs.setdefault(name, []).append(index.slice(place + begin, end - begin))
        place += len(chunk)
    return runs


class _Hashed(io.RawIOBase):
    """A stream that keeps the digest and size of what was read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size) if size >= 0 else self._stream.read()
        self.digest.update(data)
        self.size += len(data)
        return data


def _check_shard(
    storage: Storage, shard: ShardEntry, runs: list[pa.Table], chosen: set[str] | None, droppable: bool
) -> Report:
    """One pass over a shard: digest, members against rows, and the chosen samples decoded, all if None."""
    report = Report(shard.name)
    rows = [row for run in runs for row in run.to_pylist()]
    expected = {row["key"]: row for row in rows}
    if not storage.exists(shard.name):
        report.problems.append(f"{shard.name}: missing")
        return report
    with storage.fs.open_input_stream(storage.path(shard.name), compression=None) as raw:
        stream = _Hashed(raw)
        try:
            for key, video, offset, described in _samples(stream):
                row = expected.pop(key, None)
                if row is None:
                    report.problems.append(f"{shard.name}: {key} is not in the index, or twice in the shard")
                    continue
                report.samples += 1
                decode = chosen is None or key in chosen
                found = _check_sample(row, video, offset, described, decode, droppable)
                report.decoded += decode
                report.problems += [f"{shard.name}: {key}: {problem}" for problem in found]
        except (tarfile.TarError, ValueError, EOFError) as error:
            report.problems.append(f"{shard.name}: not a whole tar of samples: {error}")
        while stream.read(2**20):
            pass
    if (stream.size, stream.digest.hexdigest()) != (shard.size, shard.sha256):
        report.problems.append(f"{shard.name}: size or checksum differ from the manifest's")
    report.problems += [f"{shard.name}: {key} of the index is not in the shard" for key in expected]
    if len(rows) != shard.samples:
        report.problems.append(
            f"{shard.name}: {len(rows)} index rows, {shard.samples} samples in the manifest"
        )
    return report


def _samples(stream: _Hashed) -> Iterator[tuple[str, bytes, int, object]]:
    """(key, video, the video's offset, JSON) of each sample; ValueError if the members do not pair up."""
    described: tuple[str, object] | None = None
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            content = tar.extractfile(member)
            data = content.read() if content else b""
            if suffix == "json" and described is None:
                described = key, json.loads(data)
            elif suffix == "mp4" and described and described[0] == key:
                yield key, data, member.offset_data, described[1]
                described = None
            else:
                raise ValueError(f"unexpected member {member.name}")
    if described:
        raise ValueError(f"{described[0]} has no video")


def _check_sample(
    row: dict[str, Any], video: bytes, offset: int, described: object, decode: bool, droppable: bool
) -> list[str]:
    problems = []
    if (offset, len(video)) != (row["offset"], row["size"]):
        problems.append(
            f"stands at {offset} with {len(video)} bytes, the index says {row['offset']}, {row['size']}"
        )
    if hashlib.sha256(video).hexdigest() != row["sha256"]:
        return [*problems, "checksum differs from the index's"]
    if not isinstance(described, dict):
        return [*problems, "its JSON is not an object"]
    problems += [f"its JSON has no {name}" for name in _JSON_FIELDS if name not in described]
    problems += [
        f"{name} differs between JSON and index"
        for name in _JSON_FIELDS
        if name in described and described[name] != row[name]
    ]
    if decode:
        problems += check_video(video, row, droppable)
    return problems


def check_video(video: bytes, row: dict[str, Any], droppable: bool) -> list[str]:
    """Decode a video whole, and again without its droppable pictures: all must come out, and the same.

    `row`: `frames`, `width`, `height`. With `droppable`, every B-picture has to be one that can be dropped.
    """
    try:
        pictures, b_references = _decode(video, drop=False)
        remaining, _ = _decode(video, drop=True)
    except av.FFmpegError as error:
        return [f"does not decode: {error}"]
    problems = []
    if len(pictures) != row["frames"]:
        problems.append(f"{len(pictures)} pictures decode, the index says {row['frames']}")
    if any(shape != (row["height"] * 3 // 2, row["width"]) for shape, _ in pictures.values()):
        problems.append("pictures of another size than the index says")
    changed = [time for time, picture in remaining.items() if pictures.get(time) != picture]
    if changed:
        problems.append(f"{len(changed)} pictures change when droppable ones are left out")
    if droppable and b_references:
        problems.append(f"{b_references} B-pictures are references")
    return problems


def _decode(video: bytes, drop: bool) -> tuple[dict[int, _Picture], int]:
    """Pictures by time, without those that nothing refers to if `drop` is set; and how many B-pictures are
    marked as references."""
    pictures: dict[int, _Picture] = {}
    references = set()
    b_references = 0
    with av.open(io.BytesIO(video), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode"}
        for packet in container.demux(stream):
            if packet.size and slice_is_reference(packet):
                references.add(packet.pts)
            elif packet.size and drop:
                continue
            for frame in packet.decode():
                assert isinstance(frame, av.VideoFrame)
                assert frame.pts is not None
                planes = frame.to_ndarray()
                pictures[frame.pts] = planes.shape, hashlib.blake2b(planes.tobytes()).digest()
                b_references += frame.pts in references and frame.pict_type == av.video.frame.PictureType.B
    return pictures, b_references
