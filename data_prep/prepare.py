"""The run: inputs dealt into slices, slices made in parallel, the data set published last.

    progress-<split>/settings.json         what this run makes, from its first moment
    progress-<split>/slice-000000.json     one for each finished slice, written after its shard
    progress-<split>/retried.json, base-*  while rejects are retried: which ones, and the files about to be replaced

A run that ends at any point is continued by the same command: slices with a record are not made again. Beside
a finished split the folder counts only if it holds a begun retry; else it is what an ended run left there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from arvideo_dist.data.index import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    DatasetManifest,
    ShardEntry,
    index_name,
    load_manifest,
    manifest_name,
    rejects_name,
)
from arvideo_dist.storage import Storage
from data_prep.errors import UserError
from data_prep.items import DUPLICATE, Computed, Inputs, Item, shuffled
from data_prep.ledger import Ledger
from data_prep.shards import (
    RETRIED_MANIFEST,
    Outcome,
    SliceRecord,
    clear_progress,
    finished_slices,
    labels_name,
    progress_folder,
    read_table,
    table_batches,
    write_table,
)
from data_prep.table import NameTable
from data_prep.transcode import CONVERSION, TranscodeSettings, ffmpeg

_RETRY_STATE = {"retried.json", "base-index.parquet", "base-rejects.parquet", RETRIED_MANIFEST}
_OPEN_SLICES = 4  # begun and not yet written, at least; bounds the staged videos when one video takes long


class Executor(Protocol):
    """Where the work runs. Handles are hashable and opaque to this module."""

    @property
    def slots(self) -> int:
        """Videos to keep in flight."""

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
        "conversion": CONVERSION,
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


def _refuse_mixture(storage: Storage, split: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        raise UserError(
            f"{storage.uri} holds split {split!r} made with other settings ({'; '.join(changed)}). "
            "Use the same settings, another --out, or delete that split there."
        )


@dataclass
class _Plan:
    """What is left to make, and what is there already."""

    items: Sequence[Item]
    first_slice: int = 0
    base_shards: list[ShardEntry] = field(default_factory=list)  # of the split whose rejects are retried
    base_index: str | None = None  # its index, in the progress folder
    refused: Iterable[tuple[str, str]] = ()  # inputs that need no slice: known to be impossible


def _plan(
    storage: Storage, split: str, inputs: Inputs, settings: dict[str, Any], retry: bool
) -> _Plan | DatasetManifest:
    """The plan of this run; the manifest if there is nothing to do."""
    folder = progress_folder(split)
    begun = set(storage.names(folder))
    retrying = begun >= _RETRY_STATE
    if retrying:
        manifest = DatasetManifest.model_validate_json(storage.read_bytes(f"{folder}/{RETRIED_MANIFEST}"))
    elif storage.exists(manifest_name(split)):
        manifest = load_manifest(storage, split)
        clear_progress(storage, split)  # records of other slices under the numbers that a retry gives its own
    elif retry:
        raise UserError(f"--retry-rejects: {storage.uri} has no finished split {split!r} yet; run without it")
    else:
        if "settings.json" in begun:
            _refuse_mixture(
                storage, split, json.loads(storage.read_bytes(f"{folder}/settings.json")), settings
            )
        else:
            _begin(storage, split, settings)
        return _Plan(shuffled(inputs.items, settings["seed"]))
    _refuse_mixture(storage, split, manifest.settings, settings)
    if not (retry or retrying) or not manifest.rejects:
        return manifest
    if not retrying:
        _begin_retry(storage, split, manifest, inputs)
    again, samples, chosen = NameTable(), NameTable(), NameTable()
    again.add(_sources(storage, f"{folder}/base-rejects.parquet"))
    samples.add(name for name in _sources(storage, f"{folder}/base-index.parquet") if name in again)
    chosen.add(json.loads(storage.read_bytes(f"{folder}/retried.json")))

    def is_tried(item: Item) -> bool:
        return item.source in chosen and item.reason != DUPLICATE

    def refused() -> Iterator[tuple[str, str]]:
        for item in inputs.items:
            if item.source in again and not is_tried(item):
                if item.reason is not None:
                    yield item.source, item.reason
                elif item.source not in samples:
                    yield item.source, "missing: it was not there when the retry began"

    items = enumerate(inputs.items)
    places = np.array([at for at, item in items if item.source in again and is_tried(item)], dtype=np.int64)
    tried = Computed(len(places), lambda place: inputs.items[int(places[place])])
    numbers = [int(shard.name.removeprefix(f"{split}-").removesuffix(".tar")) for shard in manifest.shards]
    return _Plan(
        shuffled(tried, settings["seed"]),
        max(numbers, default=-1) + 1,
        manifest.shards,
        f"{folder}/base-index.parquet",
        refused(),
    )


def _sources(storage: Storage, name: str) -> Iterator[str]:
    for table in table_batches(storage, name, ["source"]):
        yield from table["source"].to_pylist()


def _begin_retry(storage: Storage, split: str, manifest: DatasetManifest, inputs: Inputs) -> None:
    """Keep what is about to be replaced, and fix which inputs are tried: more may turn up until the end."""
    folder = progress_folder(split)
    again, samples = NameTable(), NameTable()
    again.add(_sources(storage, manifest.rejects_file.name))
    samples.add(name for name in _sources(storage, manifest.index.name) if name in again)
    chosen = [
        item.source
        for item in inputs.items
        if item.reason is None and item.source in again and item.source not in samples
    ]
    storage.write_bytes(f"{folder}/retried.json", json.dumps(chosen).encode())
    for source, copy in (
        (manifest.index.name, "base-index.parquet"),
        (manifest.rejects_file.name, "base-rejects.parquet"),
        (manifest_name(split), RETRIED_MANIFEST),  # the last: with it the retry has begun
    ):
        storage.write_bytes(f"{folder}/{copy}", storage.read_bytes(source))


def _begin(storage: Storage, split: str, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=1, sort_keys=True)
    storage.write_bytes(f"{progress_folder(split)}/settings.json", text.encode())


def prepare(
    inputs: Inputs,
    storage: Storage,
    split: str,
    settings: dict[str, Any],
    executor: Callable[[], AbstractContextManager[Executor]],
    retry: bool = False,
) -> tuple[DatasetManifest, bool]:
    """Make every slice that is not done yet, then publish the split; its manifest, and whether work was done.

    With `retry` the rejects of a finished split are tried again; what comes of them goes into further shards.
    """
    plan = _plan(storage, split, inputs, settings, retry)
    if isinstance(plan, DatasetManifest):
        return plan, False
    size = settings["shard_size"]
    numbers = range(plan.first_slice, plan.first_slice + -(-len(plan.items) // size))
    ledger = Ledger()
    for number, record in finished_slices(storage, split, numbers):
        ledger.add(number, record)
    done = ledger.samples + ledger.rejects
    todo = (
        (number, plan.items[(number - plan.first_slice) * size : (number - plan.first_slice + 1) * size])
        for number in numbers
        if number not in ledger
    )
    rejects = ledger.rejects
    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds between lines
    with tqdm(total=len(plan.items), initial=done, unit="video", desc=split, mininterval=pace) as bar:
        if done < len(plan.items):
            with executor() as running:
                for result in _work(todo, running):
                    if isinstance(result, Outcome):
                        rejects += result.reason is not None
                        bar.set_postfix(rejects=rejects, refresh=False)
                        bar.update()
                    else:
                        ledger.add(*result)
    ledger.refuse(plan.refused)
    manifest = publish(storage, split, ledger, plan, inputs.labels, settings)
    return manifest, True


def publish(
    storage: Storage,
    split: str,
    ledger: Ledger,
    plan: _Plan,
    labels: list[str],
    settings: dict[str, Any],
) -> DatasetManifest:
    """Write index, rejects and label names, then the manifest that makes the split exist."""
    base = table_batches(storage, plan.base_index) if plan.base_index else iter(())
    shards = [*plan.base_shards, *ledger.shards()]
    if labels:
        storage.write_bytes(labels_name(split), "".join(f"{label}\n" for label in labels).encode())
    manifest = DatasetManifest(
        split=split,
        samples=sum(shard.samples for shard in shards),
        rejects=ledger.rejects,
        labels=labels,
        settings=settings,
        fingerprint=fingerprint(settings),
        index=write_table(storage, index_name(split), INDEX_SCHEMA, chain(base, ledger.index())),
        rejects_file=write_table(storage, rejects_name(split), REJECTS_SCHEMA, ledger.rejected()),
        shards=shards,
    )
    storage.write_bytes(manifest_name(split), manifest.model_dump_json(indent=1).encode())
    clear_progress(storage, split)
    return manifest


@dataclass
class _Slice:
    number: int
    parts: list[Any]  # in the items' order: an Outcome, or the executor's handle of a video, once handed out
    left: int  # items not handed out yet
    waiting: int = 0  # videos not done yet
    videos: int = 0  # handed out; staged until the shard is written


def _work(
    todo: Iterator[tuple[int, Sequence[Item]]], executor: Executor
) -> Iterator[Outcome | tuple[int, SliceRecord]]:
    """Outcomes and finished slices as they come; `executor.slots` videos at a time, of as few slices as keep them
    at work: of small slices, or ones whose inputs are mostly missing, more are open."""
    opened: dict[int, _Slice] = {}
    videos: dict[Any, _Slice] = {}
    shards: dict[Any, _Slice] = {}  # holds the slice, and so its videos' handles, until its shard is written
    feeding: tuple[_Slice, Iterator[tuple[int, Item]]] | None = None

    def close_if_complete(current: _Slice) -> None:
        if not current.waiting and not current.left:
            shards[executor.shard(current.number, current.parts)] = current

    def may_begin() -> bool:
        staged, slots = sum(current.videos for current in opened.values()), executor.slots
        return len(opened) < max(_OPEN_SLICES, slots if staged < 2 * slots else 0)

    while True:
        while len(videos) < executor.slots:
            if feeding is None:
                batch = next(todo, None) if may_begin() else None
                if batch is None:
                    break
                number, items = batch
                opened[number] = _Slice(number, [None] * len(items), left=len(items))
                feeding = (opened[number], _largest_first(items))
            current, handing_out = feeding
            place, item = next(handing_out)
            current.left -= 1
            if item.reason is not None:
                outcome = Outcome(item.source, reason=item.reason)
                current.parts[place] = outcome
                yield outcome
            else:
                handle = executor.video(item)
                videos[handle] = current
                current.parts[place] = handle
                current.waiting += 1
                current.videos += 1
            if not current.left:
                feeding = None
                close_if_complete(current)
        if not videos and not shards:
            return
        for handle in executor.wait(videos.keys() | shards.keys()):
            if handle in shards:
                number = shards.pop(handle).number
                del opened[number]
                yield number, executor.record(handle)
            else:
                current = videos.pop(handle)
                current.waiting -= 1
                yield executor.outcome(handle)
                close_if_complete(current)


def _largest_first(items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """A slice's items with their places in it: the last ones to run are short, so no worker waits long for them."""

    def size(item: Item) -> int:
        try:
            return os.path.getsize(item.path) if item.path is not None else 0
        except OSError:  # who opens it will say why
            return 0

    return iter(sorted(enumerate(items), key=lambda placed: size(placed[1]), reverse=True))


