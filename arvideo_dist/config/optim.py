"""The optimiser, its schedule, length and batch of training, validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arvideo_dist.config.section import ALTERS, FREE, PositiveInt, Section


class OptimConfig(Section):
    """AdamW and its schedule (VideoMAE's protocol, paper 4.1)."""

    base_lr: Annotated[float, ALTERS] = Field(
        1.5e-4, gt=0, description="peak learning rate per 256 clips of global batch"
    )
    base_min_lr: Annotated[float, ALTERS] = Field(
        1e-5, ge=0, description="final learning rate per 256 clips of global batch"
    )
    warmup_epochs: Annotated[float, ALTERS] = Field(40, ge=0, description="linear warm-up from 0, in epochs")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], ALTERS
    ] = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: Annotated[float, ALTERS] = Field(0.05, ge=0, description="not applied to 1-D parameters")
    eps: Annotated[float, ALTERS] = Field(1e-8, gt=0, description="AdamW epsilon")
    clip_grad_norm: Annotated[float | None, ALTERS] = Field(
        None, gt=0, description="largest gradient norm; null: no clipping"
    )


class TrainConfig(Section):
    """Length, batch and numerics of training."""

    epochs: Annotated[float, ALTERS] = Field(800, gt=0, description="passes over the data set")
    steps: Annotated[PositiveInt | None, ALTERS] = Field(
        None, description="optimiser steps; replaces epochs if set"
    )
    global_batch: Annotated[PositiveInt, ALTERS] = Field(
        2048, description="clips of one optimiser step over all workers"
    )
    micro_batch: Annotated[PositiveInt, FREE] = Field(32, description="clips a worker computes at a time")
    precision: Annotated[Literal["auto", "bf16", "fp32"], ALTERS] = Field(
        "auto", description="auto: bf16 on GPUs, fp32 on CPU; bf16 is autocast over fp32 parameters"
    )
    zero_stage: Annotated[int, FREE] = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    log_every_steps: Annotated[PositiveInt, FREE] = Field(
        10, description="optimiser steps between logged points"
    )
    max_bad_steps: Annotated[PositiveInt, FREE] = Field(
        3,
        description="steps in a row whose loss or gradient norm is not finite, none of them applied, at which "
        "train.on_bad_steps says what to do",
    )
    on_bad_steps: Annotated[Literal["rollback", "stop"], FREE] = Field(
        "rollback",
        description="rollback: weights and moments go back to the newest checkpoint's and training goes on with "
        "the samples after the bad steps; stop: the run ends",
    )


def resolve_precision(precision: str, device: str) -> str:
    """What is computed in on a device of this type; `auto` is bf16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" else "fp32"


class ValidationConfig(Section):
    """Loss on the held-out split."""

    every_steps: Annotated[PositiveInt, FREE] = Field(
        2000, description="optimiser steps between validations; also at the end"
    )
    max_clips: Annotated[PositiveInt, FREE] = Field(
        2048, description="first clips of the split that are used"
    )
