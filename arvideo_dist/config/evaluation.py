"""Evaluation: which classifier, over which views of which videos."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.run import NAME_PATTERN, RunConfigSection
from arvideo_dist.config.section import ALTERS, FREE
from arvideo_dist.config.sequence import SequenceSection, ViewsText


class EvaluationSection(SequenceSection):
    """How a classifier is evaluated."""

    views: ViewsText = Field(
        "5x3",
        description="temporal x spatial views of each video, whose scores are averaged; 5x3 on Kinetics-400, 2x3 "
        "of segments on SSv2",
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
