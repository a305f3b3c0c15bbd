"""What the features of the encoder are worth while it is pretrained, measured on labelled videos."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arvideo_dist.config.section import FREE, PositiveInt, Section


class MeasureSection(Section):
    """Simple classifiers on the encoder's frozen features, beside those of an untrained encoder."""

    every_steps: Annotated[PositiveInt | None, FREE] = Field(
        None, description="optimiser steps between measurements; also at the end; null: none"
    )
    path: Annotated[str | None, FREE] = Field(
        None, description="folder or URI of a labelled data set made by data_prep; null: data.path"
    )
    split_train: Annotated[str, FREE] = Field("train", description="split whose labels the classifiers learn")
    split_val: Annotated[str, FREE] = Field("val", description="split that they are asked about")
    max_clips: Annotated[PositiveInt, FREE] = Field(
        2048, description="first videos of each split that are used, one clip of each"
    )
    neighbours: Annotated[PositiveInt, FREE] = Field(
        20, description="nearest training videos that vote for a video's class"
    )
