"""The loader: worker processes that turn places of the sample sequence into micro batches.

What a batch holds depends on (seed, places) only, never on workers, world size or history: see order.py.
Legend: B micro batch, T frames, S image size, N context tokens, M target tokens.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from arvideo_dist.data.decode import BadSample, decode_frames
from arvideo_dist.data.index import SampleRow, open_index
from arvideo_dist.data.order import (
    PAD,
    SampleOrder,
    Stream,
    accumulation_steps,
    places_of_rank,
    sample_generator,
)
from arvideo_dist.data.reader import MemberReader
from arvideo_dist.data.transforms import center_crop, crop_and_resize, draw_multi_scale_crop, sample_window
from arvideo_dist.storage import Storage

Sequence = Callable[[np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]

# Imported once in the fork server, so that a worker starts in milliseconds and shares their memory.
_PRELOAD = ["torch.utils.data", "pyarrow.fs", "pyarrow.parquet", "decord", "arvideo_dist.data.loader"]
_PREFETCH_PER_WORKER = 2  # micro batches; bounds what waits in shared memory (back-pressure)


@dataclass(frozen=True)
class BadRecord:
    """A sample that could not be used: its place carries weight 0."""

    place: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """One micro batch of one rank. Where weight is 0 (padding, bad sample) the clip is all zeros."""

    clips: torch.Tensor  # uint8 [B, 3, T, S, S]
    context_ids: torch.Tensor  # int64 [B, N], tokens the encoder sees, in prediction order
    target_ids: torch.Tensor  # int64 [B, M], tokens to predict, in prediction order
    weights: torch.Tensor  # float32 [B], 1 or 0
    places: torch.Tensor  # int64 [B], PAD (-1) where no place is left
    bad: list[BadRecord]


@dataclass(frozen=True)
class ClipSource:
    """How places become clips; everything a worker process needs, small enough to be sent to it."""

    storage: Storage
    split: str
    clip_frames: int
    stride: int
    image_size: int
    crop_scales: tuple[float, ...] | None
    sequence: Sequence
    seed: int
    shuffle: bool


class _MicroBatches(Dataset[Batch]):
    """Maps a list of places to a Batch; the map-style data set of the torch DataLoader."""

    def __init__(self, source: ClipSource) -> None:
        self.source = source
        self.index = open_index(source.storage, source.split)
        self.order = SampleOrder(len(self.index), source.seed, source.shuffle)
        self.reader = MemberReader(source.storage)

    def __getitem__(self, places: list[int]) -> Batch:
        source = self.source
        clips = _shared_zeros(len(places), 3, source.clip_frames, source.image_size, source.image_size)
        weights = torch.zeros(len(places))
        bad = []
        for slot, place in enumerate(places):
            if place == PAD:
                continue
            row = self.index[self.order.locate(place)[1]]
            try:
                clips[slot] = self._clip(place, row)
                weights[slot] = 1
            except BadSample as error:
                bad.append(BadRecord(place, row.shard, row.key, str(error)))
        drawn = [
            source.sequence(sample_generator(source.seed, max(place, 0), Stream.SEQUENCE)) for place in places
        ]
        return Batch(
            clips=clips,
            context_ids=torch.from_numpy(np.stack([context for context, _ in drawn])),
            target_ids=torch.from_numpy(np.stack([target for _, target in drawn])),
            weights=weights,
            places=torch.tensor(places),
            bad=bad,
        )

    def _clip(self, place: int, row: SampleRow) -> torch.Tensor:
        source = self.source
        augment = source.crop_scales is not None
        window_rng = sample_generator(source.seed, place, Stream.WINDOW) if augment else None
        window = sample_window(row.frames, source.clip_frames, source.stride, window_rng)
        frames = decode_frames(self.reader.read(row), window)
        height, width = frames.shape[1:3]
        if source.crop_scales is None:
            crop = center_crop(height, width)
        else:
            crop_rng = sample_generator(source.seed, place, Stream.CROP)
            crop = draw_multi_scale_crop(height, width, source.image_size, source.crop_scales, crop_rng)
        return crop_and_resize(frames, crop, source.image_size)


class ClipLoader:
    """Iterates over optimiser steps; each is the list of this rank's micro batches."""

    def __init__(
        self,
        storage: Storage,
        split: str,
        *,
        clip_frames: int,
        stride: int,
        image_size: int,
        crop_scales: tuple[float, ...] | None,
        sequence: Sequence,
        seed: int,
        position: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        stop_position: int | None,
        shuffle: bool = True,
    ) -> None:
        """Loads steps from place `position` on, up to `stop_position` (None: for ever).

        The last step is padded with weight 0 where it passes `stop_position`. `crop_scales=None` takes the
        middle window and a centre crop (validation). `sequence(rng)` draws one sample's (context_ids,
        target_ids), always of the same lengths. `workers=0` decodes in this process. Raises ValueError where
        the split is missing or damaged; iteration raises DataReadError where a shard cannot be read.
        """
        source = ClipSource(
            storage, split, clip_frames, stride, image_size, crop_scales, sequence, seed, shuffle
        )
        self.micro_batches = _MicroBatches(source)
        self.num_samples = len(self.micro_batches.index)
        self.position, self.stop_position = position, stop_position
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.workers = rank, world_size, workers

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = accumulation_steps(self.global_batch, self.micro_batch, self.world_size)
        step: list[Batch] = []
        for batch in self._data_loader():
            step.append(batch)
            if len(step) == steps:
                yield step
                step = []

    def _places(self) -> Iterator[list[int]]:
        position = self.position
        while self.stop_position is None or position < self.stop_position:
            for places in places_of_rank(
                position, self.global_batch, self.micro_batch, self.rank, self.world_size
            ):
                yield [p if self.stop_position is None or p < self.stop_position else PAD for p in places]
            position += self.global_batch

    def _data_loader(self) -> DataLoader[Batch]:
        with_workers: dict[str, Any] = {}
        if self.workers:
            with_workers = {
                "multiprocessing_context": _WorkerContext(),
                "worker_init_fn": _follow_parent,
                "prefetch_factor": _PREFETCH_PER_WORKER,
            }
        return DataLoader(
            self.micro_batches,
            sampler=self._places(),
            batch_size=None,  # an index is a whole micro batch
            collate_fn=_as_is,  # type: ignore[arg-type]  # gets what the data set returned
            num_workers=self.workers,
            generator=torch.Generator(),  # else the loader draws from the rank's own generator
            **with_workers,
        )


