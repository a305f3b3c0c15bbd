"""What a checkpoint says of itself: where each fragment of the state stands, sizes, digests, releases."""

from __future__ import annotations

from importlib import metadata

import torch
from pydantic import BaseModel, ConfigDict

from arvideo_dist.data.index import FileEntry
from arvideo_dist.train.engine import zero_state

FORMAT_VERSION = 1
KINDS = ("weight", *zero_state.MOMENTS)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is there is damaged; the message says what and where."""

    def __init__(self, message: str, *, passing: bool = False, kind: str = "") -> None:
        """`passing`: time alone may mend it, as when a store does not answer. `kind`: the same for like faults."""
        super().__init__(message)
        self.passing, self.kind = passing, kind


class FragmentEntry(BaseModel):
    """Elements [start, stop) of a flattened parameter stand in `part`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    start: int
    stop: int
    part: str


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    shapes: dict[str, list[int]]
    fragments: list[FragmentEntry]
    parts: list[FileEntry]
    state: FileEntry


def versions() -> dict[str, str]:
    """Releases that wrote a checkpoint, kept in its state."""
    packages = ("arvideo-dist", "torch", "deepspeed", "ray", "mlflow")
    return {name: metadata.version(name) for name in packages}


def check_coverage(manifest: CheckpointManifest) -> None:
    """Assert that the fragments hold every element of every parameter exactly once."""
    ends = dict.fromkeys(manifest.shapes, 0)
    for fragment in sorted(manifest.fragments, key=lambda f: (f.name, f.start)):
        assert fragment.start == ends[fragment.name], f"{fragment} overlaps or leaves a gap"
        ends[fragment.name] = fragment.stop
    for name, shape in manifest.shapes.items():
        assert ends[name] == torch.Size(shape).numel(), f"{name} is written up to {ends[name]} of {shape}"


def shape_of(parameter: torch.nn.Parameter) -> list[int]:
    """The parameter's own shape, also where ZeRO-3 has emptied it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
