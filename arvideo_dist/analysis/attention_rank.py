"""Numerical rank of the encoder's attention maps, layer by layer (the paper's Figure 3).

The paper says "the rank of the attention map in each layer" and no more. Here: an attention map is
softmax(q k^T / sqrt(d)) of one head, layer and clip, [L, L], over all L tokens of the clip and without a mask,
as downstream tasks use the encoder (dropped tokens and block-causal masks belong to pretraining alone), in
fp32. Its numerical rank is the number of its singular values above a tolerance times the largest one;
the default tolerance is L times fp32's machine epsilon (1.9e-4 for 1568 tokens), that of `matrix_rank` in numpy
and torch. A layer's rank is the mean over heads and clips.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.overrides import TorchFunctionMode

from arvideo_dist.data.loader import Batch
from arvideo_dist.model.pretraining import normalise_pixels
from arvideo_dist.model.vit import Encoder, to_cubes

DEFINITION = (
    "mean over heads and clips of the number of singular values above tolerance x the largest, of the fp32 "
    "attention map softmax(q k^T / sqrt(d)) over all tokens of a clip, unmasked"
)


class _AttentionMaps(TorchFunctionMode):
    """Gives `take` the map of every attention that is computed, from the very queries and keys."""

    def __init__(self, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            assert all(v is None for v in (kwargs or {}).values()), "no mask, dropout or scale of its own"
            self._take((query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1))
        return func(*args, **(kwargs or {}))


def for_each_map(encoder: Encoder, cubes_blp: torch.Tensor, take: Callable[[torch.Tensor], None]) -> None:
    """Run `encoder` over all tokens of normalised cubes; `take` gets each layer's maps [B, heads, L, L] in turn."""
    ids_bl = torch.arange(cubes_blp.shape[1], device=cubes_blp.device).expand(len(cubes_blp), -1)
    with torch.no_grad(), _AttentionMaps(take):
        encoder(cubes_blp, ids_bl)


def default_tolerance(tokens: int) -> float:
    return tokens * torch.finfo(torch.float32).eps


def attention_ranks(
    encoder: Encoder,
    tubelet: tuple[int, int, int],
    batches: Iterable[Batch],
    tolerance: float,
    say: Callable[[str], None],
) -> torch.Tensor:
    """Ranks [clips, layers, heads] (int64) of the maps over the clips of `batches`; `say` tells the progress."""
    device = next(encoder.parameters()).device
    ranks = []
    for batch in batches:
        layers: list[torch.Tensor] = []

        def take(maps_bhll: torch.Tensor, layers: list[torch.Tensor] = layers) -> None:
            layers.append(torch.linalg.matrix_rank(maps_bhll, rtol=tolerance).cpu())

        for_each_map(encoder, normalise_pixels(to_cubes(batch.clips.to(device), tubelet)), take)
        ranks.append(torch.stack(layers, dim=1))
        say(f"clip {sum(map(len, ranks))}: mean rank {ranks[-1].float().mean():.1f}")
    return torch.cat(ranks)


def summary(ranks_clh: torch.Tensor) -> dict[str, Any]:
    """By layer: mean and standard deviation over heads and clips; by layer and head the mean over clips."""
    ranks = ranks_clh.double()
    return {
        "mean": ranks.mean(dim=(0, 2)).tolist(),
        "deviation": ranks.std(dim=(0, 2), correction=0).tolist(),
        "heads": ranks.mean(dim=0).tolist(),
    }


def plot(summaries: Mapping[str, Mapping[str, Any]], tokens: int, tolerance: float) -> bytes:
    """A PNG: mean rank by layer, one line for each of `summaries` (by its label), and the full rank."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (label, values), marker in zip(summaries.items(), itertools.cycle("osD^vP*X"), strict=False):
        axes.plot(range(1, len(values["mean"]) + 1), values["mean"], marker=marker, label=label)
    axes.axhline(tokens, color="grey", linestyle=":", label=f"full rank: {tokens} tokens")
    clips = next(iter(summaries.values()))["clips"]
    axes.set_title(
        f"singular values above {tolerance:.2g} of the largest, mean over heads and {clips} clips", fontsize=9
    )
    axes.set(xlabel="layer", ylabel="rank of the attention map")
    axes.set_xticks(range(1, max(len(values["mean"]) for values in summaries.values()) + 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
