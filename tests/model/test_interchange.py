"""Encoder weights move both ways between this project, transformers and the original repository."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.optim import TrainConfig
from arvideo_dist.export import main
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.model.interchange import export_encoder, fill_encoder, read_encoder
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder, to_cubes
from arvideo_dist.pretrain import main as pretrain
from arvideo_dist.storage import Storage
from tests.train.distributed import run_ranks, save_checkpoint
from tests.train.engines import engine_of

MODEL = ModelConfig(encoder="demo", frames=4, image_size=32, tubelet=(2, 16, 16), cluster=(1, 1, 2))
DECODER = DecoderConfig(width=64, depth=1)
STAGES = (1, 2, 3)
# What a user does who has transformers and the folder, but not this project.
LOAD = """
import importlib.util, sys, numpy, torch, transformers
assert importlib.util.find_spec("arvideo_dist") is None
clip, outs = torch.from_numpy(numpy.load(sys.argv[1])), {}
for path in sys.argv[3:]:
    kind = "VideoMAEForVideoClassification" if path.endswith("-head") else "VideoMAEModel"
    model, info = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        result = model.eval()(clip)
        outs[path] = (result.logits if path.endswith("-head") else result.last_hidden_state).numpy()
numpy.savez(sys.argv[2], **outs)
"""


def disturbed_model() -> ARVideo:
    """Nothing is zero or one by initialisation, so that no exchanged or dropped parameter goes unseen."""
    torch.manual_seed(3)
    model = ARVideo(MODEL, DECODER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def new_encoder() -> Encoder:
    return Encoder(ENCODER_SIZES["demo"], MODEL.tubelet, 8)


def videomae_config(mean_pooling: bool) -> VideoMAEConfig:
    return VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=192, num_hidden_layers=6,
        num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, use_mean_pooling=mean_pooling,
        decoder_hidden_size=64, decoder_num_attention_heads=1, decoder_num_hidden_layers=1,
        decoder_intermediate_size=256,
    )  # fmt: skip


def clip_bcthw() -> torch.Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def features(encoder: Encoder) -> torch.Tensor:
    """Of all tokens of normalised clips, as downstream tasks use the encoder."""
    with torch.no_grad():
        return encoder(to_cubes(clip_bcthw(), MODEL.tubelet), torch.arange(8).expand(2, -1))


def _save_runs(folder: str) -> None:
    for stage in STAGES:
        train = TrainConfig(global_batch=2, micro_batch=1, zero_stage=stage)
        engine = engine_of(disturbed_model(), train)
        config = PretrainConfig(model=MODEL, decoder=DECODER).model_dump(mode="json")
        save_checkpoint(Storage(f"{folder}/zero-{stage}"), engine, 5, {"config": config})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs zero-1 to zero-3 of the disturbed model, each with a checkpoint that two ranks wrote."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, _save_runs, str(folder))
    return folder


def test_exports_of_every_zero_stage_load_in_a_process_without_this_project(
    runs: Path, tmp_path: Path
) -> None:
    for stage in STAGES:
        main([str(runs / f"zero-{stage}"), "--format", "hf"])
    main([str(runs / "zero-2/checkpoints/step-00000005"), "--format", "hf", "--head", "--labels", "7"])
    folders = [str(runs / f"zero-{stage}/exports/step-00000005-hf") for stage in STAGES]
    head = str(runs / "zero-2/exports/step-00000005-hf-head")
    np.save(tmp_path / "clip.npy", clip_bcthw().transpose(1, 2).numpy())  # transformers: [B, T, C, H, W]
    arguments = [str(tmp_path / "clip.npy"), str(tmp_path / "features.npz"), *folders, head]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    # -S with the packages' folder alone: an editable installation of this project stays out of sight.
    packages = str(Path(torch.__file__).parent.parent)
    code = f"import sys; sys.path.append({packages!r})\n{LOAD}"
    command = [sys.executable, "-S", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = np.load(tmp_path / "features.npz")
    expected = features(disturbed_model().encoder)
    for folder in folders:
        assert np.abs(loaded[folder] - expected.numpy()).max() < 1e-4
    assert loaded[head].shape == (2, 7)
    assert 0 < np.abs(loaded[head]).max() < 0.01, "a fresh head: small, not zero"


def test_a_classifier_keeps_the_blocks_and_drops_the_final_norm(runs: Path, tmp_path: Path) -> None:
    main([str(runs / "zero-1"), "--format", "hf", "--head", "--out", str(tmp_path / "head")])
    classifier = VideoMAEForVideoClassification.from_pretrained(tmp_path / "head").eval()
    encoder = disturbed_model().encoder
    encoder.norm = torch.nn.Identity()
    with torch.no_grad():
        found = classifier.videomae(clip_bcthw().transpose(1, 2)).last_hidden_state
    assert classifier.num_labels == 400
    assert (found - features(encoder)).abs().max() < 1e-4


def test_an_encoder_of_pixels_gives_equal_features_in_transformers(tmp_path: Path) -> None:
    """iGPT's: patches of one pixel and one frame."""
    pixels = ModelConfig(
        encoder="demo", frames=2, image_size=4, tubelet=(1, 1, 1), cluster=(1, 1, 1), target_norm="none"
    )
    torch.manual_seed(3)
    encoder = ARVideo(pixels, DECODER).encoder
    export_encoder(encoder, pixels, Storage(str(tmp_path)), "hf", None)
    clip = torch.randn(2, 3, 2, 4, 4)
    with torch.no_grad():
        found = VideoMAEModel.from_pretrained(tmp_path).eval()(clip.transpose(1, 2)).last_hidden_state
        expected = encoder(to_cubes(clip, (1, 1, 1)), torch.arange(32).expand(2, -1))
    assert (found - expected).abs().max() < 1e-4


