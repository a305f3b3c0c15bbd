"""The run: inputs dealt into slices, slices made in parallel, the data set published last.

    progress-<split>/settings.json         what this run makes, from its first moment
    progress-<split>/slice-000000.json     one for each finished slice, written after its shard

A run that ends at any point is continued by the same command: slices with a record are not made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from arvideo_dist.data.index import FORMAT_VERSION, DatasetManifest, load_manifest, manifest_name
from arvideo_dist.storage import Storage
from data_prep.errors import UserError
from data_prep.items import Inputs, Item, shuffled
from data_prep.shards import Outcome, SliceRecord, progress_folder, publish, read_record
from data_prep.transcode import TranscodeSettings, ffmpeg

_OPEN_SLICES = 4  # begun and not yet written; bounds the staged videos when one video takes long


class Executor(Protocol):
    """Where the work runs. Handles are opaque to this module."""

    slots: int  # videos to keep in flight

    def video(self, item: Item) -> Any: ...
    def shard(self, number: int, videos: list[Any]) -> Any: ...
    def wait(self, handles: set[Any]) -> set[Any]: ...
    def outcome(self, handle: Any) -> Outcome: ...
    def record(self, handle: Any) -> SliceRecord: ...


def run_settings(inputs: Inputs, transcode: TranscodeSettings, shard_size: int, seed: int) -> dict[str, Any]:
    """Everything that decides the shards' bytes, as it goes into the manifest."""
    return {
        "format_version": FORMAT_VERSION,
        "inputs": {**inputs.description, "count": len(inputs.items), "sha256": inputs.digest()},
        "transcode": transcode.model_dump(),
        "shard_size": shard_size,
        "seed": seed,
        "encoder": {"ffmpeg": ffmpeg()[1], "threads": 1},
        "webdataset": importlib.metadata.version("webdataset"),
    }


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for each setting that is not the same in both."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} -> {after}")
    return found


@dataclass
class _Slice:
    number: int
    parts: list[Any]  # an Outcome, or the executor's handle of a video
    waiting: int = 0
    items_left: int = field(default=0)


def existing(storage: Storage, split: str, settings: dict[str, Any]) -> DatasetManifest | None:
    """The finished split where these settings have already made it; refuses what others made or began."""
    if storage.exists(manifest_name(split)):
        manifest = load_manifest(storage, split)
        _refuse_mixture(storage, split, manifest.settings, settings)
        return manifest
    begun = f"{progress_folder(split)}/settings.json"
    if storage.exists(begun):
        _refuse_mixture(storage, split, json.loads(storage.read_bytes(begun)), settings)
    else:
        storage.write_bytes(begun, json.dumps(settings, indent=1, sort_keys=True).encode())
    return None


