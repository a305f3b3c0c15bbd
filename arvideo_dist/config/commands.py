"""The roots of configuration trees, one a command; defaults: the paper's K400 ViT-B recipe.

`settings.py` fills them from files, environment and flags; `tasks/derived.py` computes what follows from them.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.model import DecoderConfig, EncoderConfig, ModelConfig
from arvideo_dist.config.optim import OptimConfig, TrainConfig, ValidationConfig
from arvideo_dist.config.run import ClusterConfig, RunConfigSection, TrackingConfig
from arvideo_dist.config.section import Section


class RunConfig(Section):
    """What every command has that starts a run; each narrows the sections that it knows more of."""

    command: ClassVar[str]

    run: RunConfigSection = Field(default_factory=RunConfigSection)
    data: DataConfig = Field(default_factory=DataConfig)
    model: EncoderConfig = Field(default_factory=EncoderConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)


class PretrainConfig(RunConfig):
    """A whole pretraining run."""

    command = "pretrain"

    model: ModelConfig = Field(default_factory=ModelConfig)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)

    @model_validator(mode="after")
    def _check_decoder_of_kind(self) -> PretrainConfig:
        if self.model.kind == "videomae" and (self.decoder.self_attention or self.decoder.target_ratio < 1):
            raise ValueError(
                "decoder.self_attention and decoder.target_ratio belong to model.kind arvideo; videomae's decoder "
                "always has self-attention and predicts every masked token: leave both unset"
            )
        return self


ROOTS: dict[str, type[RunConfig]] = {root.command: root for root in (PretrainConfig,)}
