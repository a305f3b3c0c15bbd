"""Ranks of attention maps: of known maps, of the encoder's own maps, and as the command writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow.tracking import MlflowClient
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEModel

from arvideo_dist.analysis.attention_rank import attention_ranks, default_tolerance, for_each_map, summary
from arvideo_dist.analysis.clips import choose_source, load_clips
from arvideo_dist.analyze import main
from arvideo_dist.export import main as export
from arvideo_dist.model.layouts import to_transformers
from arvideo_dist.model.pretraining import normalise_pixels
from arvideo_dist.model.vit import Encoder, EncoderSize, to_cubes
from arvideo_dist.train.trained import open_trained
from tests.analysis.conftest import CLIPS

TOKENS = 32


def encoder(depth: int = 2) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(EncoderSize(width=48, depth=depth, heads=3), (2, 8, 8), TOKENS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def clips() -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def maps_of(model: Encoder) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for_each_map(model, normalise_pixels(to_cubes(clips(), (2, 8, 8))), found.append)
    return found


def ranks_of(model: Encoder, runs: Path, tolerance: float = default_tolerance(TOKENS)) -> torch.Tensor:
    source = choose_source(None, str(runs / "data"), "val", 2)
    batches = load_clips(source, CLIPS, 4, 32, lambda seed, place, row: {}, seed=0)
    return attention_ranks(model, (2, 8, 8), batches, tolerance, lambda line: None)


def test_maps_are_the_ones_that_transformers_gives_of_the_same_weights() -> None:
    model = encoder()
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=192, layer_norm_eps=1e-6, use_mean_pooling=False,
        attn_implementation="eager",  # type: ignore[call-arg]
    )  # fmt: skip
    theirs = VideoMAEModel(config).eval()
    own = dict(model.state_dict())
    loaded = theirs.load_state_dict(_as_installed(theirs, to_transformers(own)), strict=True)
    assert not loaded.missing_keys
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = ((clips().float() / 255 - mean) / std).transpose(1, 2)
    with torch.no_grad():
        expected = theirs(pixels, output_attentions=True).attentions
    found = maps_of(model)
    assert len(found) == len(expected) == 2
    for ours, their_map in zip(found, expected, strict=True):
        assert ours.shape == (2, 3, TOKENS, TOKENS)
        assert (ours - their_map).abs().max() < 1e-6
        assert ours.std() > 1e-3, "maps that differ from the uniform one"


def _as_installed(model: VideoMAEModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`to_transformers` writes the names of releases before 5, which `from_pretrained` translates."""
    names = {"q_bias": "query.bias", "v_bias": "value.bias"}
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    for name, value in model.state_dict().items():
        if name.endswith("key.bias"):
            renamed[name] = torch.zeros_like(value)
    return renamed


def test_maps_times_values_are_what_the_attention_returns() -> None:
    """An explicit softmax, layer by layer, with the block's own weights."""
    model = encoder()
    found = maps_of(model)
    cubes = normalise_pixels(to_cubes(clips(), (2, 8, 8)))
    with torch.no_grad():
        x = model.patch_embed(cubes) + model.positions
        for maps_bhll, block in zip(found, model.blocks, strict=True):
            normed = block.norm1(x)
            width = normed.shape[-1]
            values = F.linear(normed, block.attn.qkv.weight[2 * width :], block.attn.v_bias)
            mixed = maps_bhll @ values.unflatten(-1, (3, -1)).transpose(1, 2)
            expected = block.attn.proj(mixed.transpose(1, 2).flatten(2))
            assert (block.attn(normed) - expected).abs().max() < 1e-5
            x = block(x)


def test_constant_queries_give_rank_one(runs: Path) -> None:
    """Where no query depends on its token, all rows of a map are equal."""
    model = encoder()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 0
    assert torch.equal(ranks_of(model, runs), torch.ones(CLIPS, 2, 3, dtype=torch.int64))


def test_queries_of_two_kinds_give_rank_two_in_that_head(runs: Path) -> None:
    """By hand: without embeddings of pixels a token is its position, and a query that is the sign of one feature
    leaves two kinds of rows."""
    model = encoder(depth=1)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.positions.zero_()
        model.positions[0, ::2] = torch.randn(48)
        model.positions[0, 1::2] = torch.randn(48)
    assert torch.equal(ranks_of(model, runs), torch.full((CLIPS, 1, 3), 2))


