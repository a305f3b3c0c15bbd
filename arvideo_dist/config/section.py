"""What every section of the configuration is made of, and what of it may change when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Triple = tuple[PositiveInt, PositiveInt, PositiveInt]


class OnResume(Enum):
    """What a change of a field does to a run that goes on from a checkpoint; stands on every field."""

    FREE = "where, how fast, how often and with what care: up to rounding the result is the same"
    ALTERS = "other weights after the same number of steps: refused, but for what run.allow_change names"
    RESHAPES = "other shapes of the parameters: the checkpoint does not fit, so no leave helps"


FREE, ALTERS, RESHAPES = OnResume


class Section(BaseModel):
    """Base of every section: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def fields_on_resume(section: type[BaseModel], prefix: str = "") -> dict[str, OnResume]:
    """Dotted name of each field below `section`, however deep, with what its change does.

    A field that is a list of sections counts as one. TypeError if a field does not say.
    """
    found: dict[str, OnResume] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields_on_resume(inner, f"{prefix}{name}.")
            continue
        said = [each for each in field.metadata if isinstance(each, OnResume)]
        if len(said) != 1:
            raise TypeError(f"{section.__name__}.{name} does not say what its change does on resume")
        found[f"{prefix}{name}"] = said[0]
    return found


def value_at(values: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name in dumped sections; KeyError if it is not there."""
    for part in name.split("."):
        values = values[part]
    return values
