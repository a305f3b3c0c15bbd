"""Pretraining by any of the methods (`model/kinds.py`): predict cubes from other cubes, mean squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.sources import labelled_sources, pretraining_sources, validation_source
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import Batch, ClipSource
from arvideo_dist.model.clusters import Clusters
from arvideo_dist.model.interchange import fill_encoder
from arvideo_dist.model.kinds import build_model, make_sequences
from arvideo_dist.model.pretraining import Output, PretrainingModel
from arvideo_dist.tasks.activations import activation_bytes_per_clip, activation_bytes_per_pass
from arvideo_dist.tasks.draws import TokenDraw
from arvideo_dist.tasks.flops import forward_backward_flops, parameter_count
from arvideo_dist.tasks.picture import reconstruction
from arvideo_dist.tasks.task import (
    Costs,
    Forward,
    Measured,
    ParameterGroup,
    Probed,
    ReadWeights,
    Task,
    decay_matrices,
)

PICTURED_CLIPS = 3


class Pretraining(Task[PretrainConfig]):
    """The paper's method and those that it is compared with."""

    def costs(self) -> Costs:
        model, decoder = self.config.model, self.config.decoder
        sequences = make_sequences(model, decoder)
        clusters = sequences if isinstance(sequences, Clusters) else None
        return Costs(
            parameters=parameter_count(model, decoder),
            flops_per_clip=forward_backward_flops(model, decoder),
            activation_bytes_per_clip=activation_bytes_per_clip(model, decoder),
            activation_bytes_per_pass=activation_bytes_per_pass(model, decoder),
            encoder_tokens=sequences.encoder_tokens,
            decoder_queries=sequences.decoder_queries,
            clusters=clusters.count if clusters else None,
            kept_tokens_per_cluster=clusters.kept if clusters else None,
        )

    def build(self) -> PretrainingModel:
        return build_model(self.config.model, self.config.decoder)

    def start_from(self, module: nn.Module, read: ReadWeights) -> str:
        return fill_encoder(cast(PretrainingModel, module).encoder, self.config.model.init_from, read)

    def parameter_groups(self, module: nn.Module) -> list[ParameterGroup]:
        return decay_matrices(module, self.config.optim.weight_decay)

    def draw(self) -> TokenDraw:
        return TokenDraw(make_sequences(self.config.model, self.config.decoder))

    def draw_of_validation(self) -> TokenDraw:
        return self.draw()

    def sources(self) -> list[ClipSource]:
        return pretraining_sources(self.config.data)

    def validation_source(self) -> ClipSource | None:
        return validation_source(self.config.data)

    def probed(self) -> Probed | None:
        measure = self.config.measure
        if measure.every_steps is None:
            return None
        return Probed(measure, *labelled_sources(self.config.data, measure), mean_features)

    def settled(self) -> PretrainConfig:
        probed = self.probed()
        for source in (probed.train, probed.held_out) if probed else ():
            if not load_manifest(source.storage, source.split).labels:
                raise ValueError(
                    f"split {source.split!r} at {source.storage.uri} has no labels, which measure.every_steps "
                    "wants: set measure.path to a labelled data set, or measure.every_steps to null"
                )
        return self.config

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return pretraining_loss(forward, batch)

    def measure(self, forward: Forward, batch: Batch, *, picture: bool) -> Measured:
        """Sums of: the model's loss; its loss when each clip is predicted from another clip's context (clips
        without a partner in their micro batch are left out); what the best constant cube would score on the same
        targets, hence what a model scores that ignores its input."""
        output = predict(forward, batch)
        partners, paired = _partners(batch.weights)
        other = predict(forward, batch, batch.clips[partners])
        sums = _sums(batch.weights, output.loss_b, other.loss_b, paired, output.targets_bmp)
        if not picture or not bool((batch.weights > 0).any()):
            return Measured(sums)
        shown = batch.weights.nonzero().flatten()[:PICTURED_CLIPS]
        return Measured(
            sums,
            picture=reconstruction(
                batch.clips[shown],
                batch.inputs["context_ids"][shown],
                batch.inputs["target_ids"][shown],
                output.predictions_bmp[shown],
                self.config.model,
            ),
        )

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`loss/val`, `loss/val_other_context`, `loss/constant_predictor`: see `measure`."""
        metrics = {}
        if weight := float(sums["weight"]):
            targets = float(sums["targets"])
            mean_p, squares_p = sums["total_p"] / targets, sums["squares_p"] / targets
            metrics["loss/val"] = float(sums["loss"]) / weight
            metrics["loss/constant_predictor"] = float((squares_p - mean_p.square()).mean())
        if pairs := float(sums["pairs"]):
            metrics["loss/val_other_context"] = float(sums["other_loss"]) / pairs
        return metrics

    def validation_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")]
        return "  ".join(parts)

    def result_lines(self, metrics: Mapping[str, float]) -> str:
        loss, constant = metrics["loss/val"], metrics.get("loss/constant_predictor")
        text = f"loss {loss:.4f}"
        if constant:  # 0 if all targets are the same
            below = 1 - loss / constant
            side = "below" if below >= 0 else "above"
            text += f", best constant predictor {constant:.4f} ({abs(below):.1%} {side} it)"
        if (other := metrics.get("loss/val_other_context")) is not None and loss:
            text += f"\n            with another clip's context {other:.4f} ({other / loss - 1:+.1%})"
        return text


def predict(forward: Forward, batch: Batch, context_clips: torch.Tensor | None = None) -> Output:
    """A pretraining model on a micro batch; `context_clips` as in `PretrainingModel.forward`."""
    inputs = batch.inputs
    output: Output = forward(batch.clips, inputs["context_ids"], inputs["target_ids"], context_clips)
    return output


def mean_features(forward: Forward, batch: Batch) -> torch.Tensor:
    """The features [B, D] of each clip (`PretrainingModel.features`)."""
    features_bd: torch.Tensor = forward(batch.clips)
    return features_bd


def pretraining_loss(forward: Forward, batch: Batch) -> torch.Tensor:
    """Mean squared error of each clip [B] (float32)."""
    return predict(forward, batch).loss_b


def _partners(weights_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each clip another usable clip of the micro batch [B], and whether it has one (bool [B])."""
    partners = torch.arange(len(weights_b), device=weights_b.device)
    usable = weights_b.nonzero().flatten()
    paired = torch.zeros(len(weights_b), dtype=torch.bool, device=weights_b.device)
    if len(usable) > 1:
        partners[usable] = usable.roll(1)
        paired[usable] = True
    return partners, paired


def _sums(
    weights_b: torch.Tensor,
    loss_b: torch.Tensor,
    other_loss_b: torch.Tensor,
    paired_b: torch.Tensor,
    targets_bmp: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Host float64; of the targets the sum and the sum of squares of each cube value [P]."""
    host_b = weights_b.double().cpu()
    usable_tp = targets_bmp[weights_b > 0].flatten(0, 1)
    return {
        "loss": (loss_b.cpu() * host_b).sum(),
        "weight": host_b.sum(),
        "other_loss": (other_loss_b.cpu().double() * paired_b.cpu()).sum(),
        "pairs": paired_b.double().cpu().sum(),
        "targets": torch.tensor(float(len(usable_tp)), dtype=torch.float64),
        "total_p": usable_tp.sum(0, dtype=torch.float64).cpu(),
        "squares_p": usable_tp.square().sum(0, dtype=torch.float64).cpu(),
    }
