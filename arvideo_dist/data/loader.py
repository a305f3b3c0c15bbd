"""The loader: from places of the sample sequence to micro batches of clips.

What a batch holds depends on (seed, places) only, never on workers, world size or history: see order.py.
Legend: B micro batch, T frames, S image size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from arvideo_dist.data.cache import ShardCache
from arvideo_dist.data.decode import BadSample, Planes, decode_planes, decode_rgb
from arvideo_dist.data.index import DatasetIndex, SampleRow, ShardEntry, load_manifest, open_index
from arvideo_dist.data.order import (
    PAD,
    Located,
    SampleOrder,
    SampleSequence,
    Stream,
    accumulation_steps,
    places_of_rank,
    sample_generator,
)
from arvideo_dist.data.reader import MemberReader, read_ahead
from arvideo_dist.data.shared import shared_empty
from arvideo_dist.data.transforms import (
    Crop,
    CropDraw,
    PlanarClips,
    center_crop,
    copy_crop,
    crop_and_resize,
    sample_segments,
    sample_window,
)
from arvideo_dist.data.views import Views, spatial_views, temporal_views
from arvideo_dist.data.workers import DecodePool, reading, watched
from arvideo_dist.storage import Storage


class Draw(Protocol):
    """What a task adds to each clip; it is sent to the worker processes."""

    def __call__(self, seed: int, place: int, row: SampleRow) -> Mapping[str, NDArray[Any]]:
        """Arrays by name, of the same shapes for all places, that depend on the arguments only."""


@dataclass(frozen=True)
class ClipSource:
    """One data set of a run and how clips are drawn from it."""

    storage: Storage
    split: str
    stride: int  # source frames from one clip frame to the next
    crop: CropDraw | None = None  # None: middle window and centre crop (validation)
    weight: float = 1.0  # share of the samples, relative to the other sources'
    sampling: Literal["window", "segments"] = "window"
    views: Views | None = None  # the repeats of a sample are these (evaluation)


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are ordered, read and decoded; `config.data.DataConfig` says what each means."""

    repeats: int = 1
    repeat_windows: bool = False
    shuffle_block_shards: int | None = None
    device_transforms: bool = False
    verify_checksums: bool = False
    read_retries: int = 6
    shard_cache: Path | None = None
    shard_cache_gib: float = 0.0
    hung_after_seconds: float = 120.0
    pin_memory: bool = False


@dataclass(frozen=True)
class BadRecord:
    """A sample that could not be used: its place carries weight 0."""

    place: int
    shard: str
    key: str
    reason: str
    split: str = ""  # checkpoints of older releases do not say


@dataclass
class Batch:
    """One rank's micro batch. A clip of weight 0 (padding or a bad sample) is all zeros."""

    clips: torch.Tensor  # uint8 [B, 3, T, S, S], strided as [B, T, S, S, 3]; empty until `to` with planes
    inputs: dict[str, torch.Tensor]  # [B, ...], what the task has drawn for each clip (`Draw`)
    weights: torch.Tensor  # float32 [B], 1 or 0
    places: torch.Tensor  # int64 [B], PAD (-1) if no place is left
    bad: list[BadRecord]
    planes: PlanarClips | None = None  # under device transforms: what `to` makes the clips from
    host_inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # `inputs` as they were before `to`

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, its clips made from the planes there; asynchronous from pinned memory."""
        weights = self.weights.to(device, non_blocking=True)
        if self.planes is None:
            clips = self.clips.to(device, non_blocking=True)
        else:
            clips = self.planes.to(device).to_clips() * (weights > 0)[:, None, None, None, None]
        return replace(
            self,
            clips=clips,
            planes=None,
            inputs={name: each.to(device, non_blocking=True) for name, each in self.inputs.items()},
            host_inputs=self.inputs,
            weights=weights,
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader."""
        return replace(
            self,
            clips=self.clips.pin_memory(),
            planes=None if self.planes is None else self.planes.pin_memory(),
            inputs={name: each.pin_memory() for name, each in self.inputs.items()},
        )


@dataclass
class PlannedClip:
    """What is to become of one slot of a micro batch."""

    slot: int
    place: int
    window: NDArray[np.int64]
    crop: Crop
    spatial_view: int | None = None  # in place of `crop`, one of the views of the whole frame


