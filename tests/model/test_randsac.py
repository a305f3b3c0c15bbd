"""What RandSAC adds to ARVideo: skip connections and squares."""

from __future__ import annotations

import pytest
import torch

from arvideo_dist.config.model import ModelConfig
from arvideo_dist.model.randsac import RandSAC, SkipConnections
from tests.model.models import SELF_ATTENTION, make

SQUARES = {"cluster": (1, 2, 2), "mask_ratio": 0.0}


def test_each_map_is_the_softmax_weighted_mean_of_the_layers() -> None:
    skip, layers = SkipConnections(3, 2), [torch.randn(2, 5, 8) for _ in range(3)]
    with torch.no_grad():
        means = [layers[0] + layers[1] + layers[2]] * 2
        assert torch.allclose(skip(layers), torch.stack(means) / 3, atol=1e-6), "equal to begin with"
        skip.logits.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, 1.0]))
        for block, logits in enumerate(skip.logits.view(2, 3)):
            weights = (logits.exp() / logits.exp().sum()).tolist()
            expected = sum(weight * layer for weight, layer in zip(weights, layers, strict=True))
            assert torch.allclose(skip(layers)[block], expected, atol=1e-6)


def test_with_the_last_layer_alone_it_predicts_what_arvideo_does() -> None:
    arvideo, clips, context_ids, target_ids = make(decoder=SELF_ATTENTION, **SQUARES)
    randsac = make(decoder=SELF_ATTENTION, kind="randsac", **SQUARES).model
    assert isinstance(randsac, RandSAC)
    assert randsac.load_state_dict(arvideo.state_dict(), strict=False).missing_keys == ["skip.logits"]
    with torch.no_grad():
        mixed = randsac(clips, context_ids, target_ids).predictions_bmp
        randsac.skip.logits.view(2, 6).copy_(torch.tensor([-100.0] * 5 + [100.0]))
        expected = arvideo(clips, context_ids, target_ids).predictions_bmp
        assert torch.allclose(randsac(clips, context_ids, target_ids).predictions_bmp, expected, atol=1e-5)
    assert not torch.allclose(mixed, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": (1, 7, 14)}, "segments are squares; set K_H and K_W alike"),
        ({"order": "spatial_first"}, "segments are in random order; leave order unset"),
    ],
)
def test_settings_of_other_methods_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(kind="randsac", **changes)
