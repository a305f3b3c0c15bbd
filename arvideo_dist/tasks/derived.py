"""The numbers that follow from a configuration and that a user must be able to trust, computed in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from arvideo_dist.config.commands import SequenceConfig, TrainingConfig
from arvideo_dist.data.order import accumulation_steps
from arvideo_dist.data.views import Views
from arvideo_dist.tasks.kinds import sequence_of, task_of


@dataclass(frozen=True)
class Workload(ABC):
    """What one worker holds and computes."""

    encoder_tokens: int
    decoder_queries: int
    parameters: int
    gflops_per_clip: float  # forward and, in training, backward
    activation_mb_per_clip: float  # kept at a time, 1e6 bytes in fp32; bf16 autocast keeps less
    activation_mb_per_pass: float  # besides, however many clips a micro batch has
    world_size: int  # with cluster.workers [min,max]: max, until the workers know how many they are
    micro_batch: int
    accumulation_steps: int
    samples: int | None  # of the split; None in a dry run without a data set

    @abstractmethod
    def at_world_size(self, world_size: int) -> Self:
        """The same on `world_size` workers."""

    @abstractmethod
    def batch_line(self) -> str:
        """How a step's clips are made, for the terminal."""


@dataclass(frozen=True)
class Derived(Workload):
    """Of a training run. Printed at start, logged with the run, and given as JSON by `--dry-run`."""

    clusters: int | None  # None for a method without clusters
    kept_tokens_per_cluster: int | None
    global_batch: int
    padding_per_step: int  # places of weight 0, if world size x micro batch does not divide the global batch
    peak_lr: float
    min_lr: float
    total_steps: int | None
    warmup_steps: float | None

    @property
    def total_places(self) -> int | None:
        """Places of the sample sequence that the run is planned for."""
        return None if self.total_steps is None else self.total_steps * self.global_batch

    def at_world_size(self, world_size: int) -> Self:
        """The same run on `world_size` workers: the global batch stays, accumulation and padding follow."""
        steps = accumulation_steps(self.global_batch, self.micro_batch, world_size)
        return replace(
            self,
            world_size=world_size,
            accumulation_steps=steps,
            padding_per_step=steps * world_size * self.micro_batch - self.global_batch,
        )

    def batch_line(self) -> str:
        """How the global batch is made, for the terminal."""
        return (
            f"batch: {self.global_batch} clips = {self.world_size} workers x {self.micro_batch} clips x "
            f"{self.accumulation_steps} accumulation steps (padding {self.padding_per_step})"
        )


@dataclass(frozen=True)
class Viewed(Workload):
    """Of a run over views without updates. Printed at start, logged with it, given as JSON by `--dry-run`."""

    views: int  # of each video
    total_places: int | None  # pairs of video and view

    def at_world_size(self, world_size: int) -> Self:
        return replace(self, world_size=world_size)

    def batch_line(self) -> str:
        """How the views are computed, for the terminal."""
        videos = self.micro_batch // self.views
        return f"batch: {videos} videos x {self.views} views on each of {self.world_size} workers"


def derive_sequence(config: SequenceConfig, samples: int | None) -> Viewed:
    """Numbers of a run over the views of `samples` videos."""
    costs, views = sequence_of(config).costs(), len(Views.parse(config.sequence.views))
    return Viewed(
        encoder_tokens=costs.encoder_tokens,
        decoder_queries=0,
        parameters=costs.parameters,
        gflops_per_clip=costs.flops_per_clip / 1e9,
        activation_mb_per_clip=costs.activation_bytes_per_clip / 1e6,
        activation_mb_per_pass=0.0,
        world_size=config.cluster.max_workers,
        micro_batch=views * config.sequence.videos_per_batch,
        accumulation_steps=1,
        samples=samples,
        views=views,
        total_places=None if samples is None else samples * views,
    )


def derive(config: TrainingConfig, samples: int | None) -> Derived:
    """Numbers of a training run over `samples` training samples; ValueError if they contradict each other."""
    costs = task_of(config).costs()
    train, world_size = config.train, config.cluster.max_workers
    accumulation = accumulation_steps(train.global_batch, train.micro_batch, world_size)
    total_steps, warmup_steps = train.steps, None
    if samples is not None:
        steps_per_epoch = samples / train.global_batch
        total_steps = train.steps or int(train.epochs * steps_per_epoch)
        warmup_steps = config.optim.warmup_epochs * steps_per_epoch
        _check_length(config, samples, total_steps, warmup_steps)
    lr_scale = train.global_batch / 256
    return Derived(
        clusters=costs.clusters,
        kept_tokens_per_cluster=costs.kept_tokens_per_cluster,
        encoder_tokens=costs.encoder_tokens,
        decoder_queries=costs.decoder_queries,
        parameters=costs.parameters,
        gflops_per_clip=costs.flops_per_clip / 1e9,
        activation_mb_per_clip=costs.activation_bytes_per_clip / 1e6,
        activation_mb_per_pass=costs.activation_bytes_per_pass / 1e6,
        global_batch=train.global_batch,
        world_size=world_size,
        micro_batch=train.micro_batch,
        accumulation_steps=accumulation,
        padding_per_step=accumulation * world_size * train.micro_batch - train.global_batch,
        peak_lr=config.optim.base_lr * lr_scale,
        min_lr=config.optim.base_min_lr * lr_scale,
        samples=samples,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _check_length(config: TrainingConfig, samples: int, total_steps: int, warmup_steps: float) -> None:
    if samples == 0:
        raise ValueError(f"split {config.data.split!r} at data.path has no samples")
    if total_steps == 0:
        raise ValueError(
            f"train.epochs {config.train.epochs:g} of {samples} samples is less than one step of "
            f"train.global_batch {config.train.global_batch}: lower the batch or set train.steps"
        )
    # With leave for another batch only the checkpoint tells how many of its steps the run has (`schedule.plan_of`).
    planned_here = config.train.steps is None or "train.global_batch" not in config.run.allow_change
    if planned_here and warmup_steps >= total_steps:
        raise ValueError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} is {warmup_steps:.0f} steps, the whole run is "
            f"{total_steps}: set optim.warmup_epochs below {total_steps * config.train.global_batch / samples:g}"
        )