def _refuse_mixture(storage: Storage, split: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        raise UserError(
            f"{storage.uri} holds split {split!r} made with other settings ({'; '.join(changed)}). "
            "Use the same settings, another --out, or delete that split there."
        )


def prepare(
    inputs: Inputs, storage: Storage, split: str, settings: dict[str, Any], executor: Executor
) -> DatasetManifest:
    """Make every slice that is not done yet with `executor`, then publish the split."""
    items = shuffled(inputs.items, settings["seed"])
    size = settings["shard_size"]
    count = -(-len(items) // size)
    records: dict[int, SliceRecord] = {}
    for number in range(count):
        record = read_record(storage, split, number)
        if record:
            records[number] = record
    done = sum(len(record.rows) + len(record.rejects) for record in records.values())
    todo = (
        (number, items[number * size : (number + 1) * size])
        for number in range(count)
        if number not in records
    )
    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds between lines
    with tqdm(total=len(items), initial=done, unit="video", desc=split, mininterval=pace) as bar:
        rejects = sum(len(record.rejects) for record in records.values())
        for outcome_or_record in _work(todo, executor):
            if isinstance(outcome_or_record, Outcome):
                rejects += outcome_or_record.reason is not None
                bar.set_postfix(rejects=rejects, refresh=False)
                bar.update()
            else:
                number, record = outcome_or_record
                records[number] = record
    return publish(
        storage,
        split,
        [records[number] for number in range(count)],
        inputs.labels,
        settings,
        fingerprint(settings),
    )


def _work(
    todo: Iterator[tuple[int, list[Item]]], executor: Executor
) -> Iterator[Outcome | tuple[int, SliceRecord]]:
    """Outcomes and finished slices as they come; `executor.slots` videos and a few slices at a time."""
    videos: dict[Any, tuple[_Slice, int]] = {}
    shards: dict[Any, int] = {}
    feeding: tuple[_Slice, Iterator[Item]] | None = None
    open_slices = 0
    while True:
        while len(videos) < executor.slots:
            if feeding is None:
                batch = next(todo, None) if open_slices < _OPEN_SLICES else None
                if batch is None:
                    break
                feeding = (_Slice(batch[0], [], items_left=len(batch[1])), iter(batch[1]))
                open_slices += 1
            current, remaining = feeding
            item = next(remaining)
            current.items_left -= 1
            if item.reason is not None:
                outcome = Outcome(item.source, reason=item.reason)
                current.parts.append(outcome)
                yield outcome
            else:
                handle = executor.video(item)
                videos[handle] = (current, len(current.parts))
                current.parts.append(handle)
                current.waiting += 1
            if not current.items_left:
                feeding = None
                if not current.waiting:
                    shards[executor.shard(current.number, current.parts)] = current.number
        if not videos and not shards:
            return
        for handle in executor.wait(videos.keys() | shards.keys()):
            if handle in shards:
                open_slices -= 1
                yield shards.pop(handle), executor.record(handle)
                continue
            current, _ = videos.pop(handle)
            current.waiting -= 1
            yield executor.outcome(handle)
            if not current.waiting and not current.items_left:
                shards[executor.shard(current.number, current.parts)] = current.number


@contextlib.contextmanager
def sole_writer(storage: Storage, split: str) -> Iterator[None]:
    """Hold the local output folder against a second run (object storage has no locks: equal runs write equal
    bytes there). Leftovers of a killed run are removed."""
    if not storage.is_local:
        yield
        return
    folder = Path(storage.path())
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock-{split}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{storage.uri}: another run is preparing split {split!r} there") from None
        yield


def summary(storage: Storage, manifest: DatasetManifest, inputs: Inputs, seconds: float | None) -> str:
    """The closing words for the terminal; `seconds` none where there was nothing left to do."""
    import pyarrow.parquet as pq

    def table(name: str) -> Any:
        with storage.fs.open_input_file(storage.path(name)) as file:
            return pq.read_table(file)

    index, rejects = table(manifest.index.name), table(manifest.rejects_file.name)
    size = sum(shard.size for shard in manifest.shards)
    hours = sum(index["duration"].to_pylist()) / 3600
    lines = [
        f"{manifest.samples + manifest.rejects} inputs: {manifest.samples} samples in {len(manifest.shards)}"
        f" shard(s), {manifest.rejects} rejected"
    ]
    reasons = Counter(reason.split(":")[0] for reason in rejects["reason"].to_pylist())
    lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
    lines += [f"  {remark}" for remark in inputs.remarks]
    lines.append(f"{hours:.2f} hours of video, {size / 2**20:.1f} MiB, {len(manifest.labels)} labels")
    if seconds is None:
        lines.append("nothing to do: this split was already complete")
    else:
        total = manifest.samples + manifest.rejects
        lines.append(f"took {seconds:.1f} s, {total / max(seconds, 1e-9):.2f} videos/s")
    lines.append(f"data set: {storage.uri} split {manifest.split} ({manifest_name(manifest.split)})")
    return "\n".join(lines)
