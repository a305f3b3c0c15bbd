"""Loss on the held-out split, beside two controls that tell whether the model learned and uses its context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from arvideo_dist.config.model import ModelConfig
from arvideo_dist.data.loader import BadRecord, Batch
from arvideo_dist.tasks.picture import reconstruction
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity

PICTURED_CLIPS = 3


@dataclass
class Validation:
    metrics: dict[str, float]  # the same on all ranks; one that nothing was read for is absent
    picture: np.ndarray | None  # on rank 0, where it read a clip
    bad: list[BadRecord]  # of this rank


def validate(
    engine: Engine, steps: Iterable[list[Batch]], model: ModelConfig, control: dist.ProcessGroup
) -> Validation:
    """Weighted means over all clips of `steps` on all ranks:

    `loss/val`: the model's loss. `loss/val_other_context`: its loss when each clip is predicted from another
    clip's context (clips without a partner in their micro batch are left out). `loss/constant_predictor`: the
    loss of the best constant cube on the same targets, hence what a model scores that ignores its input.
    `bad_validation_samples`: clips that could not be used, which have no part in the others.
    """
    engine.set_training(False)
    sums: torch.Tensor | None = None
    picture, bad = None, list[BadRecord]()
    activity.together("validates, batch 0")
    with torch.no_grad():
        hosts = (host_batch for step in steps for host_batch in step)
        for number, host_batch in enumerate(hosts, start=1):
            bad += host_batch.bad
            batch = host_batch.to(engine.device)
            output = engine.forward(batch)
            partners, paired = _partners(batch.weights)
            other = engine.forward(batch, context_clips=batch.clips[partners])
            batch_sums = _batch_sums(batch, output.loss_b, other.loss_b, paired, output.targets_bmp)
            sums = batch_sums if sums is None else sums + batch_sums
            if picture is None and dist.get_rank() == 0 and bool((batch.weights > 0).any()):
                shown = batch.weights.nonzero().flatten()[:PICTURED_CLIPS]
                picture = reconstruction(
                    batch.clips[shown],
                    batch.context_ids[shown],
                    batch.target_ids[shown],
                    output.predictions_bmp[shown],
                    model,
                )
            activity.together(f"validates, batch {number}")  # ZeRO-3 gathers weights for each
    engine.set_training(True)
    activity.together("joins the validation of all ranks")
    assert sums is not None, "the validation loader gives every rank at least one batch"
    sums = torch.cat([sums, torch.tensor([float(len(bad))], dtype=torch.float64)])
    dist.all_reduce(sums, group=control)
    return Validation(_metrics(sums), picture, bad)


def _metrics(sums: torch.Tensor) -> dict[str, float]:
    """`sums`: those of `_batch_sums` over all ranks, then the number of bad samples."""
    loss, weight, other_loss, pairs, targets = sums[:5].tolist()
    total_p, squares_p = sums[5:-1].chunk(2)
    metrics = {"bad_validation_samples": float(sums[-1])}
    if weight:
        metrics["loss/val"] = loss / weight
        metrics["loss/constant_predictor"] = float(
            (squares_p / targets - (total_p / targets).square()).mean()
        )
    if pairs:
        metrics["loss/val_other_context"] = other_loss / pairs
    # A model that has diverged: MLflow would make 1.8e308 of Inf.
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def validation_line(metrics: Mapping[str, float]) -> str:
    """For the terminal."""
    parts = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")]
    if "loss/val" not in metrics:
        parts.insert(0, "no loss/val: no clip of the validation could be used, or the loss is not finite")
    if bad := metrics["bad_validation_samples"]:
        parts.append(f"bad validation samples {bad:.0f}")
    return "  ".join(parts)


def _partners(weights_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each clip another usable clip of the micro batch [B], and whether it has one (bool [B])."""
    partners = torch.arange(len(weights_b), device=weights_b.device)
    usable = weights_b.nonzero().flatten()
    paired = torch.zeros(len(weights_b), dtype=torch.bool, device=weights_b.device)
    if len(usable) > 1:
        partners[usable] = usable.roll(1)
        paired[usable] = True
    return partners, paired


def _batch_sums(
    batch: Batch,
    loss_b: torch.Tensor,
    other_loss_b: torch.Tensor,
    paired_b: torch.Tensor,
    targets_bmp: torch.Tensor,
) -> torch.Tensor:
    """Host float64 vector: loss, weight, loss with another context, pairs, targets, then per cube value the
    sum and the sum of squares of the targets."""
    weights_b = batch.weights.double().cpu()
    usable_tp = targets_bmp[batch.weights > 0].flatten(0, 1)
    scalars = torch.stack(
        [
            (loss_b.cpu() * weights_b).sum(),
            weights_b.sum(),
            (other_loss_b.cpu().double() * paired_b.cpu()).sum(),
            paired_b.double().cpu().sum(),
            torch.tensor(float(len(usable_tp)), dtype=torch.float64),
        ]
    )
    sums_p = usable_tp.sum(0, dtype=torch.float64), usable_tp.square().sum(0, dtype=torch.float64)
    return torch.cat([scalars, *(sum_p.cpu() for sum_p in sums_p)])
