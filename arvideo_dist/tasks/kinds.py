"""The tasks by the command that runs them."""

from __future__ import annotations

from typing import Any

import torch

from arvideo_dist.config.commands import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    SequenceConfig,
    TrainingConfig,
)
from arvideo_dist.tasks.classification import Classification
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.tasks.pretraining import Pretraining
from arvideo_dist.tasks.scoring import Scoring
from arvideo_dist.tasks.sequence import SequenceTask
from arvideo_dist.tasks.task import Task

_TASKS: dict[str, type[Task[Any]]] = {
    PretrainConfig.command: Pretraining,
    FinetuneConfig.command: Classification,
}
_SEQUENCES: dict[str, type[SequenceTask[Any]]] = {
    EvaluateConfig.command: Scoring,
    EmbedConfig.command: Embedding,
}


def task_of(config: TrainingConfig) -> Task[Any]:
    """The task that a command's configuration describes."""
    return _TASKS[config.command](config)


def sequence_of(config: SequenceConfig) -> SequenceTask[Any]:
    """The same of a command that updates nothing."""
    return _SEQUENCES[config.command](config)


def parameter_shapes(config: TrainingConfig) -> dict[str, tuple[int, ...]]:
    """Each parameter's shape, by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in task_of(config).build().named_parameters()}
