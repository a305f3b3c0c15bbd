"""Samples that could not be used: weight 0, counted over all ranks, named in an artifact, bounded.

    <run>/bad_samples.parquet      a row for each sample, with the number of places that it took (_Sample)

Places are counted at every step. Samples are listed at logged points and before checkpoints, so that a step costs
no write and no further meeting of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from arvideo_dist.data.loader import BadRecord, Batch
from arvideo_dist.train.deferred import DeferredWrites
from arvideo_dist.train.stop import RunStoppedError

if TYPE_CHECKING:
    from arvideo_dist.train.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs

ARTIFACT = "bad_samples.parquet"
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("places", pa.int64()),
        ("first_place", pa.int64()),
        ("last_place", pa.int64()),
    ]
)


@dataclass
class _Sample:
    """One sample of the data, whatever the number of epochs and windows in which it was bad."""

    shard: str  # with its data set's URI where there are several
    key: str
    reason: str  # at the newest place; a window's own frames may be in it
    places: int  # of the sequence that it took
    first_place: int
    last_place: int


class BadSamples:
    """The run's bad samples, the same list on every rank."""

    def __init__(
        self,
        run: DeferredWrites,
        max_fraction: float,
        num_samples: int,
        control: dist.ProcessGroup,
        tracker: QueuedTracker | None = None,
    ) -> None:
        """`tracker`: on rank 0, else None."""
        self._run, self._max_fraction, self._num_samples = run, max_fraction, num_samples
        self._control, self._tracker = control, tracker
        self._samples: dict[tuple[str, str], _Sample] = {}
        self._unlisted: list[BadRecord] = []  # of this rank
        self.places = 0  # of all ranks, listed or not: what max_fraction bounds

    def restore(self, listed: list[dict[str, Any]]) -> None:
        """Begin from what a checkpoint lists; the first ones listed places (BadRecord), not samples."""
        for entry in listed:
            if "place" in entry:
                self._list(BadRecord(**entry))
            else:
                self._samples[entry["shard"], entry["key"]] = _Sample(**entry)
        self.places = self._places_listed()

    def listed(self) -> list[dict[str, Any]]:
        """JSON form, for the checkpoint; call `collect` before."""
        return [asdict(sample) for sample in self._samples.values()]

    def account(self, batches: Sequence[Batch], total: int, position: int) -> None:
        """Count the bad samples of a step: `total` of them in the ranks' `batches`.

        `position`: places consumed before this batch. A small data set's first bad sample is not yet a large
        share of anything, so the fraction is of the places consumed or of one epoch, whichever is more.
        Raises RunStoppedError, on every rank, once all are listed.
        """
        self.places += total
        self._unlisted += [record for batch in batches for record in batch.bad]
        limit = self._max_fraction * max(position, self._num_samples)
        if total and self.places > limit:
            self.collect()
            last = max(self._samples.values(), key=lambda sample: sample.last_place)
            raise RunStoppedError(
                f"{self.places} bad samples are more than data.max_bad_fraction {self._max_fraction} allows "
                f"({limit:.0f}); the last one: {last.shard} {last.key}: {last.reason}. "
                f"All are listed in {self._run.uri}/{ARTIFACT}"
            )

    def collect(self) -> None:
        """Collective where a place was counted since the last time: list its sample; rank 0 writes the list."""
        if self.places == self._places_listed():
            return
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._unlisted, group=self._control)
        self._unlisted = []
        leads = dist.get_rank() == 0
        for record in sorted((r for records in gathered for r in records), key=lambda record: record.place):
            if self._list(record) and leads:
                print(f"bad sample: {record.shard} {record.key}: {record.reason}", flush=True)
        assert self.places == self._places_listed()
        if leads:
            content = self.parquet()
            self._run.put(ARTIFACT, content)
            if self._tracker is not None:
                self._tracker.log_bytes(ARTIFACT, content)

    def parquet(self) -> bytes:
        """The list as a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.listed(), schema=_SCHEMA), sink)
        return sink.getvalue().to_pybytes()

    def _list(self, record: BadRecord) -> bool:
        """Whether the sample is new to the list."""
        name = record.shard, record.key
        new = name not in self._samples
        if new:
            self._samples[name] = _Sample(*name, record.reason, 0, record.place, record.place)
        sample = self._samples[name]
        sample.reason, sample.last_place = record.reason, record.place
        sample.places += 1
        return new

    def _places_listed(self) -> int:
        return sum(sample.places for sample in self._samples.values())
