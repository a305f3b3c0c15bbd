"""In which order a configuration's tokens are predicted, and from what, as pictures of the token grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import matplotlib
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.data.order import Stream, sample_generator
from arvideo_dist.model.clusters import Clusters, Order
from arvideo_dist.model.kinds import make_sequences
from arvideo_dist.model.pretraining import Sequences
from arvideo_dist.tasks.picture import Page

MAX_PAGES = 40
_NEVER = -1  # neither seen nor predicted: a dropped token of a cluster that is not predicted
_GIVEN = 0  # seen, never predicted
_MIN_NUMBER = 14  # pixels a group needs to carry its number
LEGEND = "a column a token time; number: step that predicts; dimmed: never seen; white: given; black: unused"


@dataclass(frozen=True)
class DrawnOrder:
    """When each token of the grid is predicted and seen; arrays [T, H, W] of step numbers from 1."""

    predicted_thw: NDArray[np.int64]  # 0: given, -1: neither seen nor predicted
    seen_thw: NDArray[np.int64]  # the first step that sees it; -1: none does
    steps: int


def draw_orders(
    model: ModelConfig, decoder: DecoderConfig, seed: int, place: int = 0
) -> dict[str, DrawnOrder]:
    """What a run of this configuration and seed draws at `place` of its sample sequence.

    All orders that the method accepts (paper 3.3.2); one without clusters has its own alone, under its name.
    """
    sequences = {model.kind: make_sequences(model, decoder)}
    if isinstance(sequences[model.kind], Clusters):
        sequences = {
            order: make_sequences(model.model_copy(update={"order": order}), decoder)
            for order in get_args(Order)
            if _accepts(model, order)
        }
    return {name: draw_order(s, model.token_grid, seed, place) for name, s in sequences.items()}


def _accepts(model: ModelConfig, order: Order) -> bool:
    try:
        ModelConfig.model_validate({**model.model_dump(), "order": order})
    except ValidationError:
        return False
    return True


def draw_order(sequences: Sequences, token_grid: tuple[int, int, int], seed: int, place: int) -> DrawnOrder:
    """One draw of `sequences`, as the loader makes it for that place."""
    context_ids, target_ids = sequences.draw_sequence(sample_generator(seed, place, Stream.SEQUENCE))
    steps = sequences.prediction_steps()
    predicted, seen = (np.full(np.prod(token_grid), _NEVER) for _ in range(2))
    predicted[context_ids] = _GIVEN
    seen_before = predicted_before = 0
    for number, step in enumerate(steps, start=1):
        seen[context_ids[seen_before : step.context]] = number
        predicted[target_ids[predicted_before : step.targets]] = number
        seen_before, predicted_before = step
    return DrawnOrder(predicted.reshape(token_grid), seen.reshape(token_grid), len(steps))


def strip(orders: Mapping[str, DrawnOrder]) -> NDArray[np.uint8]:
    """All orders on one page: a row each, a column for each token time, every group with its number."""
    return _page(orders, None, LEGEND)


def pages(orders: Mapping[str, DrawnOrder]) -> Iterator[NDArray[np.uint8]]:
    """The same as it proceeds: a page a step (at most `MAX_PAGES`), with what the step sees and, outlined, what
    it predicts."""
    last = max(order.steps for order in orders.values())
    for step in np.unique(np.linspace(1, last, min(last, MAX_PAGES)).round().astype(int)).tolist():
        yield _page(orders, step, f"step {step} of {last}: outlined what it predicts, in colour what it sees")


def _page(orders: Mapping[str, DrawnOrder], step: int | None, caption: str) -> NDArray[np.uint8]:
    times, height, width = next(iter(orders.values())).predicted_thw.shape
    page = Page(list(orders), times, (height, width), caption=caption)
    for row, order in enumerate(orders.values()):
        colours_thwc = _colours(order, step)
        for t in range(times):
            page.frame(row, t, colours_thwc[t])
            if step is not None:
                page.outline(row, t, order.predicted_thw[t] == step)
            else:
                _number_groups(page, row, t, order)
    return page.pixels()


def _colours(order: DrawnOrder, step: int | None) -> NDArray[np.uint8]:
    """[T, H, W, 3]. Whole order: every token in its step's colour, dimmed if it is never seen. At a step:
    in colour what the step sees, all else dark."""
    palette = matplotlib.colormaps["viridis"]
    # The darkest fifth is left out: it would look like a token that is not seen.
    colours = palette(0.2 + 0.8 * np.clip(order.predicted_thw / order.steps, 0, 1))[..., :3]
    colours[order.predicted_thw == _GIVEN] = 1
    colours[order.predicted_thw == _NEVER] = 0
    if step is None:
        colours[order.seen_thw == _NEVER] *= 0.55
    else:
        seen = (order.seen_thw != _NEVER) & (order.seen_thw <= step)
        colours[~seen] = 0.15
    return (colours * 255).round().astype(np.uint8)


def _number_groups(page: Page, row: int, t: int, order: DrawnOrder) -> None:
    """Number the groups of tokens that fill a rectangle large enough to be written in."""
    for number in np.unique(order.predicted_thw[t]).tolist():
        h, w = np.nonzero(order.predicted_thw[t] == number)
        box_h, box_w = np.ptp(h) + 1, np.ptp(w) + 1
        if number > 0 and box_h * box_w == len(h) and min(box_h, box_w) * page.scale >= _MIN_NUMBER:
            centre = h.min() + box_h / 2, w.min() + box_w / 2
            page.text(row, t, centre, str(number))
