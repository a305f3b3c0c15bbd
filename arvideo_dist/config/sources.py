"""The loader's settings of a run, from its configuration."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from arvideo_dist.config.data import DataConfig, MixedData
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import ClipSource, LoaderOptions
from arvideo_dist.storage import Storage


def training_sources(data: DataConfig) -> list[ClipSource]:
    """The run's data sets. Raises ValueError where a path is not set or cannot be opened."""
    if data.path is None:
        raise ValueError(
            "data.path is not set: give the folder or URI that data_prep wrote, as --data.path, in the "
            "YAML file, or as ARVIDEO__DATA__PATH"
        )
    sets: list[tuple[str, DataConfig | MixedData]] = [(data.path, data)]
    sets += [(other.path, other) for other in data.mixture]
    return [
        ClipSource(Storage(path), each.split, each.stride, each.crop_scales, each.weight, each.sampling)
        for path, each in sets
    ]


def validation_source(data: DataConfig) -> ClipSource | None:
    """The held-out split of the first data set, if there is one: the middle of each video, centre crop."""
    assert data.path is not None, "checked before launch"
    if data.val_split is None:
        return None
    return ClipSource(Storage(data.path), data.val_split, data.stride, None, sampling=data.sampling)


def clips_per_epoch(data: DataConfig) -> int:
    """Places of one epoch of the run. Raises ValueError where a data set is missing."""
    samples = sum(load_manifest(source.storage, source.split).samples for source in training_sources(data))
    return data.repeats * samples


def loader_options(data: DataConfig, *, pin_memory: bool) -> LoaderOptions:
    default_cache = Path(tempfile.gettempdir()) / f"arvideo-shards-{os.getuid()}"  # as with the index's cache
    return LoaderOptions(
        repeats=data.repeats,
        repeat_windows=data.repeat_windows,
        shuffle_block_shards=data.shuffle_block_shards,
        device_transforms=data.device_transforms,
        verify_checksums=data.verify_checksums,
        read_retries=data.read_retries,
        shard_cache=Path(data.shard_cache or default_cache).expanduser(),
        shard_cache_gib=data.shard_cache_gib,
        hung_after_seconds=data.hung_worker_s,
        pin_memory=pin_memory,
    )


def validation_options(data: DataConfig, *, pin_memory: bool) -> LoaderOptions:
    """As in training, but each sample once and in the index's order."""
    once = data.model_copy(update={"repeats": 1, "repeat_windows": False, "shuffle_block_shards": None})
    return loader_options(once, pin_memory=pin_memory)
