"""Engines of small pretraining models."""

from __future__ import annotations

import torch
from torch import nn

from arvideo_dist.config.optim import OptimConfig, TrainConfig
from arvideo_dist.tasks.pretraining import pretraining_loss
from arvideo_dist.tasks.task import decay_matrices
from arvideo_dist.train.engine.engine import Engine


def engine_of(
    model: nn.Module, train: TrainConfig, optim: OptimConfig | None = None, accumulation_steps: int = 1
) -> Engine:
    """On the CPU."""
    optim = optim or OptimConfig()
    groups = decay_matrices(model, optim.weight_decay)
    return Engine(model, pretraining_loss, groups, train, optim, torch.device("cpu"), accumulation_steps)