def test_the_preprocessor_configuration_is_the_models_geometry(runs: Path, tmp_path: Path) -> None:
    main([str(runs / "zero-1"), "--format", "hf", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content["crop_size"] == {"height": 32, "width": 32}
    assert content["image_mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("format", ["hf", "safetensors", "torch"])
def test_every_export_is_accepted_as_initial_weights(runs: Path, tmp_path: Path, format: str) -> None:
    main([str(runs / "zero-3"), "--format", format, "--out", str(tmp_path / format)])
    files = {"hf": "", "safetensors": "encoder.safetensors", "torch": "checkpoint.pth"}
    encoder = new_encoder()
    fill_encoder(encoder, str(tmp_path / format / files[format]), read_encoder)
    assert torch.equal(features(encoder), features(disturbed_model().encoder))


def test_transformers_pretraining_folder_gives_equal_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = VideoMAEForPreTraining(videomae_config(mean_pooling=False)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path)
        expected = theirs.videomae(clip_bcthw().transpose(1, 2)).last_hidden_state
    encoder = new_encoder()
    taken = fill_encoder(encoder, str(tmp_path), read_encoder)
    assert "without" not in taken
    assert (features(encoder) - expected).abs().max() < 1e-4


def test_a_classifiers_folder_leaves_the_final_norm_and_says_so(tmp_path: Path) -> None:
    theirs = VideoMAEModel(videomae_config(mean_pooling=True)).eval()
    theirs.save_pretrained(tmp_path)
    encoder = new_encoder()
    assert "without a final norm" in fill_encoder(encoder, str(tmp_path), read_encoder)
    encoder.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = theirs(clip_bcthw().transpose(1, 2)).last_hidden_state
    assert (features(encoder) - expected).abs().max() < 1e-4


def test_original_repositorys_checkpoint_with_its_options_is_read_without_unpickling(tmp_path: Path) -> None:
    own = disturbed_model().encoder.state_dict()
    weights = {f"encoder.{name}": value for name, value in own.items()} | {"mask_token": torch.zeros(1)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "checkpoint.pth")
    encoder = new_encoder()
    fill_encoder(encoder, str(tmp_path / "checkpoint.pth"), read_encoder)
    assert torch.equal(features(encoder), features(disturbed_model().encoder))


def test_safetensors_export_has_the_original_repositorys_names(runs: Path, tmp_path: Path) -> None:
    main([str(runs / "zero-1"), "--format", "safetensors", "--out", str(tmp_path)])
    names = load_file(tmp_path / "encoder.safetensors").keys()
    assert {"patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.5.mlp.fc2.bias", "norm.bias"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/run", "--format", "hf"], "has no complete checkpoint"),
        (["RUN/checkpoints/step-00000099", "--format", "hf"], "not a complete checkpoint; "),
        (["RUN", "--format", "torch", "--head"], "--head belongs to --format hf"),
        (["RUN", "--format", "hf", "--labels", "5"], "--labels belongs to --head"),
    ],
)
def test_wrong_exports_say_what_to_do(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([argument.replace("RUN", str(runs / "zero-1")) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_initial_weights_of_another_encoder_stop_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    VideoMAEModel(videomae_config(mean_pooling=False)).save_pretrained(tmp_path / "small")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    for path, message in (
        (tmp_path / "small", "set model.encoder and model.tubelet to those of the weights"),
        (tmp_path / "other.pth", "holds no VideoMAE encoder"),
        (tmp_path / "absent.pth", "no such file"),
        (tmp_path, "neither model.safetensors nor pytorch_model.bin"),
    ):
        with pytest.raises(SystemExit) as stopped:
            pretrain(["--dry-run", "--model.encoder", "tiny", "--model.init_from", str(path)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"model.init_from {path}" in error
        assert message in error
