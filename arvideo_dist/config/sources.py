"""The loader's settings of a run, from its configuration."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from arvideo_dist.config.data import DataConfig, MixedData, PretrainDataConfig, TrainDataConfig
from arvideo_dist.config.measure import MeasureSection
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import ClipSource, LoaderOptions
from arvideo_dist.data.transforms import MultiScaleCrop
from arvideo_dist.storage import Storage


def data_sets(data: DataConfig) -> list[tuple[Storage, str]]:
    """Storage and split of the data sets that a run reads. Raises ValueError if a path is not set or cannot be
    opened."""
    if data.path is None:
        raise ValueError(
            "data.path is not set: give the folder or URI that data_prep wrote, as --data.path, in the "
            "YAML file, or as ARVIDEO__DATA__PATH"
        )
    others = data.mixture if isinstance(data, PretrainDataConfig) else ()
    return [(Storage(data.path), data.split), *((Storage(other.path), other.split) for other in others)]


def pretraining_sources(data: PretrainDataConfig) -> list[ClipSource]:
    """The data sets of a pretraining run, with multi-scale crops. Raises ValueError as `data_sets` does."""
    sets: tuple[PretrainDataConfig | MixedData, ...] = (data, *data.mixture)
    return [
        ClipSource(storage, split, each.stride, MultiScaleCrop(each.crop_scales), each.weight, each.sampling)
        for (storage, split), each in zip(data_sets(data), sets, strict=True)
    ]


def validation_source(data: TrainDataConfig) -> ClipSource | None:
    """The held-out split of the first data set, if there is one: the middle of each video, centre crop."""
    if data.val_split is None:
        return None
    storage, _ = data_sets(data)[0]
    return ClipSource(storage, data.val_split, data.stride, sampling=data.sampling)


def labelled_sources(data: TrainDataConfig, measure: MeasureSection) -> tuple[ClipSource, ClipSource]:
    """The splits that features are measured on: the middle of each video, centre crop. Raises ValueError as
    `data_sets` does."""
    storage = data_sets(data)[0][0] if measure.path is None else Storage(measure.path)
    train, held_out = (
        ClipSource(storage, split, data.stride, sampling=data.sampling)
        for split in (measure.split_train, measure.split_val)
    )
    return train, held_out


def clips_per_epoch(data: TrainDataConfig) -> int:
    """Places of one epoch of the run. Raises ValueError if a data set is missing."""
    return data.repeats * sum(load_manifest(storage, split).samples for storage, split in data_sets(data))


def loader_options(data: DataConfig, *, pin_memory: bool) -> LoaderOptions:
    """With what care samples are read and, if they are trained on, how they are ordered and made."""
    read = LoaderOptions(
        verify_checksums=data.verify_checksums,
        read_retries=data.read_retries,
        hung_after_seconds=data.hung_worker_s,
        pin_memory=pin_memory,
    )
    if not isinstance(data, TrainDataConfig):
        return read
    default_cache = Path(tempfile.gettempdir()) / f"arvideo-shards-{os.getuid()}"  # as with the index's cache
    return replace(
        read,
        repeats=data.repeats,
        repeat_windows=data.repeat_windows,
        shuffle_block_shards=data.shuffle_block_shards,
        device_transforms=data.device_transforms,
        shard_cache=Path(data.shard_cache or default_cache).expanduser(),
        shard_cache_gib=data.shard_cache_gib,
    )


def validation_options(data: TrainDataConfig, *, pin_memory: bool) -> LoaderOptions:
    """As in training, but each sample once and in the index's order."""
    once = data.model_copy(update={"repeats": 1, "repeat_windows": False, "shuffle_block_shards": None})
    return loader_options(once, pin_memory=pin_memory)
