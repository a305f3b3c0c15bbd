"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]


Triple = tuple[PositiveInt, PositiveInt, PositiveInt]


class Section(BaseModel):
    """Base of every section: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
