"""Features of every view of every video from a trained encoder, as files that other programs read.

What is downstream of pretraining is the encoder and the mean over its tokens. So the features of any source, also
of a classifier, are what its encoder gives, with the final norm if it has one.

Letters: B views of a micro batch, N videos, V views of each, L tokens of a view, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.data.index import DatasetIndex, load_manifest
from arvideo_dist.data.loader import Batch
from arvideo_dist.model.features import EncoderFeatures
from arvideo_dist.model.vit import ENCODER_SIZES
from arvideo_dist.storage import shown
from arvideo_dist.tasks.activations import forward_activation_bytes
from arvideo_dist.tasks.feature_files import FORMATS, KEYS, FeatureRows, write_keys
from arvideo_dist.tasks.flops import classifier_forward_flops
from arvideo_dist.tasks.sequence import Readers, SequenceTask, Summary, Write, in_order, used_places
from arvideo_dist.tasks.task import Costs

_GROUP_BYTES = 2**25  # of features that are written at a time


class Embedding(SequenceTask[EmbedConfig]):
    """An encoder that makes features."""

    parts_folder = "features"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a view's features: [D], or [L, D] for whole tokens."""
        width = ENCODER_SIZES[self.config.model.encoder].width
        if self.config.embedding.pooling == "mean":
            return (width,)
        return math.prod(self.config.model.token_grid), width

    def costs(self) -> Costs:
        model = self.config.model
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self.build().parameters())
        return Costs(
            parameters=parameters,
            flops_per_clip=classifier_forward_flops(model, 0),
            activation_bytes_per_clip=forward_activation_bytes(model),
            activation_bytes_per_pass=0,
            encoder_tokens=math.prod(model.token_grid),
        )

    def build(self) -> EncoderFeatures:
        model = self.config.model
        return EncoderFeatures(ENCODER_SIZES[model.encoder], model.tubelet, math.prod(model.token_grid))

    def load(self, module: nn.Module, readers: Readers) -> None:
        source = self.config.model.init_from or ""
        try:
            cast(EncoderFeatures, module).load(readers.encoder(source))
        except ValueError as error:
            raise ValueError(f"{shown(source)}: {shown(error)}") from error

    def compute(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Features float32 [B, D], or [B, L, D] for whole tokens."""
        tokens_bld: torch.Tensor = module(batch.clips)
        return tokens_bld.mean(dim=1) if self.config.embedding.pooling == "mean" else tokens_bld

    def rows(self, batch: Batch, values: NDArray[np.float32]) -> pa.Table:
        """A row for each view that could be used: place, features (flat)."""
        used, places = used_places(batch)
        features = pa.FixedSizeListArray.from_arrays(pa.array(values[used].ravel()), math.prod(self.shape))
        return pa.table({"place": places, "features": features})

    def finish(self, parts: Iterable[pa.Table], index: DatasetIndex, write: Write) -> Summary:
        """Writes the features in groups of rows, so that memory holds the rows of one save at most.

        Metrics: how many videos and views have features, and their width.
        """
        per_group = max(1, _GROUP_BYTES // (4 * math.prod(self.shape)))
        counted = {"videos": 0, "views": 0}

        def counting() -> Iterable[FeatureRows]:
            counted.update(videos=0, views=0)
            last = -1
            for group in in_order(parts, per_group):
                videos, views = np.divmod(group["place"].to_numpy(), len(self.views))
                counted["views"] += len(videos)
                counted["videos"] += len(np.unique(videos)) - int(videos[0] == last)
                last = videos[-1]
                values = group["features"].combine_chunks().flatten().to_numpy()
                yield FeatureRows(videos, views, values.reshape(len(videos), -1))

        name, fill = FORMATS[self.config.embedding.format]
        about = self.about()

        def features(path: Path) -> None:
            fill(path, counting(), index, about)

        write(name, features)
        if self.config.embedding.format == "safetensors":
            write(KEYS, lambda path: write_keys(path, index, about))
        found = {**counted, "width": self.shape[-1]}
        return Summary({name: float(number) for name, number in found.items()}, {})

    def about(self) -> dict[str, Any]:
        """What made the features, without credentials: enough to make those of another video alike."""
        config, data = self.config, self.source()
        return {
            "source": shown(config.model.init_from),
            "model": config.model.model_dump(mode="json", exclude={"init_from"}),
            "pooling": config.embedding.pooling,
            "views": str(self.views),
            "shape": list(self.shape),
            "data": {
                "path": data.storage.uri,
                "split": data.split,
                "sampling": data.sampling,
                "stride": data.stride,
                "index_sha256": load_manifest(data.storage, data.split).index.sha256,
            },
        }

    def result_lines(self, metrics: Mapping[str, float], folder: str) -> list[str]:
        name, _ = FORMATS[self.config.embedding.format]
        size = " x ".join(str(size) for size in self.shape)
        lines = [
            f"features    {folder}/{name}",
            f"            {metrics['views']:.0f} views of {metrics['videos']:.0f} videos, {size} numbers each",
        ]
        if self.config.embedding.format == "safetensors":
            lines.insert(1, f"keys        {folder}/{KEYS}")
        return lines