@dataclass
class Visit:
    """Clips of one sample: one read, one decode."""

    located: Located
    row: SampleRow
    clips: list[PlannedClip] = field(default_factory=list)


class ClipSamples:
    """Maps a list of places to a Batch. This is what is sent to the worker processes."""

    def __init__(
        self,
        sources: Sequence[ClipSource],
        *,
        clip_frames: int,
        image_size: int,
        draw: Draw,
        seed: int,
        shuffle: bool,
        options: LoaderOptions,
    ) -> None:
        self.sources, self.options = list(sources), options
        self.clip_frames, self.image_size = clip_frames, image_size
        self.draw, self.seed = draw, seed
        self.decode_rgb = decode_rgb
        self.indexes: list[DatasetIndex] = []
        self.readers: list[MemberReader] = []
        self.refused: dict[int, str] = {}
        cache = None
        if options.shard_cache is not None and options.shard_cache_gib:
            cache = ShardCache(options.shard_cache, int(options.shard_cache_gib * 2**30))
        orders = []
        for number, source in enumerate(self.sources):
            manifest = load_manifest(source.storage, source.split)
            index = open_index(source.storage, source.split, manifest=manifest)
            shards = manifest.shards
            self.indexes.append(index)
            self.readers.append(
                MemberReader(
                    source.storage,
                    manifest.index.sha256,
                    retries=options.read_retries,
                    verify_checksums=options.verify_checksums,
                    cache=None if source.storage.is_local else cache,
                )
            )
            if options.shuffle_block_shards is not None:
                _check_shard_order(index, shards, source)
            orders.append(
                SampleOrder(
                    len(index),
                    seed + number,
                    shuffle,
                    shard_sizes=[shard.samples for shard in shards],
                    block_shards=options.shuffle_block_shards,
                )
            )
        self.order = SampleSequence(orders, seed, [source.weight for source in self.sources], options.repeats)

    def __getitem__(self, places: list[int]) -> Batch:
        visits = self.plan(places)
        planes = self.empty_planes(len(places), visits) if self.options.device_transforms else None
        clips = torch.zeros(0, dtype=torch.uint8)
        if planes is None:
            # In memory as decoders give pictures, colours last: a transposition would cost a tenth of decoding.
            clips = shared_empty(len(places), self.clip_frames, self.image_size, self.image_size, 3)
            clips = clips.permute(0, 4, 1, 2, 3)
        weights = torch.zeros(len(places))
        bad = []
        fetches = read_ahead([(self.readers[visit.located.source], visit.row) for visit in visits])
        for visit, fetch in zip(visits, fetches, strict=True):
            try:
                with reading(visit.clips[0].place):
                    video = fetch()
                self._fill(clips if planes is None else planes, visit, video)
                weights[[clip.slot for clip in visit.clips]] = 1
            except BadSample as error:
                shard = self._shard_name(visit.located, visit.row)
                split = self.sources[visit.located.source].split
                bad += [
                    BadRecord(clip.place, shard, visit.row.key, str(error), split) for clip in visit.clips
                ]
        if planes is None:
            for slot in (weights == 0).nonzero().flatten().tolist():  # a mask would go through all clips
                clips[slot] = 0
        return Batch(
            clips=clips,
            inputs=self._inputs(places, visits),
            weights=weights,
            places=torch.tensor(places),
            bad=bad,
            planes=planes,
        )

    def _inputs(self, places: Sequence[int], visits: Sequence[Visit]) -> dict[str, torch.Tensor]:
        rows = {clip.place: visit.row for visit in visits for clip in visit.clips}
        if PAD in places and 0 not in rows:  # padding needs inputs as well: those of place 0
            (first,) = self.order.locate([0])
            rows[0] = self.indexes[first.source][first.row]
        real = [max(place, 0) for place in places]
        drawn = [self.draw(self.seed, place, rows[place]) for place in real]
        return {name: torch.from_numpy(np.stack([each[name] for each in drawn])) for name in drawn[0]}

    def names(self, places: Sequence[int]) -> list[tuple[str, str]]:
        """Shard and key of the samples at `places`; the shard with its data set if there are several."""
        located = self.order.locate(places)
        rows = [self.indexes[each.source][each.row] for each in located]
        return [(self._shard_name(each, row), row.key) for each, row in zip(located, rows, strict=True)]

    def _shard_name(self, located: Located, row: SampleRow) -> str:
        if len(self.sources) == 1:
            return row.shard
        return f"{self.sources[located.source].storage.uri}/{row.shard}"

    def plan(self, places: list[int]) -> list[Visit]:
        """The samples behind `places` and every random draw of their clips."""
        slots = [(slot, place) for slot, place in enumerate(places) if place != PAD]
        visits: list[Visit] = []
        for (slot, place), located in zip(
            slots, self.order.locate([place for _, place in slots]), strict=True
        ):
            if not visits or visits[-1].located.visit != located.visit:
                visits.append(Visit(located, self.indexes[located.source][located.row]))
            visits[-1].clips.append(self._planned(slot, place, located, visits[-1].row))
        return visits

    def _planned(self, slot: int, place: int, located: Located, row: SampleRow) -> PlannedClip:
        source, repeats = self.sources[located.source], self.options.repeats
        if source.views is not None:
            temporal, spatial = source.views.locate(place % repeats)
            windows = temporal_views(
                row.frames, self.clip_frames, source.stride, source.sampling, source.views.temporal
            )
            return PlannedClip(slot, place, windows[temporal], center_crop(row.height, row.width), spatial)
        window_rng = crop_rng = None
        if source.crop is not None:
            window_key = place if self.options.repeat_windows else located.visit * repeats
            window_rng = sample_generator(self.seed, window_key, Stream.WINDOW)
            crop_rng = sample_generator(self.seed, place, Stream.CROP)
        if source.sampling == "segments":
            window = sample_segments(row.frames, self.clip_frames, window_rng)
        else:
            window = sample_window(row.frames, self.clip_frames, source.stride, window_rng)
        if source.crop is None or crop_rng is None:
            return PlannedClip(slot, place, window, center_crop(row.height, row.width))
        crop = source.crop.draw(row.height, row.width, self.image_size, crop_rng)
        return PlannedClip(slot, place, window, crop)

    def batch_bytes(self, clips: int) -> int:
        """What the clips or planes of a batch take; with planes an estimate from the first samples."""
        if not self.options.device_transforms:
            return clips * self.clip_frames * 3 * self.image_size**2
        sides = [
            min(size)
            for index in self.indexes
            for size in zip(
                index.table["height"].slice(0, 1000).to_pylist(),
                index.table["width"].slice(0, 1000).to_pylist(),
                strict=True,
            )
        ]
        half = max(sides) // 2 + 1
        return clips * self.clip_frames * 6 * half**2 + 4096

    def empty_planes(self, slots: int, visits: list[Visit]) -> PlanarClips:
        """Canvases large enough for the visits' crops."""
        crops = [clip.crop for visit in visits for clip in visit.clips]
        # Up to one more line on either side, to begin and end at even positions; at least one chroma sample.
        half_h = max((crop.height for crop in crops), default=0) // 2 + 1
        half_w = max((crop.width for crop in crops), default=0) // 2 + 1
        return PlanarClips(
            shared_empty(slots, self.clip_frames, 2 * half_h, 2 * half_w),
            shared_empty(slots, self.clip_frames, 2, half_h, half_w),
            torch.tensor([[0, 0, 1, 1]]).repeat(slots, 1),
            self.image_size,
        )

    def _fill(self, out: torch.Tensor | PlanarClips, visit: Visit, video: bytes) -> None:
        first = visit.clips[0].place
        if first in self.refused:
            raise BadSample(self.refused[first])
        wanted = np.unique(np.concatenate([clip.window for clip in visit.clips]))
        with watched(first, self.options.hung_after_seconds):
            if isinstance(out, PlanarClips):
                planes = decode_planes(video, wanted)
                self._check_size(visit.row, planes[0].y)
                for clip in visit.clips:
                    chosen: list[Planes] = [planes[i] for i in np.searchsorted(wanted, clip.window)]
                    y, uv = out.y[clip.slot].numpy(), out.uv[clip.slot].numpy()
                    out.crops[clip.slot] = torch.tensor(copy_crop(chosen, clip.crop, y, uv))
            else:
                frames = self.decode_rgb(video, wanted)
                self._check_size(visit.row, frames[0])
                views = self.sources[visit.located.source].views
                resized: dict[bytes, torch.Tensor] = {}  # all spatial views of a window
                for clip in visit.clips:
                    pictures = [frames[i] for i in np.searchsorted(wanted, clip.window)]
                    if views is None or clip.spatial_view is None:
                        out[clip.slot] = crop_and_resize(pictures, clip.crop, self.image_size)
                        continue
                    window = clip.window.tobytes()
                    if window not in resized:
                        resized[window] = spatial_views(pictures, self.image_size, views.spatial)
                    out[clip.slot] = resized[window][clip.spatial_view]

    @staticmethod
    def _check_size(row: SampleRow, picture: NDArray[np.uint8]) -> None:
        if picture.shape[:2] != (row.height, row.width):
            raise BadSample(
                f"the file is {picture.shape[1]}x{picture.shape[0]}, the index says {row.width}x{row.height}"
            )


