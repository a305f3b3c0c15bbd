"""At each place of the pictures stand the pixels that belong there, for every method and step."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from arvideo_dist.analysis.clips import choose_source, load_clips
from arvideo_dist.analysis.reconstruct import Predicted, pages, predict
from arvideo_dist.analyze import main
from arvideo_dist.config.model import ModelConfig
from arvideo_dist.model.clusters import Clusters, PredictionStep
from arvideo_dist.model.pretraining import restore_pixels
from arvideo_dist.model.vit import to_cubes
from arvideo_dist.tasks.draws import TokenDraw
from arvideo_dist.tasks.picture import Page, gif
from arvideo_dist.train.trained import open_trained
from tests.analysis.conftest import CLIPS, MODELS, run_config

ROWS = ("input", "context", "predicted")
GREY, DARK = 128, 38  # tokens that are not seen, and not predicted
SCALE = 3  # 32 pixels are shown as 96


def predicted_clips(runs: Path, kind: str) -> list[Predicted]:
    config, trained = run_config(runs, kind), open_trained(str(runs / kind))
    model = trained.load_model()
    source = choose_source(config.data, None, None, None)
    batches = load_clips(source, CLIPS, 4, 32, TokenDraw(model.sequences), seed=0)
    return [predict(model, batch) for batch in batches]


def shown_tokens(picture: np.ndarray, row: int, top: int = 0) -> np.ndarray:
    """Each token of a row of cells as uint8 [tokens, 2 frames, 6, 6, 3], read back from the page; the tokens'
    edges, where outlines run, are left out."""
    layout = Page(ROWS, 4, (32, 32))
    frames = []
    for frame in range(4):
        x, y = layout.corner(row, frame)
        frames.append(picture[top + y : top + y + 96 : SCALE, x : x + 96 : SCALE])
    video = np.stack(frames).reshape(2, 2, 4, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return video.reshape(32, 2, 8, 8, 3)[:, :, 1:7, 1:7]


def as_shown(cubes_lp: torch.Tensor) -> np.ndarray:
    """Cubes [L, P] in [0, 1] as `shown_tokens` reads them."""
    return (cubes_lp * 255).round().to(torch.uint8).reshape(-1, 2, 8, 8, 3)[:, :, 1:7, 1:7].numpy()


def check_rows(
    picture: np.ndarray, clip: Predicted, model: ModelConfig, step: PredictionStep, top: int
) -> None:
    cubes_lp = to_cubes(clip.clip_bcthw, model.tubelet)[0]
    context, target = clip.context_ids_bn[0, : step.context], clip.target_ids_bm[0, : step.targets]
    seen = np.full((32, 2, 6, 6, 3), GREY, dtype=np.uint8)
    seen[context] = as_shown(cubes_lp[context].float() / 255)
    predicted = np.full((32, 2, 6, 6, 3), DARK, dtype=np.uint8)
    if step.targets:
        predictions = clip.predictions_bmp[0, : step.targets]
        predicted[target] = as_shown(restore_pixels(predictions, cubes_lp[target], model.target_norm))
    expected = as_shown(cubes_lp.float() / 255), seen, predicted
    for row, values in enumerate(expected):
        assert np.array_equal(shown_tokens(picture, row, top), values), ROWS[row]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_overview_shows_input_context_and_predictions_of_every_clip(
    runs: Path, tmp_path: Path, kind: str
) -> None:
    main(["reconstruct", str(runs / kind), "--out", str(tmp_path), "--no-mlflow"])
    picture = np.asarray(Image.open(tmp_path / "reconstruct.png"))
    clips = predicted_clips(runs, kind)
    assert len(clips) == CLIPS
    for number, clip in enumerate(clips):
        whole = PredictionStep(clip.context_ids_bn.shape[1], clip.target_ids_bm.shape[1])
        check_rows(picture, clip, MODELS[kind], whole, top=number * (3 * 98 + 8))
    assert not np.array_equal(shown_tokens(picture, 0), shown_tokens(picture, 0, top=3 * 98 + 8))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_each_page_shows_what_its_step_sees_and_all_predictions_so_far(runs: Path, kind: str) -> None:
    model = open_trained(str(runs / kind)).load_model()
    steps = model.sequences.prediction_steps()
    assert len(steps) == {"arvideo": 7, "randsac": 7, "videomae": 1}[kind]
    clip = predicted_clips(runs, kind)[0]
    shown = list(pages(clip, steps, MODELS[kind]))
    assert len(shown) == len(steps) + 1
    check_rows(shown[0], clip, MODELS[kind], PredictionStep(steps[0].context, 0), top=18)
    for picture, step in zip(shown[1:], steps, strict=True):
        check_rows(picture, clip, MODELS[kind], step, top=18)


def test_the_step_that_a_page_shows_is_outlined_and_nothing_else(runs: Path) -> None:
    clip = predicted_clips(runs, "arvideo")[0]
    steps = open_trained(str(runs / "arvideo")).load_model().sequences.prediction_steps()
    cluster = clip.target_ids_bm[0, steps[0].targets : steps[1].targets]
    time, top, left = (int(v) for v in np.unravel_index(int(cluster.min()), (2, 4, 4)))
    picture = list(pages(clip, steps, MODELS["arvideo"]))[2]
    red = (picture == (255, 0, 0)).all(axis=-1)
    expected = np.zeros_like(red)
    layout = Page(ROWS, 4, (32, 32), caption="")
    for row in range(3):
        for frame in (2 * time, 2 * time + 1):
            x, y = layout.corner(row, frame)
            x, y = x + left * 24, y + top * 24
            expected[y : y + 48, x : x + 48] = True
            expected[y + 1 : y + 47, x + 1 : x + 47] = False
    assert np.array_equal(red, expected)


def test_a_later_step_sees_what_an_earlier_one_predicted(runs: Path) -> None:
    """Steps are prefixes of the drawn sequence, so the context of step s holds tokens of the clusters before it
    and of no other: the leak test of the pictures."""
    sequences = open_trained(str(runs / "arvideo")).load_model().sequences
    assert isinstance(sequences, Clusters)
    context, target = sequences.draw_sequence(np.random.default_rng(0))
    cluster_of = np.empty(32, dtype=int)
    for cluster, members in enumerate(sequences.members_kn):
        cluster_of[members] = cluster
    before = {cluster_of[context[0]]}
    start = 0
    for step in sequences.prediction_steps():
        [own] = set(cluster_of[target[start : step.targets]])
        assert set(cluster_of[context[: step.context]]) == before
        assert own not in before
        before.add(own)
        start = step.targets
    assert start == len(target)


def test_long_sequences_advance_by_several_steps_a_page() -> None:
    model = ModelConfig(encoder="demo", frames=2, image_size=64, tubelet=(2, 8, 8), cluster=(1, 1, 1))
    steps = Clusters(model.token_grid, model.cluster, mask_ratio=0.8).prediction_steps()
    ids = torch.arange(64)[None]
    clip = Predicted(
        torch.zeros(1, 3, 2, 64, 64, dtype=torch.uint8), ids[:, :-1], ids[:, 1:],
        torch.ones(1, 63, 384), torch.zeros(63),
    )  # fmt: skip
    shown = list(pages(clip, steps, model))
    assert len(steps) == 63
    assert len(shown) == 40


def test_gif_shows_every_page_and_the_last_one_longest(tmp_path: Path) -> None:
    made = [np.full((8, 8, 3), level, dtype=np.uint8) for level in (0, 100, 200)]
    image = Image.open(io.BytesIO(gif(made, seconds=0.5)))
    durations = []
    for number, page in enumerate(made):
        image.seek(number)
        assert np.array_equal(np.asarray(image.convert("RGB")), page)
        durations.append(image.info["duration"])
    assert image.n_frames == 3  # type: ignore[attr-defined]
    assert durations == [500, 500, 2000]


def test_command_writes_an_animation_of_each_clip_and_logs_all_of_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reconstruct", str(runs / "arvideo"), "--clips", "2", "--out", str(tmp_path / "out")])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"reconstruct.png", "reconstruct-000.gif", "reconstruct-001.gif"}
    assert Image.open(tmp_path / "out/reconstruct-001.gif").n_frames == 8  # type: ignore[attr-defined]
    clips = predicted_clips(runs, "arvideo")
    out = capsys.readouterr().out
    for number in range(2):
        assert f"clip {number}: mean squared error {clips[number].error_m.mean():.4f}" in out
    run_id = json.loads((runs / "arvideo/run.json").read_text())["mlflow_run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    logged = {file.path for file in client.list_artifacts(run_id, "analysis")}
    assert logged >= {f"analysis/{name}" for name in names}


def test_clips_that_cannot_be_decoded_are_named_and_left_out(
    runs: Path, fresh_dataset_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([
        "reconstruct", str(runs / "arvideo"), "--data", str(fresh_dataset_copy), "--no-mlflow",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    said = capsys.readouterr()
    assert "left out: video000 in val-000000.tar: decode" in said.err
    assert "clip 1: " in said.out
    assert "clip 2: " not in said.out


@pytest.fixture
def fresh_dataset_copy(runs: Path, tmp_path: Path) -> Path:
    """The data set with its first video destroyed."""
    shutil.copytree(runs / "data", tmp_path / "data")
    first = pq.read_table(tmp_path / "data/index-val.parquet").to_pylist()[0]
    with open(tmp_path / "data" / first["shard"], "r+b") as tar:
        tar.seek(first["offset"])
        tar.write(bytes(first["size"]))
    return tmp_path / "data"


def test_a_run_whose_mlflow_is_gone_is_written_but_reported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "arvideo", tmp_path / "moved")
    record = {"mlflow_run_id": "0" * 32, "tracking_uri": f"sqlite:///{tmp_path}/gone.db"}
    (tmp_path / "moved/run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stopped:
        main(["reconstruct", str(tmp_path / "moved"), "--clips", "1", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert f"MLflow's database {tmp_path}/gone.db, which is not there" in said
    assert "--no-mlflow" in said
    assert (tmp_path / "out/reconstruct.png").exists()
    assert not (tmp_path / "gone.db").exists()
