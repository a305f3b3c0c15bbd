"""A bounded cache of whole shards on a node's disk, shared by all processes of the node.

It pays if reads stay within a few shards for a while (`shuffle_block_shards`); under a full shuffle nearly
every read would fetch another shard.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from arvideo_dist.storage import Storage

_DIGITS = 32  # of a digest that names files


class ShardCache:
    """Least recently used shards leave first. A file stands under the digest of its data set's index, so that
    another version of a data set never meets an old copy. Locks are the kernel's: they end with a process that is
    killed."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, storage: Storage, shard: str, index_digest: str) -> BinaryIO | None:
        """The local copy of the member `shard` of a data set, opened; fetched if it is not there. None if the
        shards that others fetch now leave no room for it. Raises OSError if the store fails, ValueError if
        the shard is larger than the cache."""
        path = self.folder / f"{index_digest[:_DIGITS]}-{shard}"
        while True:
            with suppress(FileNotFoundError):
                file = path.open("rb")  # stays readable when another process removes the name
                with suppress(FileNotFoundError):
                    os.utime(path)
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path.stem) as mine:
                assert mine
                if not path.exists() and not self._fetch(storage, shard, path):
                    return None

    def _fetch(self, storage: Storage, shard: str, path: Path) -> bool:
        """Whether there was room for it."""
        partial = path.with_suffix(".partial")
        with storage.fs.open_input_file(storage.path(shard)) as source:
            size = source.size()
            if not self._make_room(size, partial):
                return False
            try:
                with partial.open("r+b") as sink:
                    shutil.copyfileobj(source, sink, 8 * 2**20)
                    fetched = sink.tell()
                if fetched != size:
                    raise OSError(f"{storage.uri}/{shard} ended after {fetched} of {size} bytes")
                partial.replace(path)
                return True
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int, partial: Path) -> bool:
        """Whether `size` more bytes fit once old shards are removed; they are reserved by the file `partial`."""
        if size > self.limit_bytes:
            raise ValueError(
                f"a shard of {size} bytes does not fit into the shard cache of {self.limit_bytes} bytes: "
                "raise data.shard_cache_gib, or set it to 0"
            )
        with self._lock("room"):
            for left in self.folder.glob("*.partial"):
                with self._lock(left.stem, wait=False) as abandoned:
                    if abandoned:  # nobody is filling it: its process was killed
                        left.unlink(missing_ok=True)
            # Partial ones first: one that becomes whole meanwhile is counted twice, and never missed.
            total = sum(stat.st_size for _, stat in self._files("*.partial"))
            files = self._files("*.tar")
            total += sum(stat.st_size for _, stat in files)
            for file, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
                if total + size <= self.limit_bytes:
                    break
                file.unlink(missing_ok=True)
                total -= stat.st_size
            if total + size > self.limit_bytes:
                return False
            with partial.open("wb") as file_handle:
                os.posix_fallocate(file_handle.fileno(), 0, max(size, 1))
            return True

    def _files(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        """Files of the folder; other processes finish and remove some while they are looked at."""
        found = []
        for file in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((file, file.stat()))
        return found

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock `name`; gives False if it is held elsewhere and `wait` is False."""
        with (self.folder / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