def _check_shard_order(index: DatasetIndex, shards: Sequence[ShardEntry], source: ClipSource) -> None:
    ends = np.cumsum([shard.samples for shard in shards])
    names = [shard.name for shard in shards]
    starts = ends - [shard.samples for shard in shards]
    if ends[-1] != len(index) or index.shards_at(starts) != names or index.shards_at(ends - 1) != names:
        raise ValueError(
            f"the index of split {source.split!r} at {source.storage.uri} does not list the samples shard by "
            "shard: set data.shuffle_block_shards to null, or prepare the data set again"
        )


class ClipLoader:
    """Iterates over optimiser steps; each is the list of this rank's micro batches."""

    def __init__(
        self,
        sources: Sequence[ClipSource],
        *,
        clip_frames: int,
        image_size: int,
        draw: Draw,
        seed: int,
        position: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        stop_position: int | None,
        shuffle: bool = True,
        unit: int = 1,
        options: LoaderOptions = LoaderOptions(),  # frozen
    ) -> None:
        """Loads steps from place `position` on, up to `stop_position` (None: for ever).

        The last step is padded with weight 0 if it passes `stop_position`. Several `sources` are mixed by their
        weights. `draw` makes what the task adds to each clip. A rank takes `unit` places together. `workers=0`
        decodes in this process. Raises ValueError if a split is missing or damaged; iteration raises DataReadError
        if a shard cannot be read and DecodeWorkersError if no worker stays alive.
        """
        self.samples = ClipSamples(
            sources,
            clip_frames=clip_frames,
            image_size=image_size,
            draw=draw,
            seed=seed,
            shuffle=shuffle,
            options=options,
        )
        self.places_per_epoch = self.samples.order.places_per_epoch
        self.position, self.stop_position = position, stop_position
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.workers, self.unit = rank, world_size, workers, unit
        self._pool: DecodePool[Batch] | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = accumulation_steps(self.global_batch, self.micro_batch, self.world_size)
        self._pool = pool = DecodePool[Batch](
            self.samples,
            self.workers,
            self.samples.options.pin_memory,
            self.samples.batch_bytes(self.micro_batch),
        )
        batches = pool.run(self._places())
        try:
            while step := list(itertools.islice(batches, steps)):
                yield step
        finally:
            batches.close()

    def busy_with(self) -> str:
        """The sample that each decode worker is at, for a person who asks why a batch does not come."""
        lines = []
        for worker, doing, place in [] if self._pool is None else self._pool.at():
            (located,) = self.samples.order.locate([place])
            row = self.samples.indexes[located.source][located.row]
            lines.append(f"decode worker {worker} {doing} place {place} ({row.shard}, {row.key})")
        return ", ".join(lines)

    def _places(self) -> Iterator[list[int]]:
        position = self.position
        while self.stop_position is None or position < self.stop_position:
            for places in places_of_rank(
                position, self.global_batch, self.micro_batch, self.rank, self.world_size, self.unit
            ):
                yield [p if self.stop_position is None or p < self.stop_position else PAD for p in places]
            position += self.global_batch
