"""What is trained or measured, behind one interface. How a run lives (`train/`) knows no task, and a task no run.

Letters: B clips of a micro batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arvideo_dist.config.commands import TrainingConfig
from arvideo_dist.config.measure import MeasureSection

if TYPE_CHECKING:  # the loader wants packages that a bare GPU machine does not have (benchmarks/gpu_check.py)
    from arvideo_dist.data.index import DatasetIndex
    from arvideo_dist.data.loader import Batch, ClipSource, Draw

Config = TypeVar("Config", bound=TrainingConfig)


class Forward(Protocol):
    """The task's module, called through the engine; ZeRO-3 gathers its weights around the call."""

    def __call__(self, *inputs: Any) -> Any: ...


# An encoder's weights, by the names of `model.vit.Encoder`, at a file, folder, run or checkpoint.
ReadWeights = Callable[[str], dict[str, torch.Tensor]]


class ParameterGroup(NamedTuple):
    """Parameters that are updated alike."""

    parameters: list[nn.Parameter]
    weight_decay: float
    lr_scale: float = 1.0  # multiple of the schedule's learning rate


@dataclass(frozen=True)
class Costs:
    """What a training step of the task takes, in closed form: nothing is built for it."""

    parameters: int  # trained
    flops_per_clip: int  # forward and backward
    activation_bytes_per_clip: int  # fp32, kept for the backward pass
    activation_bytes_per_pass: int  # besides, however many clips
    encoder_tokens: int
    decoder_queries: int = 0
    clusters: int | None = None  # None for a method without clusters
    kept_tokens_per_cluster: int | None = None


@dataclass(frozen=True)
class Probed:
    """On which labelled splits features are measured, one clip a video, and how."""

    options: MeasureSection
    train: ClipSource
    held_out: ClipSource
    features: Callable[[Forward, Batch], torch.Tensor]  # of a batch's clips [B, D]


@dataclass
class Measured:
    """What one micro batch says."""

    sums: dict[str, torch.Tensor]  # float64 on the host, of any shape: to be added over batches and ranks
    rows: dict[str, NDArray[Any]] = field(default_factory=dict)  # columns; an entry for each clip of weight 1
    picture: NDArray[np.uint8] | None = None  # [H, W, 3]


class Task(ABC, Generic[Config]):
    """A task of one configuration. Its methods keep nothing, so a task is the same on every rank."""

    # The checkpoint of its largest value is kept beside the last ones.
    best_metric: ClassVar[str | None] = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def settled(self) -> Config:
        """The configuration with what only the data set decides. Raises ValueError if that is not there."""
        return self.config

    def check(self, indexes: Sequence[DatasetIndex]) -> None:
        """ValueError if the task cannot train on these data sets."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the task beside its configuration, as JSON."""
        return {}

    @property
    def batch_unit(self) -> int:
        """Places that share a micro batch at every world size."""
        return 1

    @abstractmethod
    def costs(self) -> Costs: ...

    @abstractmethod
    def build(self) -> nn.Module:
        """The module with fresh weights, drawn from torch's generator."""

    @abstractmethod
    def start_from(self, module: nn.Module, read: ReadWeights) -> str:
        """Give `module` the weights that a run without a checkpoint starts from; for the log, where they are from.

        `read`: an encoder's weights at a file, folder, run or checkpoint. Raises ValueError if they cannot be read
        or do not fit.
        """

    @abstractmethod
    def parameter_groups(self, module: nn.Module) -> list[ParameterGroup]:
        """What the optimiser updates; a parameter that is in no group is frozen."""

    @abstractmethod
    def draw(self) -> Draw:
        """Makes `Batch.inputs` of a sample in the loader's workers, training."""

    @abstractmethod
    def draw_of_validation(self) -> Draw:
        """The same for the held-out split."""

    @abstractmethod
    def sources(self) -> list[ClipSource]:
        """The data sets to train on. Raises ValueError if a path is not set or cannot be opened."""

    @abstractmethod
    def validation_source(self) -> ClipSource | None:
        """The held-out split, None if there is none."""

    def probed(self) -> Probed | None:
        """What the features are measured on while the task trains; None if they are not."""
        return None

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The loss of each clip [B] (float32) of a batch on the device; the run applies the weights."""

    @abstractmethod
    def measure(self, forward: Forward, batch: Batch, *, picture: bool) -> Measured:
        """What a batch of the held-out split says, without gradients. `picture`: whether one is wanted."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of the summed `Measured.sums`; one that nothing was read for is absent."""

    @abstractmethod
    def validation_line(self, metrics: Mapping[str, float]) -> str:
        """The metrics of a validation, for the terminal."""

    @abstractmethod
    def result_lines(self, metrics: Mapping[str, float]) -> str:
        """What the run has reached, for a person, at its end."""


def decay_matrices(module: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Weight decay on matrices only: biases, norms and single learned vectors are 1-D (VideoMAE's rule)."""
    parameters = list(module.parameters())
    return [
        ParameterGroup([p for p in parameters if p.ndim > 1], weight_decay),
        ParameterGroup([p for p in parameters if p.ndim <= 1], 0.0),
    ]
