"""Embedding: which features of which videos, and the file that they go to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.run import NAME_PATTERN, RunConfigSection
from arvideo_dist.config.section import ALTERS, FREE
from arvideo_dist.config.sequence import SequenceSection


class EmbeddingSection(SequenceSection):
    """Which features are made of each view."""

    pooling: Annotated[Literal["mean", "tokens"], ALTERS] = Field(
        "mean",
        description="mean: over all tokens of the view; tokens: all of them, as the encoder gives them",
    )
    format: Annotated[Literal["parquet", "safetensors"], ALTERS] = Field(
        "parquet",
        description="parquet: a row a view; safetensors: one tensor, and a JSON file with the videos' keys",
    )


class EmbedRunSection(RunConfigSection):
    """Identity, storage and life of the embedding."""

    name: Annotated[str, FREE] = Field(
        "embedding",
        pattern=NAME_PATTERN,
        description="names the embedding's folder; unset: after checkpoint, split, views and pooling",
    )
    storage_path: Annotated[str, FREE] = Field(
        "runs",
        description="folder or URI that every node reaches; unset: embeddings/ of the run of the encoder",
    )


class EmbedDataConfig(DataConfig):
    """The videos; what is unset is as in the run of the encoder."""

    split: Annotated[str, ALTERS] = Field("val", description="split to embed")
