"""The roots of configuration trees, one a command; defaults: the paper's K400 ViT-B recipe.

`settings.py` fills them from files, environment and flags; `tasks/derived.py` computes what follows from them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

from pydantic import Field, model_validator

from arvideo_dist.config.data import DataConfig, PretrainDataConfig, TrainDataConfig
from arvideo_dist.config.embedding import EmbedDataConfig, EmbeddingSection, EmbedRunSection
from arvideo_dist.config.evaluation import EvaluateDataConfig, EvaluateRunSection, EvaluationSection
from arvideo_dist.config.finetuning import (
    AugmentConfig,
    ClassifierConfig,
    FinetuneOptimConfig,
    FinetuneRunSection,
    FinetuneTrainConfig,
)
from arvideo_dist.config.measure import MeasureSection
from arvideo_dist.config.model import DecoderConfig, EncoderConfig, ModelConfig
from arvideo_dist.config.optim import OptimConfig, TrainConfig, ValidationConfig, resolve_precision
from arvideo_dist.config.run import ClusterConfig, RunConfigSection, TrackingConfig
from arvideo_dist.config.section import Section, value_at
from arvideo_dist.config.sequence import SequenceSection


class RunConfig(Section):
    """What every command has that starts a run; each narrows the sections that it knows more of."""

    command: ClassVar[str]
    precision_field: ClassVar[str]  # dotted
    shortcuts: ClassVar[dict[str, str]] = {}  # of the command line: field to flag

    run: RunConfigSection = Field(default_factory=RunConfigSection)
    data: DataConfig = Field(default_factory=DataConfig)
    model: EncoderConfig = Field(default_factory=EncoderConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @property
    def precision(self) -> str:
        """As given: auto, bf16 or fp32."""
        precision: str = value_at(self.model_dump(), self.precision_field)
        return precision

    def precision_on(self, device: str) -> str:
        """What is computed in on a device of this type."""
        return resolve_precision(self.precision, device)


class TrainingConfig(RunConfig):
    """What every command has that trains."""

    precision_field = "train.precision"
    shortcuts: ClassVar[dict[str, str]] = {"model.init_from": "init-from"}

    data: TrainDataConfig = Field(default_factory=TrainDataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)


class PretrainConfig(TrainingConfig):
    """A whole pretraining run."""

    command = "pretrain"

    data: PretrainDataConfig = Field(default_factory=PretrainDataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    measure: MeasureSection = Field(default_factory=MeasureSection)

    @model_validator(mode="after")
    def _check_decoder_of_kind(self) -> PretrainConfig:
        if self.model.kind == "videomae" and (self.decoder.self_attention or self.decoder.target_ratio < 1):
            raise ValueError(
                "decoder.self_attention and decoder.target_ratio belong to model.kind arvideo; videomae's decoder "
                "always has self-attention and predicts every masked token: leave both unset"
            )
        return self


class FinetuneConfig(TrainingConfig):
    """A whole fine-tuning run: an encoder becomes a classifier of videos."""

    command = "finetune"

    run: FinetuneRunSection = Field(default_factory=FinetuneRunSection)
    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = Field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = Field(default_factory=FinetuneTrainConfig)

    @model_validator(mode="after")
    def _check_pairs(self) -> FinetuneConfig:
        """Clips are mixed in pairs that share a micro batch at every world size (`data/mixing.py`)."""
        unit = self.batch_unit
        for name in ("global_batch", "micro_batch"):
            if (clips := getattr(self.train, name)) % unit:
                raise ValueError(
                    f"train.{name} {clips} is no multiple of {unit}, as mixup and cutmix want (2 x data.repeats): "
                    f"set it to {max(unit, clips - clips % unit)}, or augment.mixup and augment.cutmix to 0"
                )
        return self

    @property
    def batch_unit(self) -> int:
        """Places that one rank takes together."""
        return 2 * self.data.repeats if self.augment.mixes else 1


class SequenceConfig(RunConfig):
    """What every command has that computes something of all views of a split's videos and updates nothing."""

    @property
    @abstractmethod
    def sequence(self) -> SequenceSection:
        """The command's own section."""

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        temporal = int(self.sequence.views.partition("x")[0])
        if self.data.sampling == "segments" and temporal > 2:
            section = self.precision_field.partition(".")[0]
            raise ValueError(
                f"{section}.views {self.sequence.views}: segments have 1 or 2 temporal views, as in 2x3 (SSv2)"
            )
        return self


class EvaluateConfig(SequenceConfig):
    """The evaluation of a classifier."""

    command = "evaluate"
    precision_field = "evaluation.precision"
    shortcuts: ClassVar[dict[str, str]] = {"data.path": "data", "evaluation.views": "views"}

    run: EvaluateRunSection = Field(default_factory=EvaluateRunSection)
    data: EvaluateDataConfig = Field(default_factory=EvaluateDataConfig)
    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)

    @property
    def sequence(self) -> EvaluationSection:
        return self.evaluation


class EmbedConfig(SequenceConfig):
    """Features of videos from a trained encoder."""

    command = "embed"
    precision_field = "embedding.precision"
    shortcuts: ClassVar[dict[str, str]] = {
        "data.path": "data",
        "data.split": "split",
        "embedding.views": "views",
        "embedding.pooling": "pooling",
        "embedding.format": "format",
    }

    run: EmbedRunSection = Field(default_factory=EmbedRunSection)
    data: EmbedDataConfig = Field(default_factory=EmbedDataConfig)
    embedding: EmbeddingSection = Field(default_factory=EmbeddingSection)

    @property
    def sequence(self) -> EmbeddingSection:
        return self.embedding


ROOTS: dict[str, type[RunConfig]] = {
    root.command: root for root in (PretrainConfig, FinetuneConfig, EvaluateConfig, EmbedConfig)
}
