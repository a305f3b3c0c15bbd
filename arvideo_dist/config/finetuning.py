"""Fine-tuning: the classifier, its augmentation and VideoMAE's recipe for Kinetics-400 as defaults."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from arvideo_dist.config.model import EncoderConfig
from arvideo_dist.config.optim import OptimConfig, TrainConfig
from arvideo_dist.config.run import NAME_PATTERN, RunConfigSection
from arvideo_dist.config.section import ALTERS, FREE, RESHAPES, PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ClassifierConfig(EncoderConfig):
    """The encoder over all tokens, mean pooling, a fresh norm and a linear head."""

    init_from: Annotated[
        str | None, BeforeValidator(lambda value: None if value == "none" else value), ALTERS
    ] = Field(
        None,
        description="what the encoder starts from: a run of this project or one of its checkpoints, an export, a "
        "transformers folder, or a .safetensors, .pth, .pt or .bin file in VideoMAE's layout; null or none: random",
    )
    classes: Annotated[PositiveInt | None, RESHAPES] = Field(
        None, description="number of classes; null: as many as the data set's label map has"
    )
    drop_path: Annotated[float, ALTERS] = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of samples whose last block's branches are dropped; linearly less below",
    )
    head_dropout: Annotated[float, ALTERS] = Field(
        0.0, ge=0, lt=1, description="dropout of the pooled features before the head"
    )
    head_init_scale: Annotated[float, ALTERS] = Field(
        0.001, gt=0, description="factor of the head's start weights, of deviation 0.02"
    )


class AugmentConfig(Section):
    """What is drawn for each training clip, beside its window."""

    crop_scale: Annotated[tuple[Positive, Positive], ALTERS] = Field(
        (0.08, 1.0), description="random resized crop: least and largest share of the frame's area"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], ALTERS] = Field(
        (0.75, 1.3333), description="random resized crop: least and largest width to height"
    )
    rand_augment_operations: Annotated[int, ALTERS] = Field(
        4, ge=0, description="RandAugment: operations drawn for a clip; 0: none"
    )
    rand_augment_level: Annotated[float, ALTERS] = Field(
        7.0, ge=0, le=10, description="RandAugment: mean of the operations' levels"
    )
    rand_augment_level_std: Annotated[float, ALTERS] = Field(
        0.5, ge=0, description="RandAugment: deviation of the levels"
    )
    rand_augment_prob: Annotated[Share, ALTERS] = Field(
        0.5, description="RandAugment: probability of a drawn operation to be applied"
    )
    flip: Annotated[Share, ALTERS] = Field(
        0.5, description="probability of a horizontal flip; 0 if labels tell left from right, as on SSv2"
    )
    erase: Annotated[Share, ALTERS] = Field(
        0.25, description="probability that a box of all frames is filled with noise"
    )
    mixup: Annotated[float, ALTERS] = Field(
        0.8, ge=0, description="mixup: a pair's share is drawn from Beta(mixup, mixup); 0: no mixup"
    )
    cutmix: Annotated[float, ALTERS] = Field(
        1.0, ge=0, description="cutmix: a pair's share is drawn from Beta(cutmix, cutmix); 0: no cutmix"
    )
    mix_prob: Annotated[Share, ALTERS] = Field(1.0, description="probability of a pair to be mixed at all")
    mix_switch_prob: Annotated[Share, ALTERS] = Field(
        0.5, description="probability of a mixed pair to be cut instead, if both are on"
    )
    label_smoothing: Annotated[float, ALTERS] = Field(
        0.1, ge=0, lt=1, description="share of a label that is spread over all classes"
    )

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        for name in ("crop_scale", "crop_ratio"):
            least, largest = getattr(self, name)
            if least > largest:
                raise ValueError(f"{name} {(least, largest)}: give the least one first")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale {self.crop_scale}: no crop is larger than its frame; set at most 1")
        return self

    @property
    def mixes(self) -> bool:
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer decay."""

    base_lr: Annotated[float, ALTERS] = Field(
        1e-3, gt=0, description="peak learning rate of the head per 256 clips of global batch"
    )
    base_min_lr: Annotated[float, ALTERS] = Field(
        1e-6, ge=0, description="final learning rate of the head per 256 clips of global batch"
    )
    warmup_epochs: Annotated[float, ALTERS] = Field(5, ge=0, description="linear warm-up from 0, in epochs")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], ALTERS
    ] = Field((0.9, 0.999), description="AdamW betas")
    layer_decay: Annotated[float, ALTERS] = Field(
        0.75, gt=0, le=1, description="factor of the learning rate from one layer to the one below; 1: none"
    )


class FinetuneTrainConfig(TrainConfig):
    """Length, batch and numerics of fine-tuning."""

    epochs: Annotated[float, ALTERS] = Field(100, gt=0, description="passes over the data set")
    global_batch: Annotated[PositiveInt, ALTERS] = Field(
        512, description="clips of one optimiser step over all workers"
    )
    micro_batch: Annotated[PositiveInt, FREE] = Field(8, description="clips a worker computes at a time")


class FinetuneRunSection(RunConfigSection):
    """Identity, storage and life of the run."""

    name: Annotated[str, FREE] = Field(
        "finetune-vit-b-k400", pattern=NAME_PATTERN, description="names the run's folder"
    )