@contextlib.contextmanager
def sole_writer(storage: Storage, split: str) -> Iterator[None]:
    """Hold a local output folder against a second run, and clear away what a killed one was writing.

    Object storage has no locks; two equal runs write equal bytes there.
    """
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
        whole = (index_name(split), rejects_name(split), labels_name(split), manifest_name(split))
        storage.clear_partial(f"{split}-", *(f"{name}." for name in whole))
        yield


def summary(storage: Storage, manifest: DatasetManifest, remarks: list[str], seconds: float | None) -> str:
    """The closing words for the terminal; `seconds` none if there was nothing left to do."""
    kinds = reject_kinds(read_table(storage, manifest.rejects_file.name, ["reason"]))
    size = sum(shard.size for shard in manifest.shards)
    hours = (pc.sum(read_table(storage, manifest.index.name, ["duration"])["duration"]).as_py() or 0) / 3600
    total = manifest.samples + manifest.rejects
    made = f"{manifest.samples} samples in {len(manifest.shards)} shard(s)"
    lines = [f"{total} inputs: {made}, {manifest.rejects} rejected"]
    lines += [f"  {count} x {reason}" for reason, count in kinds]
    lines += [f"  {remark}" for remark in remarks]
    lines.append(f"{hours:.2f} hours of video, {size / 2**20:.1f} MiB, {len(manifest.labels)} labels")
    if seconds is None:
        retry = f"; --retry-rejects tries its {manifest.rejects} rejects again" if manifest.rejects else ""
        lines.append(f"nothing to do: this split was already complete{retry}")
    else:
        lines.append(f"took {seconds:.1f} s, {total / max(seconds, 1e-9):.2f} videos/s")
    lines.append(f"data set: {storage.uri} split {manifest.split} ({manifest_name(manifest.split)})")
    return "\n".join(lines)


def reject_kinds(rejects: pa.Table) -> list[tuple[str, int]]:
    """Kinds of reasons (the words before the colon) and how often each occurs, most frequent first."""
    kinds = pc.list_element(pc.split_pattern(rejects["reason"], ":", max_splits=1), 0)
    counted = [(each["values"].as_py(), each["counts"].as_py()) for each in pc.value_counts(kinds)]
    return sorted(counted, key=lambda kind: -kind[1])
