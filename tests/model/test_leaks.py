"""No prediction sees what it predicts or what comes later: every element, order, decoder and precision.

VideoMAE's counterpart is in test_videomae.py: it has no order.
"""

from __future__ import annotations

from itertools import product

import pytest

from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from tests.model.models import DECODER, PIXELS, SELF_ATTENTION, SUBSAMPLED, check_no_leak, make

SHAPES = [(1, 1, 1), (2, 2, 2), (1, 4, 4), (4, 1, 1), (4, 2, 2), (1, 2, 4)]
ORDERS = ["random", "spatial_first", "temporal_first"]
DECODERS = [DECODER, SELF_ATTENTION, SUBSAMPLED]


@pytest.fixture(autouse=True)
def _narrow_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODER_SIZES, "demo", EncoderSize(width=64, depth=3, heads=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_prediction_sees_its_own_cluster_or_a_later_one(
    shape: tuple[int, int, int], order: str, precision: str
) -> None:
    for decoder, min_context in product(DECODERS, (1, 2)):
        made = make(
            decoder=decoder, cluster=shape, order=order, min_context_clusters=min_context, mask_ratio=0.5
        )
        check_no_leak(made, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_no_prediction_sees_its_own_pixel_or_a_later_one(order: str, precision: str) -> None:
    """iGPT: 4 x 4 x 4 pixels as elements."""
    for decoder in DECODERS:
        check_no_leak(make(decoder=decoder, order=order, **PIXELS), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("square", [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 2, 2)])
def test_no_prediction_of_randsac_sees_its_own_segment_or_a_later_one(
    square: tuple[int, int, int], precision: str
) -> None:
    """Through the skip connections too."""
    for decoder, mask_ratio in product(DECODERS, (0.0, 0.5)):
        made = make(decoder=decoder, kind="randsac", cluster=square, mask_ratio=mask_ratio)
        check_no_leak(made, precision)
