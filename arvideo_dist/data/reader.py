"""Reading one video member of a shard by its byte range, with retries."""

from __future__ import annotations

import hashlib
import logging
import time

from arvideo_dist.data.decode import BadSample
from arvideo_dist.data.index import SampleRow
from arvideo_dist.storage import Storage

log = logging.getLogger(__name__)


class DataReadError(RuntimeError):
    """A shard cannot be read although it was tried again and again: the store's fault, never a sample's."""


class MemberReader:
    """Reads video members of one data set's shards."""

    def __init__(self, storage: Storage, retries: int = 6, first_delay: float = 1.0) -> None:
        """A failing read is repeated `retries` times: after `first_delay` seconds, then twice that, ..."""
        self.storage, self.retries, self.first_delay = storage, retries, first_delay

    def read(self, row: SampleRow) -> bytes:
        """The bytes of the row's video, checked against the index.

        Raises BadSample where the shard is readable but does not hold these bytes, DataReadError where the
        shard is missing or the store goes on failing.
        """
        data = self._read_range(row)
        if len(data) != row.size:
            raise BadSample(f"short read: {len(data)} of {row.size} bytes at offset {row.offset}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != row.sha256:
            raise BadSample(f"checksum: sha256 is {digest[:16]}..., the index says {row.sha256[:16]}...")
        return data

    def _read_range(self, row: SampleRow) -> bytes:
        delay = self.first_delay
        for attempt in range(self.retries + 1):
            try:
                return self.storage.read_range(row.shard, row.offset, row.size)
            except OSError as error:  # FileNotFoundError included: a mount may come back
                if attempt == self.retries:
                    raise DataReadError(
                        f"shard {row.shard} of {self.storage.uri} could not be read in {attempt + 1} "
                        f"attempts ({error}): check that the data set is complete and the store is up, then "
                        "start again"
                    ) from error
                log.warning(
                    "reading %s/%s: %s; next attempt in %g s", self.storage.uri, row.shard, error, delay
                )
                time.sleep(delay)
                delay *= 2
        raise AssertionError("unreachable")
