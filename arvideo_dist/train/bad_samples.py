"""Samples that could not be used: weight 0, counted over all ranks, named in an artifact, bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from arvideo_dist.data.loader import BadRecord, Batch
from arvideo_dist.train.deferred import DeferredWrites
from arvideo_dist.train.stop import RunStoppedError

ARTIFACT = "bad_samples.parquet"
_SCHEMA = pa.schema(
    [("place", pa.int64()), ("shard", pa.string()), ("key", pa.string()), ("reason", pa.string())]
)


class BadSamples:
    """The run's bad places, the same list on every rank."""

    def __init__(
        self, run: DeferredWrites, max_fraction: float, num_samples: int, control: dist.ProcessGroup
    ) -> None:
        self._run, self._max_fraction, self._num_samples = run, max_fraction, num_samples
        self._control = control
        self._records: dict[int, BadRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def restore(self, listed: list[dict[str, Any]]) -> None:
        """Begin from what a checkpoint lists."""
        self._records = {record["place"]: BadRecord(**record) for record in listed}

    def listed(self) -> list[dict[str, Any]]:
        """JSON form, for the checkpoint."""
        return [asdict(record) for record in self._records.values()]

    def account(self, batches: Sequence[Batch], total: int, position: int) -> None:
        """Collective where `total`, the number of bad samples in the ranks' `batches`, is not 0: lists them.

        `position`: places consumed before this batch. A small data set's first bad sample is not yet a large
        share of anything, so the fraction is of the places consumed or of one epoch, whichever is more.
        Raises RunStoppedError, on every rank.
        """
        if not total:
            return
        self._add([record for batch in batches for record in batch.bad])
        limit = self._max_fraction * max(position, self._num_samples)
        if len(self) > limit:
            last = next(reversed(self._records.values()))
            raise RunStoppedError(
                f"{len(self)} bad samples are more than data.max_bad_fraction {self._max_fraction} allows "
                f"({limit:.0f}); the last one: {last.shard} {last.key}: {last.reason}. "
                f"All are listed in {self._run.uri}/{ARTIFACT}"
            )

    def _add(self, bad: list[BadRecord]) -> None:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, bad, group=self._control)
        new = [record for records in gathered for record in records if record.place not in self._records]
        self._records.update({record.place: record for record in new})
        if dist.get_rank() == 0:
            for record in new:
                print(f"bad sample: {record.shard} {record.key}: {record.reason}", flush=True)
            self._run.put(ARTIFACT, self.parquet())

    def parquet(self) -> bytes:
        """The list as a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.listed(), schema=_SCHEMA), sink)
        return sink.getvalue().to_pybytes()
