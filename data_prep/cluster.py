"""The same work as Ray tasks: a task for each video, its bytes in the object store until its shard is written.

A task that is lost with its worker or node is run again by Ray, and so is one whose result was lost before the
shard was written; nothing else is repeated. The driver sees outcomes, never videos.
"""

from __future__ import annotations

import dataclasses
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray

from arvideo_dist.data.index import ShardEntry
from arvideo_dist.storage import PatientStorage, Storage
from data_prep.errors import UserError
from data_prep.isolation import Limits, Prober
from data_prep.items import Item
from data_prep.shards import Outcome, SliceRecord, write_slice
from data_prep.transcode import TranscodeSettings
from data_prep.worker import process, scratch_prefix

# Of a task whose worker or node dies. Videos cannot kill a worker, so more deaths are the cluster's fault.
_MAX_RETRIES = 20

_prober: Prober | None = None  # one for each worker process


@ray.remote(num_cpus=1, num_returns=2, max_retries=_MAX_RETRIES)
def _video(item: Item, settings: TranscodeSettings, limits: Limits) -> tuple[Outcome, bytes]:
    global _prober
    _prober = _prober or Prober(limits)
    with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as folder:
        outcome = process(item, Path(folder), settings, limits, _prober)
        data = outcome.video.read_bytes() if isinstance(outcome.video, Path) else b""
    return dataclasses.replace(outcome, video=None), data


@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)
def _shard(uri: str, split: str, number: int, parts: list[Any]) -> SliceRecord:
    """`parts`: an Outcome, or a pair of references to one and its video; fetched one at a time."""

    def outcomes() -> Any:
        for part in parts:
            if isinstance(part, Outcome):
                yield part
            else:
                outcome = ray.get(part[0])
                video = ray.get(part[1]) if outcome.sample else None
                yield dataclasses.replace(outcome, video=video)

    return write_slice(PatientStorage(uri), split, number, outcomes())


class RayPool:
    """The CPUs of a Ray cluster. Use as a context manager; leaving it drops the tasks that are not done."""

    def __init__(
        self, address: str, storage: Storage, split: str, settings: TranscodeSettings, limits: Limits
    ) -> None:
        """`address`: a cluster's, `auto` for the one around, `local` to start one on this machine."""
        self._storage, self._split, self._settings, self._limits = storage, split, settings, limits
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # Ray itself tries for minutes before it says that nobody is there
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--ray-address {address}: no cluster answers there: {error}") from error
        self._videos: dict[ray.ObjectRef, ray.ObjectRef] = {}  # outcome -> video

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    @property
    def slots(self) -> int:
        """Two videos for each CPU of the cluster as it is now: one runs, one waits beside it."""
        return max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))

    def video(self, item: Item) -> ray.ObjectRef:
        references: Any = _video.remote(item, self._settings, self._limits)
        outcome, video = references
        self._videos[outcome] = video
        return outcome

    def shard(self, number: int, videos: list[Any]) -> ray.ObjectRef:
        # The task's arguments keep the videos' references alive, so Ray makes a lost one again until it ends.
        parts = [
            video if isinstance(video, Outcome) else (video, self._videos.pop(video)) for video in videos
        ]
        return _shard.remote(self._storage.address, self._split, number, parts)

    def wait(self, handles: set[ray.ObjectRef]) -> set[ray.ObjectRef]:
        ready, _ = ray.wait(list(handles), num_returns=1, fetch_local=False)
        return set(ready)

    def outcome(self, handle: ray.ObjectRef) -> Outcome:
        return self._get(handle)

    def record(self, handle: ray.ObjectRef) -> SliceRecord:
        """Raises UserError if the shard was written to another machine's disk."""
        record: SliceRecord = self._get(handle)
        shard = record.shard
        # A bucket is the same for all machines.
        if shard and self._storage.is_local and not self._is_here(shard):
            raise UserError(
                f"{shard.name} was written, but is not in {self._storage.uri} as this machine sees it: with "
                "--ray-address --out must be a folder that all nodes share, or s3://bucket/folder"
            )
        return record

    def _is_here(self, shard: ShardEntry) -> bool:
        try:
            return self._storage.size(shard.name) == shard.size
        except FileNotFoundError:
            return False

    def _get(self, handle: ray.ObjectRef) -> Any:
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray gave up after {_MAX_RETRIES} retries: {error}") from error
