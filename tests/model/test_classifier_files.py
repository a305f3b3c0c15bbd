"""A fine-tuned classifier as a file: what `transformers` computes from it, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import VideoMAEForVideoClassification

from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.interchange import (
    export_classifier,
    export_encoder,
    read_classifier_weights,
    read_encoder,
)
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder
from arvideo_dist.storage import Storage
from arvideo_dist.train.trained import classifier_of, geometry_of, read_classifier, read_weights
from tests.model.test_classifier import CLASSES, clips, for_transformers, theirs_and_ours

NAMES = [f"class {number}" for number in range(CLASSES)]
MODEL = ClassifierConfig(encoder="demo", frames=4, image_size=32, tubelet=(2, 16, 16), classes=CLASSES)


@pytest.fixture
def classifier() -> Classifier:
    return theirs_and_ours()[1].eval()


def test_transformers_gives_the_logits_of_an_export(classifier: Classifier, tmp_path: Path) -> None:
    export_classifier(classifier, MODEL, Storage(str(tmp_path)), "hf", NAMES)
    theirs = VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        difference = theirs(for_transformers(clips())).logits - classifier(clips())
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("format", ["hf", "safetensors", "torch"])
def test_an_export_comes_back_to_the_bit(classifier: Classifier, tmp_path: Path, format: str) -> None:
    export_classifier(classifier, MODEL, Storage(str(tmp_path)), format, NAMES)
    files = {"hf": "", "safetensors": "/classifier.safetensors", "torch": "/checkpoint.pth"}
    source = f"{tmp_path}{files[format]}"
    weights, encoder = read_classifier(source), read_weights(source)
    assert weights.keys() == classifier.state_dict().keys()
    for name, value in classifier.state_dict().items():
        assert torch.equal(weights[name], value), name
        if name.startswith("encoder."):
            assert torch.equal(encoder[name.removeprefix("encoder.")], value), name


def test_an_export_says_what_it_is(classifier: Classifier, tmp_path: Path) -> None:
    export_classifier(classifier, MODEL, Storage(str(tmp_path)), "hf", NAMES)
    found, run = classifier_of(str(tmp_path))
    assert run is None
    assert (found.encoder, found.frames, found.image_size, found.tubelet) == ("demo", 4, 32, (2, 16, 16))
    assert found.classes == CLASSES
    assert geometry_of(str(tmp_path))["encoder"] == "demo"


def test_an_encoder_alone_is_no_classifier(classifier: Classifier, tmp_path: Path) -> None:
    encoder = Encoder(ENCODER_SIZES["demo"], (2, 16, 16), 8)
    export_encoder(encoder, MODEL, Storage(str(tmp_path)), "hf", None)
    with pytest.raises(ValueError, match=r"it holds no classifier: there is no fc_norm\.weight"):
        read_classifier_weights(str(tmp_path))
    with pytest.raises(ValueError, match="holds no classifier"):
        classifier_of(str(tmp_path))


@pytest.mark.parametrize("read", [read_encoder, read_classifier_weights])
def test_a_store_that_does_not_answer_is_no_fault_of_the_weights(
    read: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run is started again for it, while weights that are not there stop it."""

    def exists(self: Storage, name: str = "") -> bool:
        raise OSError("AWS Error NETWORK_CONNECTION")

    with pytest.raises(ValueError, match="no such file"):
        read("absent.pth")
    monkeypatch.setattr(Storage, "exists", exists)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        read("absent.pth")
