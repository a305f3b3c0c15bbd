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


class TensorEntry(BaseModel):
    """A tensor that is stored whole; `dtype` by PyTorch's name, such as `int64`."""

    model_config = ConfigDict(extra="forbid")
    shape: list[int]
    dtype: str


class UntrainedEntry(BaseModel):
    """Frozen parameters and persistent buffers, by name; `part` holds them all."""

    model_config = ConfigDict(extra="forbid")
    part: str
    tensors: dict[str, TensorEntry]


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    shapes: dict[str, list[int]]  # of the parameters that the optimiser updates
    fragments: list[FragmentEntry]  # of these
    untrained: UntrainedEntry | None = None  # None if the optimiser updates all that the module holds
    parts: list[FileEntry]
    state: FileEntry

    def kinds_of_tensors(self) -> dict[str, tuple[list[int], str]]:
        """Shape and type of every tensor of the module that was saved, by name."""
        untrained = {} if self.untrained is None else self.untrained.tensors
        trained = {name: (shape, "float32") for name, shape in self.shapes.items()}
        return trained | {name: (tensor.shape, tensor.dtype) for name, tensor in untrained.items()}


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


def shape_of(tensor: torch.Tensor) -> list[int]:
    """The tensor's own shape, also that of a parameter which ZeRO-3 has emptied."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def type_name(tensor: torch.Tensor) -> str:
    """PyTorch's name of its type, such as `int64`."""
    return str(tensor.dtype).removeprefix("torch.")