def _as_is(batch: Batch) -> Batch:
    return batch


def _shared_zeros(*shape: int) -> torch.Tensor:
    """uint8 zeros; in a worker they lie in shared memory at once, which saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape)  # the system hands out zeroed pages


def _follow_parent(worker_id: int) -> None:
    """Die with the rank, also when it is killed. torch's own watch looks at the parent process, which for a
    worker from the fork server is the fork server, and that one lives as long as any worker does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


class _WorkerProcess(multiprocessing.context.ForkServerProcess):
    """A process that does not run the parent's main module again."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  # multiprocessing's hook
        with _hidden_main():
            return multiprocessing.context.ForkServerProcess._Popen(process_obj)


class _WorkerContext(multiprocessing.context.ForkServerContext):
    """Processes from a fork server: safe where the rank has threads (Ray, NCCL), cheaper than spawn."""

    Process = _WorkerProcess

    def __init__(self) -> None:
        self.set_forkserver_preload(_PRELOAD)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Hides where `__main__` came from: multiprocessing would import it again in each child, and in a Ray
    worker it is Ray's own worker script."""
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {
        name: main.__dict__[name] for name in ("__spec__", "__file__") if name in main.__dict__
    }
    main.__dict__.update(__spec__=None, __file__=None)
    try:
        yield
    finally:
        main.__dict__.update(kept)
