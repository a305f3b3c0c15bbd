"""Samples that could not be used: weight 0, counted over all ranks, named in an artifact, bounded.

    <run>/bad_samples.parquet      a row for each sample, with the number of places that it took (_Sample)

Places are counted at every step. Samples are listed at logged points and before checkpoints, so that a step costs
no write and no further meeting of the ranks. Those of a validation are listed at its end, apart from the training's
(column `split`): they take places of the held-out split's own sequence, which begins anew with each validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from arvideo_dist.data.loader import BadRecord, Batch
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.tracking.deferred import DeferredWrites

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs

ARTIFACT = "bad_samples.parquet"
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("places", pa.int64()),
        ("first_place", pa.int64()),
        ("last_place", pa.int64()),
        ("split", pa.string()),
    ]
)


@dataclass
class _Sample:
    """One sample of the data, whatever the number of epochs and windows in which it was bad."""

    shard: str  # with its data set's URI if there are several
    key: str
    reason: str  # at the newest place; a window's own frames may be in it
    places: int  # of the sequence that it took
    first_place: int
    last_place: int
    split: str = ""  # "" if an older checkpoint does not say it


_Listed = dict[tuple[str, str], _Sample]  # by shard and key


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
        self._samples: _Listed = {}
        self._of_validation: _Listed = {}
        self._unlisted: list[BadRecord] = []  # of this rank
        self.places = 0  # of all ranks, listed or not: what max_fraction bounds

    def restore(self, listed: list[dict[str, Any]], of_validation: list[dict[str, Any]]) -> None:
        """Begin from what a checkpoint lists; the first ones listed places (BadRecord), not samples."""
        for entry in listed:
            if "place" in entry:
                _list(self._samples, BadRecord(**entry))
            else:
                _restore(self._samples, entry)
        for entry in of_validation:
            _restore(self._of_validation, entry)
        self.places = self._places_listed()

    def listed(self) -> list[dict[str, Any]]:
        """JSON form of the training's, for the checkpoint; call `collect` before."""
        return [asdict(sample) for sample in self._samples.values()]

    def listed_of_validation(self) -> list[dict[str, Any]]:
        """JSON form of the validations', for the checkpoint."""
        return [asdict(sample) for sample in self._of_validation.values()]

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
        """Collective if a place was counted since the last time: list its sample; rank 0 writes the list."""
        if self.places == self._places_listed():
            return
        unlisted, self._unlisted = self._unlisted, []
        self._list_all(self._samples, unlisted, "bad sample")
        assert self.places == self._places_listed()

    def validated(self, records: list[BadRecord], read: int, setting: str = "data.val_split") -> None:
        """Collective. List the bad samples of a validation, `records` on this rank, of `read` clips on all ranks.
        `setting`: null there ends such validations.

        Raises RunStoppedError, on every rank, if their share is past the same limit as training's.
        """
        total = self._list_all(self._of_validation, records, "bad validation sample")
        limit = self._max_fraction * read
        if total > limit:
            last = list(self._of_validation.values())[-1]
            raise RunStoppedError(
                f"{total} bad samples of {read} in the validation are more than data.max_bad_fraction "
                f"{self._max_fraction} allows ({limit:.0f}); one of them: {last.shard} {last.key} of split "
                f"{last.split}: {last.reason}. All are listed in {self._run.uri}/{ARTIFACT}. Prepare the split "
                f"again, raise data.max_bad_fraction, or set {setting} to null"
            )

    def _list_all(self, listed: _Listed, mine: list[BadRecord], what: str) -> int:
        """Collective. List every rank's records and let rank 0 write the list; how many they were."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=self._control)
        records = sorted((r for each in gathered for r in each), key=lambda record: record.place)
        leads = dist.get_rank() == 0
        for record in records:
            if _list(listed, record) and leads:
                print(f"{what}: {record.shard} {record.key}: {record.reason}", flush=True)
        if records and leads:
            content = self.parquet()
            self._run.put(ARTIFACT, content)
            if self._tracker is not None:
                self._tracker.log_bytes(ARTIFACT, content)
        return len(records)

    def parquet(self) -> bytes:
        """The list as a Parquet file."""
        sink = pa.BufferOutputStream()
        rows = [*self.listed(), *self.listed_of_validation()]
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
        return sink.getvalue().to_pybytes()

    def _places_listed(self) -> int:
        return sum(sample.places for sample in self._samples.values())


def _list(listed: _Listed, record: BadRecord) -> bool:
    """Whether the sample is new to the list."""
    name = record.shard, record.key
    new = name not in listed
    if new:
        listed[name] = _Sample(*name, record.reason, 0, record.place, record.place)
    sample = listed[name]
    sample.reason, sample.last_place, sample.split = record.reason, record.place, record.split
    sample.places += 1
    return new


def _restore(listed: _Listed, entry: dict[str, Any]) -> None:
    sample = _Sample(**entry)
    listed[sample.shard, sample.key] = sample
