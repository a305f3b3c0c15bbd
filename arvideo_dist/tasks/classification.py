"""Fine-tuning: an encoder becomes a classifier of videos, by VideoMAE's recipe (reference: MCG-NJU/VideoMAE).

Letters: B clips, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.config.sources import data_sets, validation_source
from arvideo_dist.data.augment import Augmentation, ClipDraws, ResizedCrop
from arvideo_dist.data.index import DatasetIndex, load_manifest, open_index
from arvideo_dist.data.loader import Batch, ClipSource, Draw
from arvideo_dist.data.mixing import MixDraws, Mixing, mix, soft_targets
from arvideo_dist.model.classifier import Classifier, Kept, layer_scale, soft_cross_entropy
from arvideo_dist.model.interchange import fill_encoder
from arvideo_dist.model.pretraining import IMAGENET_MEAN, IMAGENET_STD
from arvideo_dist.model.vit import ENCODER_SIZES
from arvideo_dist.tasks.activations import classifier_activation_bytes
from arvideo_dist.tasks.draws import TrainingDraw, label_of
from arvideo_dist.tasks.flops import classifier_flops
from arvideo_dist.tasks.task import Costs, Forward, Measured, ParameterGroup, ReadWeights, Task

TOP_5 = 5


class Classification(Task[FinetuneConfig]):
    """One label a video."""

    best_metric = "accuracy/top1"

    def costs(self) -> Costs:
        model = self.config.model
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self.build().parameters())
        tokens = int(np.prod(model.token_grid))
        return Costs(
            parameters=parameters,
            flops_per_clip=classifier_flops(model, self.classes()),
            activation_bytes_per_clip=classifier_activation_bytes(model),
            activation_bytes_per_pass=0,
            encoder_tokens=tokens,
        )

    def settled(self) -> FinetuneConfig:
        model = self.config.model.model_copy(update={"classes": self.classes()})
        return self.config.model_copy(update={"model": model})

    def facts(self) -> dict[str, Any]:
        return {"class_names": names_of_classes(self.config.data, self.classes())}

    @property
    def batch_unit(self) -> int:
        return self.config.batch_unit

    def classes(self) -> int:
        """ValueError if neither the configuration nor the data set tells."""
        if self.config.model.classes is not None:
            return self.config.model.classes
        storage, split = data_sets(self.config.data)[0]
        if names := load_manifest(storage, split).labels:
            return len(names)
        raise ValueError(
            f"split {split!r} at {storage.uri} has no labels: prepare it with its annotations (python -m data_prep "
            "--help), or with --labels-from-folders"
        )

    def build(self) -> Classifier:
        return build_classifier(self.config.model, self.classes())

    def start_from(self, module: nn.Module, read: ReadWeights) -> str:
        return fill_encoder(cast(Classifier, module).encoder, self.config.model.init_from, read)

    def parameter_groups(self, module: nn.Module) -> list[ParameterGroup]:
        """A group for each layer's rate and weight decay: layer decay (BEiT), and decay on matrices only."""
        optim, depth = self.config.optim, ENCODER_SIZES[self.config.model.encoder].depth
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            scale = layer_scale(name, depth, optim.layer_decay)
            groups.setdefault((scale, decay), []).append(parameter)
        return [ParameterGroup(group, decay, scale) for (scale, decay), group in groups.items()]

    def draw(self) -> TrainingDraw:
        given, model = self.config.augment, self.config.model
        mixes = given.mix_prob if given.mixes else 0.0
        return TrainingDraw(
            Augmentation(
                level=given.rand_augment_level,
                operations=given.rand_augment_operations,
                level_std=given.rand_augment_level_std,
                operation_prob=given.rand_augment_prob,
                flip_prob=given.flip,
                erase_prob=given.erase,
            ),
            Mixing(given.mixup, given.cutmix, mixes, given.mix_switch_prob),
            ENCODER_SIZES[model.encoder],
            model.image_size,
            self.config.data.repeats,
            model.drop_path,
            model.head_dropout,
        )

    def draw_of_validation(self) -> Draw:
        return label_of

    def sources(self) -> list[ClipSource]:
        data = self.config.data
        storage, split = data_sets(data)[0]
        crop = ResizedCrop(self.config.augment.crop_scale, self.config.augment.crop_ratio)
        return [ClipSource(storage, split, data.stride, crop, sampling=data.sampling)]

    def validation_source(self) -> ClipSource | None:
        return validation_source(self.config.data)

    def check(self, indexes: Sequence[DatasetIndex]) -> None:
        check_labels(indexes, self.classes())
        if (held_out := self.validation_source()) is not None:
            check_labels([open_index(held_out.storage, held_out.split)], self.classes())

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Cross-entropy with mixed, smoothed labels [B], of augmented clips."""
        from arvideo_dist.data.pixels import augment  # imports kornia, which no other task needs

        inputs, host = batch.inputs, batch.host_inputs
        targets_bk = soft_targets(inputs["label"], self.classes(), self.config.augment.label_smoothing)
        draws = ClipDraws(*(host[name] for name in ClipDraws._fields))
        clips = augment(batch.clips, draws, IMAGENET_MEAN, IMAGENET_STD)
        if self.config.augment.mixes:
            pairs = MixDraws(inputs["share"], inputs["box"])
            clips, targets_bk = mix(clips, targets_bk, batch.weights, pairs, self.config.data.repeats)
        logits_bk = forward(clips, Kept(inputs["branches"], inputs["features"]))
        return soft_cross_entropy(logits_bk, targets_bk)

    def measure(self, forward: Forward, batch: Batch, *, picture: bool) -> Measured:
        """Sums of cross-entropy with the plain label, and of labels among the first and the first five guesses."""
        logits_bk, labels_b = forward(batch.clips).double().cpu(), batch.host_inputs["label"]
        weights_b = batch.weights.double().cpu()
        losses_b = F.cross_entropy(logits_bk, labels_b.clamp(min=0), reduction="none")
        ranks_b = (logits_bk > logits_bk.gather(1, labels_b.clamp(min=0)[:, None])).sum(1)
        return Measured(
            {
                "loss": (losses_b * weights_b).sum(),
                "weight": weights_b.sum(),
                "top1": ((ranks_b < 1) * weights_b).sum(),
                "top5": ((ranks_b < TOP_5) * weights_b).sum(),
            }
        )

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`loss/val`, `accuracy/top1`, `accuracy/top5` (shares)."""
        weight = float(sums["weight"])
        if not weight:
            return {}
        return {
            "loss/val": float(sums["loss"]) / weight,
            "accuracy/top1": float(sums["top1"]) / weight,
            "accuracy/top5": float(sums["top5"]) / weight,
        }

    def validation_line(self, metrics: Mapping[str, float]) -> str:
        if "loss/val" not in metrics:
            return ""
        return (
            f"loss/val {metrics['loss/val']:.4f}  top-1 {metrics['accuracy/top1']:.2%}  "
            f"top-5 {metrics['accuracy/top5']:.2%}"
        )

    def result_lines(self, metrics: Mapping[str, float]) -> str:
        return (
            f"top-1 {metrics['accuracy/top1']:.2%}, top-5 {metrics['accuracy/top5']:.2%} of one view a video "
            f"({self.classes()} classes), loss {metrics['loss/val']:.4f}"
        )


def build_classifier(model: ClassifierConfig, classes: int) -> Classifier:
    """With fresh weights."""
    return Classifier(
        ENCODER_SIZES[model.encoder],
        model.tubelet,
        int(np.prod(model.token_grid)),
        classes,
        drop_path=model.drop_path,
        head_dropout=model.head_dropout,
        head_init_scale=model.head_init_scale,
    )


def names_of_classes(data: DataConfig, classes: int) -> list[str]:
    """By label: those of the data set's label map, and numbers for what it does not name."""
    storage, split = data_sets(data)[0]
    names = load_manifest(storage, split).labels[:classes]
    return [*names, *(str(label) for label in range(len(names), classes))]


def check_labels(indexes: Sequence[DatasetIndex], classes: int) -> None:
    """ValueError if a sample has no label, or one that is no class."""
    for index in indexes:
        labels = index.table["label"].to_numpy()
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            row = index[int(wrong[0])]
            raise ValueError(
                f"{len(wrong)} of {len(labels)} samples have no label from 0 to {classes - 1}; the first one is "
                f"{row.key} of {row.shard} with {row.label}. Set model.classes to what the data set has, or "
                "prepare it with a label for every video"
            )
