"""Reading video members of a data set's shards by byte range: retries, look-ahead, an optional shard cache."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from arvideo_dist.data.cache import ShardCache
from arvideo_dist.data.decode import BadSample
from arvideo_dist.data.index import SampleRow
from arvideo_dist.storage import Storage

log = logging.getLogger(__name__)

_AHEAD = 4  # reads in flight for one worker while it decodes; an object store answers in tens of milliseconds


class DataReadError(RuntimeError):
    """A shard cannot be read although it was tried again and again: the store's fault, never a sample's."""


@dataclass(frozen=True)
class MemberReader:
    """Reads video members of one data set."""

    storage: Storage
    index_digest: str  # tells this data set's shards from others' in the cache
    retries: int = 6
    first_delay: float = 1.0  # seconds before the first repetition of a failed read; doubles each time
    verify_checksums: bool = False
    cache: ShardCache | None = None

    def read(self, row: SampleRow) -> bytes:
        """The bytes of the row's video.

        Raises BadSample if the shard is readable but does not hold these bytes, DataReadError if the
        shard is missing or the store goes on failing.
        """
        data = self._with_retries(row)
        if len(data) != row.size:
            raise BadSample(f"short read: {len(data)} of {row.size} bytes at offset {row.offset}")
        if self.verify_checksums:
            digest = hashlib.sha256(data).hexdigest()
            if digest != row.sha256:
                raise BadSample(f"checksum: sha256 is {digest[:16]}..., the index says {row.sha256[:16]}...")
        return data

    def _with_retries(self, row: SampleRow) -> bytes:
        delay = self.first_delay
        for attempt in range(self.retries + 1):
            try:
                return self._read_range(row)
            except OSError as error:  # FileNotFoundError included: a mount may come back
                if attempt == self.retries:
                    raise DataReadError(
                        f"shard {row.shard} of {self.storage.uri} could not be read in {attempt + 1} attempts "
                        f"({error}): check that the data set is complete and the store is up, then start again"
                    ) from error
                log.warning("%s/%s: %s; next attempt in %g s", self.storage.uri, row.shard, error, delay)
                time.sleep(delay)
                delay *= 2
        raise AssertionError("unreachable")

    def _read_range(self, row: SampleRow) -> bytes:
        cached = self.cache and self.cache.open(self.storage, row.shard, self.index_digest)
        if not cached:
            return self.storage.read_range(row.shard, row.offset, row.size)
        with cached as file:
            return os.pread(file.fileno(), row.size, row.offset)


def read_ahead(
    requests: Sequence[tuple[MemberReader, SampleRow]],
) -> Iterator[Callable[[], bytes]]:
    """For each request, in order, a function that gives its bytes or raises as `MemberReader.read` does.

    Reads from object storage run ahead of their use in threads; local ones happen when they are asked for.
    """
    if all(reader.storage.is_local for reader, _ in requests):
        for reader, row in requests:
            yield partial(reader.read, row)
        return
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="read") as threads:
        running = deque(threads.submit(reader.read, row) for reader, row in requests[:_AHEAD])
        for reader, row in requests[_AHEAD:]:
            yield running.popleft().result
            running.append(threads.submit(reader.read, row))
        while running:
            yield running.popleft().result
