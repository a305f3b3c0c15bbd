"""What tasks draw for each clip, in the loader's worker processes: every draw is keyed by seed and place.

Apart from the tasks themselves, so that a worker process imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arvideo_dist.data.augment import Augmentation, draw_clip
from arvideo_dist.data.index import SampleRow
from arvideo_dist.data.mixing import Mixing, draw_pair, first_place_of_pair
from arvideo_dist.data.order import Stream, sample_generator
from arvideo_dist.model.classifier import draw_kept
from arvideo_dist.model.pretraining import Sequences
from arvideo_dist.model.vit import EncoderSize


@dataclass(frozen=True)
class TokenDraw:
    """Which tokens of a clip the encoder sees, `context_ids` [N], and which it predicts, `target_ids` [M]."""

    sequences: Sequences

    def __call__(self, seed: int, place: int, row: SampleRow) -> dict[str, NDArray[np.int64]]:
        context, target = self.sequences.draw_sequence(sample_generator(seed, place, Stream.SEQUENCE))
        return {"context_ids": context, "target_ids": target}


@dataclass(frozen=True)
class TrainingDraw:
    """All that is drawn for a clip beside its window and crop, keyed by its place."""

    augmentation: Augmentation
    mixing: Mixing
    size: EncoderSize
    image_size: int
    repeats: int
    drop_path: float
    head_dropout: float

    def __call__(self, seed: int, place: int, row: SampleRow) -> dict[str, NDArray[Any]]:
        side = self.image_size
        clip = draw_clip(sample_generator(seed, place, Stream.AUGMENT), self.augmentation, side, side)
        first = first_place_of_pair(place, self.repeats)
        pair = draw_pair(sample_generator(seed, first, Stream.MIX), self.mixing, side, side)
        branches, features = draw_kept(
            sample_generator(seed, place, Stream.DROP), self.size, self.drop_path, self.head_dropout
        )
        kept = {"branches": branches, "features": features}
        return {**label_of(seed, place, row), **clip._asdict(), **pair._asdict(), **kept}


def label_of(seed: int, place: int, row: SampleRow) -> dict[str, NDArray[Any]]:
    """What a clip is, and nothing drawn."""
    return {"label": np.array(row.label)}
