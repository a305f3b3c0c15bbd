"""Evaluation: which classifier, over which views of which videos."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.run import NAME_PATTERN, RunConfigSection
from arvideo_dist.config.section import ALTERS, FREE, PositiveInt, Section


def _is_views(text: str) -> str:
    from arvideo_dist.data.views import Views

    Views.parse(text)
    return text


class EvaluationSection(Section):
    """How a classifier is evaluated."""

    views: Annotated[str, AfterValidator(_is_views), ALTERS] = Field(
        "5x3",
        description="temporal x spatial views of each video, whose scores are averaged; 5x3 on Kinetics-400, 2x3 "
        "of segments on SSv2",
    )
    videos_per_batch: Annotated[PositiveInt, FREE] = Field(
        1, description="videos that a worker computes at a time, all views of each"
    )
    precision: Annotated[Literal["auto", "bf16", "fp32"], ALTERS] = Field(
        "auto", description="auto: bf16 on GPUs, fp32 on CPU"
    )
    log_every_steps: Annotated[PositiveInt, FREE] = Field(
        20, description="batches of each worker between two progress lines"
    )


class EvaluateRunSection(RunConfigSection):
    """Identity, storage and life of the evaluation."""

    name: Annotated[str, FREE] = Field(
        "evaluation",
        pattern=NAME_PATTERN,
        description="names the evaluation's folder; unset: after checkpoint, split and views",
    )
    storage_path: Annotated[str, FREE] = Field(
        "runs", description="folder or URI that every node reaches; unset: evaluations/ of the run evaluated"
    )


class EvaluateDataConfig(DataConfig):
    """The videos; what is unset is as in the run evaluated."""

    split: Annotated[str, ALTERS] = Field("val", description="split to evaluate")
