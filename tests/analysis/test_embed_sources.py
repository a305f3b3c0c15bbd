"""Where an encoder comes from for its features, and what the configuration takes from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.embed import of_source
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.features import EncoderFeatures
from arvideo_dist.model.interchange import export_classifier, export_encoder
from arvideo_dist.model.vit import ENCODER_SIZES
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.train.trained import READERS, open_trained
from tests.analysis.conftest import GEOMETRY, MODELS
from tests.train.encoders import MODEL, make_encoder


def config_of(source: Path | str, **given: dict[str, Any]) -> EmbedConfig:
    return of_source(EmbedConfig.model_validate(given), mock.Mock(source=str(source)))


def batch_of(frames: int, size: int) -> Batch:
    clips = torch.randint(
        0, 256, (2, 3, frames, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return Batch(clips, {}, torch.ones(2), torch.arange(2), [])


def features_of(config: EmbedConfig, batch: Batch) -> torch.Tensor:
    task = Embedding(config)
    module = task.build()
    task.load(module, READERS)
    with torch.inference_mode():
        return task.compute(module.eval(), batch)


@pytest.mark.parametrize("kind", MODELS)
def test_features_of_a_pretraining_run_are_those_that_it_measures_itself(runs: Path, kind: str) -> None:
    config = config_of(runs / kind, data={"path": str(runs / "data")})
    batch, model = batch_of(4, 32), open_trained(str(runs / kind)).load_model().eval()
    with torch.inference_mode():
        expected = model.features(batch.clips)
    torch.testing.assert_close(features_of(config, batch), expected, rtol=0, atol=1e-6)


def test_a_run_says_geometry_data_sampling_and_where_the_features_go(runs: Path) -> None:
    config = config_of(runs / "arvideo")
    assert config.model.model_dump(exclude={"init_from"}) == GEOMETRY
    assert config.model.init_from == f"{runs}/arvideo/checkpoints/step-00000001"
    assert (config.data.path, config.data.split, config.data.stride) == (str(runs / "data"), "val", 2)
    assert config.run.storage_path == f"{runs}/arvideo/embeddings"
    assert config.run.name == "step-00000001-val-1x1-mean"
    other = config_of(
        runs / "arvideo", data={"path": "/other"}, embedding={"format": "safetensors", "pooling": "tokens"}
    )
    assert other.run.name.startswith("step-00000001-val-1x1-tokens-safetensors-")
    assert other.data.stride == 2


def test_what_the_source_says_of_itself_cannot_be_given(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.frames: SOURCE says its own"):
        config_of(runs / "arvideo", model={"frames": 8})


def test_a_file_of_weights_wants_its_geometry_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    export_encoder(make_encoder(), MODEL, Storage(str(tmp_path)), "safetensors", None)
    file = tmp_path / "encoder.safetensors"
    with pytest.raises(ValueError, match=r"encoder\.safetensors: .*set model\.encoder and model\.tubelet"):
        config_of(file)
    config = config_of(file, model=MODEL.model_dump(exclude={"init_from"}), data={"path": "/data"})
    assert (config.run.storage_path, config.run.name) == ("runs", "embedding-val-1x1-mean")
    batch = batch_of(MODEL.frames, MODEL.image_size)
    module = EncoderFeatures(ENCODER_SIZES["demo"], MODEL.tubelet, 8)
    module.encoder = make_encoder()
    with torch.inference_mode():
        expected = module.eval()(batch.clips).mean(1)
    torch.testing.assert_close(features_of(config, batch), expected, rtol=0, atol=1e-6)


def test_a_classifiers_features_are_its_encoders_mean_before_its_own_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier(ENCODER_SIZES["demo"], MODEL.tubelet, 8, 3).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    export_classifier(classifier, MODEL, Storage(str(tmp_path)), "hf", ["a", "b", "c"])
    pooled = list[torch.Tensor]()
    classifier.fc_norm.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    batch = batch_of(MODEL.frames, MODEL.image_size)
    with torch.inference_mode():
        classifier(batch.clips)
    found = features_of(config_of(tmp_path, data={"path": "/data"}), batch)
    torch.testing.assert_close(found, pooled[0], rtol=0, atol=1e-6)


def test_what_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        config_of(tmp_path / "nothing", data={"path": "/data"})


def test_a_run_that_trains_nothing_is_refused(tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "arvideo", tmp_path / "run")
    trained = open_trained(str(tmp_path / "run"))
    trained.checkpoint.state["command"] = EmbedConfig.command
    with pytest.raises(ValueError, match="is of a run of embed, which trains nothing"):
        trained.config  # noqa: B018
