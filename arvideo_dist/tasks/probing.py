"""Probes: linear classifiers on the features that `embed` has stored, a grid of settings trained at once.

One forward pass of the encoder serves all heads, since the features are its output and it is not trained. The heads
share batches and loss, a sum, and nothing else: each is what it would be if it were trained alone.

Letters: H heads, N videos, B of them in a batch, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from arvideo_dist.model.probes import LinearProbes
from arvideo_dist.tasks.feature_files import VideoFeatures

_VIDEOS_AT_ONCE = 2**12


class Settings(NamedTuple):
    """Of one head."""

    learning_rate: float  # at the first step; a cosine leads to 0
    weight_decay: float  # AdamW's, of the weights


@dataclass(frozen=True)
class Labelled:
    """The videos of a file of features that have a label."""

    values_nd: torch.Tensor  # float32
    labels_n: torch.Tensor  # int64


@dataclass(frozen=True)
class Scaling:
    """What features are before a head sees them: of zero mean and unit deviation over the training videos, as the
    batch norm without parameters of MAE's linear probe makes them."""

    mean_d: torch.Tensor
    deviation_d: torch.Tensor

    @classmethod
    def of(cls, train: Labelled) -> Scaling:
        values = train.values_nd.double()
        deviation = values.std(dim=0, correction=0)
        return cls(values.mean(dim=0).float(), torch.where(deviation > 0, deviation, 1.0).float())

    def __call__(self, values_nd: torch.Tensor) -> torch.Tensor:
        return (values_nd - self.mean_d) / self.deviation_d


def grid(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> list[Settings]:
    """All pairs."""
    return [Settings(rate, decay) for rate in learning_rates for decay in weight_decays]


def labelled(features: VideoFeatures, name: str) -> Labelled:
    """ValueError if none of the videos has a label; `name`: of the file, for the message."""
    rows = [row for row, label in enumerate(features.labels) if label is not None]
    if not rows:
        raise ValueError(f"{name}: no video has a label, which probes need; embed a labelled data set")
    labels = torch.tensor([features.labels[row] for row in rows])
    return Labelled(torch.from_numpy(features.values_nd[rows]), labels)


def check_alike(first: VideoFeatures, other: VideoFeatures, name: str) -> None:
    """ValueError if `other` (of file `name`) was not made as `first`, or has other names for its labels."""
    for field in ("source", "model", "pooling", "shape"):
        if first.about[field] != other.about[field]:
            raise ValueError(
                f"{name}: its features are of another kind than the training videos': {field} "
                f"{other.about[field]!r}, not {first.about[field]!r}. Embed both with one encoder"
            )
    names = dict(zip(first.labels, first.label_names, strict=True))
    for label, own in zip(other.labels, other.label_names, strict=True):
        if label is not None and names.get(label, own) != own:
            raise ValueError(
                f"{name}: label {label} is {own!r} there and {names[label]!r} among the training videos: prepare "
                "both splits with one --label-map"
            )


def train_probes(
    train: Labelled, settings: Sequence[Settings], *, epochs: int, batch: int, seed: int, device: torch.device
) -> tuple[LinearProbes, Scaling]:
    """The heads after `epochs` passes over the videos, and what features are scaled by.

    `batch`: videos of a step; all of them if there are fewer. AdamW with betas 0.9 and 0.999. The order of the
    videos is a function of `seed` and the epoch.
    """
    scaling, classes = Scaling.of(train), int(train.labels_n.max()) + 1
    values_nd, labels_n = scaling(train.values_nd).to(device), train.labels_n.to(device)
    probes = LinearProbes(len(settings), values_nd.shape[1], classes).to(device)
    groups = [
        {"params": [parameter], "lr": each.learning_rate, "weight_decay": decay}
        for each, weight, bias in zip(settings, probes.weights, probes.biases, strict=True)
        for parameter, decay in ((weight, each.weight_decay), (bias, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * math.ceil(len(labels_n) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    )
    for rows in _batches(len(labels_n), epochs, batch, seed):
        chosen = torch.from_numpy(rows).to(device)
        losses_h = cross_entropies(probes(values_nd[chosen]), labels_n[chosen])
        optimizer.zero_grad()
        losses_h.sum().backward()
        optimizer.step()
        schedule.step()
    return probes, scaling


def _batches(videos: int, epochs: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(videos)
        yield from (order[first : first + batch] for first in range(0, videos, batch))


def cross_entropies(logits_hbk: torch.Tensor, labels_b: torch.Tensor) -> torch.Tensor:
    """Mean over the batch, of each head [H]."""
    heads, videos, _ = logits_hbk.shape
    losses = F.cross_entropy(logits_hbk.flatten(0, 1), labels_b.repeat(heads), reduction="none")
    return losses.view(heads, videos).mean(dim=1)


def top1(probes: LinearProbes, scaling: Scaling, videos: Labelled) -> list[float]:
    """Share of `videos` whose label each head guesses; one that no training video has is never guessed."""
    right_h = torch.zeros(len(probes.weights))
    device = probes.weights[0].device
    with torch.inference_mode():
        for first in range(0, len(videos.labels_n), _VIDEOS_AT_ONCE):
            rows = slice(first, first + _VIDEOS_AT_ONCE)
            guesses_hb = probes(scaling(videos.values_nd[rows]).to(device)).argmax(dim=-1).cpu()
            right_h += (guesses_hb == videos.labels_n[rows]).sum(dim=1)
    return (right_h.double() / len(videos.labels_n)).tolist()


def table(heads: Sequence[Mapping[str, Any]], best: int) -> list[str]:
    """All heads for the terminal, the best one marked: settings, and shares by name (`top1_val`)."""
    shares = [name for name in heads[0] if name.startswith("top1_")]
    titles = "  ".join(f"{name.replace('top1_', 'top-1 '):>11}" for name in shares)
    lines = [f"learning rate  weight decay  {titles}"]
    for number, head in enumerate(heads):
        values = "  ".join(f"{head[name]:11.2%}" for name in shares)
        mark = "  best" if number == best else ""
        lines.append(f"{head['learning_rate']:13g}  {head['weight_decay']:12g}  {values}{mark}")
    return lines


def at_the_edge(rate: float, rates: Sequence[float]) -> list[str]:
    """A hint if the best rate may lie beyond those that were tried."""
    if len(set(rates)) == 1 or min(rates) < rate < max(rates):
        return []
    side = "largest" if rate == max(rates) else "smallest"
    return [f"the best head has the {side} of --learning-rates: try some beyond it, or more --epochs"]
