"""The clips that an analysis looks at: the first ones of a split, middle window and centre crop."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from arvideo_dist.config.data import TrainDataConfig
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import Batch, ClipLoader, ClipSource, Draw
from arvideo_dist.storage import Storage


def choose_source(
    run: TrainDataConfig | None, path: str | None, split: str | None, stride: int | None
) -> ClipSource:
    """The clips of data set `path`, by default those that `run` is validated on.

    Raises ValueError if there is neither, and if the split does not exist.
    """
    if path is None and (run is None or run.path is None):
        raise ValueError("which clips? Give --data PATH, the folder or URI of a data set made by data_prep")
    own = run or TrainDataConfig()
    storage = Storage(path or own.path or "")
    chosen = split or own.val_split or own.split
    load_manifest(storage, chosen)
    return ClipSource(storage, chosen, stride or own.stride)


def load_clips(
    source: ClipSource, clips: int, frames: int, image_size: int, draw: Draw, seed: int
) -> Iterator[Batch]:
    """The first `clips` clips of `source`, in batches of one, with what `draw` draws for them.

    Clips that cannot be decoded are named on stderr and left out. Raises ValueError if none is left.
    """
    number = min(clips, load_manifest(source.storage, source.split).samples)
    loader = ClipLoader(
        [source],
        clip_frames=frames,
        image_size=image_size,
        draw=draw,
        seed=seed,
        position=0,
        global_batch=1,
        micro_batch=1,
        rank=0,
        world_size=1,
        workers=0,
        stop_position=number,
        shuffle=False,
    )
    sound = 0
    for [batch] in loader:
        sound += int(batch.weights.sum())
        for bad in batch.bad:
            print(f"left out: {bad.key} in {bad.shard}: {bad.reason}", file=sys.stderr)
        if not batch.bad:
            yield batch
    if not sound:
        raise ValueError(f"none of the {number} clips of {source.storage.uri} can be decoded")