def test_a_tolerance_counts_the_singular_values_above_it(runs: Path) -> None:
    model = encoder()
    found = ranks_of(model, runs, tolerance=1e-2)
    source = choose_source(None, str(runs / "data"), "val", 2)
    batches = load_clips(source, CLIPS, 4, 32, lambda seed, place, row: {}, seed=0)
    for clip, batch in enumerate(batches):
        maps: list[torch.Tensor] = []
        for_each_map(model, normalise_pixels(to_cubes(batch.clips, (2, 8, 8))), maps.append)
        for layer, maps_bhll in enumerate(maps):
            for head in range(3):
                values = np.linalg.svd(maps_bhll[0, head].double().numpy(), compute_uv=False)
                assert found[clip, layer, head] == (values > 1e-2 * values[0]).sum()
    assert 1 < found.float().mean() < TOKENS


def test_summary_is_the_mean_over_heads_and_clips() -> None:
    ranks = torch.tensor([[[1, 3], [5, 5]], [[3, 5], [7, 5]]])  # two clips, two layers, two heads
    assert summary(ranks) == {
        "mean": [3.0, 5.5],
        "deviation": [pytest.approx(2**0.5), pytest.approx(0.75**0.5)],
        "heads": [[2.0, 4.0], [6.0, 5.0]],
    }


def test_command_compares_runs_and_exported_weights_in_one_plot_and_logs_them(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format in ("hf", "torch"):
        export([str(runs / "videomae"), "--format", format, "--out", str(tmp_path / format)])
    sources = [str(runs / "arvideo"), str(runs / "videomae/checkpoints/step-00000001"), str(tmp_path / "hf")]
    sources.append(str(tmp_path / "torch/checkpoint.pth"))
    main(["attention-rank", *sources, "--out", str(tmp_path / "out"), "--clips", "2"])
    report = json.loads((tmp_path / "out/attention-rank.json").read_text())
    assert list(report["encoders"]) == [
        "arvideo step-00000001", "videomae step-00000001", "hf", "checkpoint.pth",
    ]  # fmt: skip
    arvideo, *others = report["encoders"].values()
    assert [other["mean"] for other in others] == [others[0]["mean"]] * 3, "the same weights"
    assert arvideo["mean"] != others[0]["mean"]
    assert len(arvideo["mean"]) == 6
    expected = ranks_of(open_trained(sources[0]).load_model().encoder, runs)[:2]
    assert arvideo["heads"] == summary(expected)["heads"]
    assert (report["tokens"], arvideo["clips"]) == (TOKENS, 2)
    assert report["tolerance"] == pytest.approx(TOKENS * 2**-23)
    assert "softmax" in report["definition"]
    assert Image.open(tmp_path / "out/attention-rank.png").size == (700, 500)
    assert "arvideo step-00000001: " in capsys.readouterr().out
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    for kind in ("arvideo", "videomae"):
        run_id = json.loads((runs / kind / "run.json").read_text())["mlflow_run_id"]
        logged = Path(client.download_artifacts(run_id, "analysis", str(tmp_path)))
        for name in ("attention-rank.png", "attention-rank.json"):
            assert (logged / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        shutil.rmtree(logged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/run"], "/nowhere/run has no complete checkpoint"),
        (["RUNS/arvideo", "--data", "/nowhere"], "no data set at /nowhere"),
        (["RUNS/arvideo", "--split", "test"], "splits found there: val"),
        (["RUNS/arvideo", "--clips", "0"], "argument --clips: 0: give a number from 1"),
        (["RUNS/arvideo", "--stride", "-1"], "argument --stride: -1: give a number from 1"),
        (["RUNS/arvideo", "--tolerance", "2"], "--tolerance 2: give a share"),
        (["WEIGHTS/checkpoint.pth"], "does not say how many frames and pixels"),
        (["WEIGHTS/hf"], "Give --data PATH"),
        (["RUNS/arvideo", "WEIGHTS/longer"], "the encoders take other clips"),
        (["RUNS/arvideo", "WEIGHTS/empty"], "holds a model of type bert, not videomae"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    runs: Path, weights: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [a.replace("RUNS", str(runs)).replace("WEIGHTS", str(weights)) for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["attention-rank", *given, "--out", str(weights / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (weights / "out").exists()


@pytest.fixture(scope="module")
def weights(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a run, one made to be for longer clips, and a folder of another model."""
    folder = tmp_path_factory.mktemp("weights")
    for format in ("hf", "torch"):
        to = folder if format == "torch" else folder / "hf"
        export([str(runs / "arvideo"), "--format", format, "--out", str(to)])
    shutil.copytree(folder / "hf", folder / "longer")
    config = json.loads((folder / "hf/config.json").read_text())
    (folder / "longer/config.json").write_text(json.dumps({**config, "num_frames": 8}))
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder
