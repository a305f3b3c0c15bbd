"""What is set of every run over the views of videos that updates nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from arvideo_dist.config.section import ALTERS, FREE, PositiveInt, Section


def _is_views(text: str) -> str:
    from arvideo_dist.data.views import Views

    Views.parse(text)
    return text


ViewsText = Annotated[str, AfterValidator(_is_views), ALTERS]


class SequenceSection(Section):
    """Which views of each video are computed, and how."""

    views: ViewsText = Field("1x1", description="temporal x spatial views of each video")
    videos_per_batch: Annotated[PositiveInt, FREE] = Field(
        1, description="videos that a worker computes at a time, all views of each"
    )
    precision: Annotated[Literal["auto", "bf16", "fp32"], ALTERS] = Field(
        "auto", description="auto: bf16 on GPUs, fp32 on CPU"
    )
    log_every_steps: Annotated[PositiveInt, FREE] = Field(
        20, description="batches of each worker between two progress lines"
    )
