"""The nearest videos: their order, the pictures on the sheet, files as queries, and what has moved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from sklearn.neighbors import NearestNeighbors

from arvideo_dist.analysis import neighbours as near
from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.data.decode import decode_rgb
from arvideo_dist.data.index import open_index
from arvideo_dist.data.loader import ClipSamples, LoaderOptions
from arvideo_dist.data.reader import MemberReader
from arvideo_dist.data.views import spatial_views, temporal_views
from arvideo_dist.embed import main as embed
from arvideo_dist.neighbours import main
from arvideo_dist.probe import main as probe
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.draws import label_of
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.tasks.feature_files import VideoFeatures, read_features
from arvideo_dist.train.trained import READERS
from tests.data_prep.runs import prepare
from tests.data_prep.videos import make
from tests.train.encoders import MODEL, embed_config, save_encoder

VIDEOS, SIDE, SCALE, GAP = 6, MODEL.image_size, 3, 2
ROOT = Path(__file__).resolve().parents[2]


def embed_here(config: EmbedConfig) -> str:
    """Features of all videos without the machinery of a run; the folder."""
    task, folder = Embedding(config), Storage(config.run.storage_path).child(config.run.name)
    module = task.build()
    task.load(module, READERS)
    samples = ClipSamples(
        [task.source()],
        clip_frames=MODEL.frames,
        image_size=MODEL.image_size,
        draw=label_of,
        seed=0,
        shuffle=False,
        options=LoaderOptions(repeats=len(task.views)),
    )
    (index,) = samples.indexes
    batch = samples[list(range(len(index) * len(task.views)))]
    with torch.inference_mode():
        values = task.compute(module.eval(), batch).numpy()

    def write(name: str, fill: Callable[[Path], None]) -> None:
        with folder.writing(name) as path:
            fill(path)

    task.finish([task.rows(batch, values)], index, write)
    return folder.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos` of two classes and `data` that data_prep made of them, an `encoder`, and the features that it makes:
    `mean` of six views and `tokens` of one."""
    folder = tmp_path_factory.mktemp("neighbours")
    for number in range(VIDEOS):
        file = folder / "videos" / ("left" if number % 2 else "right") / f"clip{number}.mp4"
        make(file, source=f"testsrc2=s=96x64:r=10:d=3,hue=h={50 * number}:s={1 + number % 3}")
    with pytest.MonkeyPatch.context() as patch:
        given = ("--videos", folder / "videos", "--out", folder / "data", "--split", "val")
        assert prepare(patch, "folder", *given, "--labels-from-folders") == 0
    save_encoder(folder / "encoder")
    for name, embedding in (("mean", {"views": "2x3"}), ("tokens", {"views": "1x1", "pooling": "tokens"})):
        source, data, runs = (str(folder / each) for each in ("encoder", "data", "runs"))
        embed_here(embed_config(source, data, runs, name, embedding=embedding))
    return folder


@pytest.fixture
def features(folder: Path) -> VideoFeatures:
    return read_features(str(folder / "runs" / "mean"))


def ask(folder: Path, *arguments: object, features: str = "mean") -> None:
    main([str(folder / "runs" / features), *map(str, arguments)])


@pytest.mark.parametrize("rows_at_once", [2**16, 7])
def test_the_order_is_scikit_learns(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(near, "_ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(100, 16)) * rng.uniform(0.01, 100, size=(100, 1))).astype(np.float32)
    distances, expected = (
        NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(values.astype(np.float64))
    ).kneighbors(values[:5].astype(np.float64))
    for query in range(5):
        found = near.nearest(values, values[query], 20)
        assert [row for row, _ in found] == expected[query].tolist()
        np.testing.assert_allclose([cosine for _, cosine in found], 1 - distances[query], atol=1e-9)
        assert near.nearest(values, values[query], 19, leave_out=query) == found[1:]


def test_a_vector_of_zeros_is_near_to_nothing_and_equal_ones_keep_their_order() -> None:
    values = np.array([[0, 0], [1, 0], [-1, 0], [2, 0]], dtype=np.float32)
    assert near.nearest(values, values[1], 9) == [(1, 1.0), (3, 1.0), (0, 0.0), (2, -1.0)]


def cosines_with(features: VideoFeatures, vector: np.ndarray) -> dict[str, float]:
    values, vector = features.values_nd.astype(np.float64), vector.astype(np.float64)
    cosines = values @ vector / np.linalg.norm(values, axis=1) / np.linalg.norm(vector)
    return dict(zip(features.keys, cosines.tolist(), strict=True))


def rows_of(output: str) -> list[list[str]]:
    """Rank, similarity, key and label of each line of the table."""
    return [line.split() for line in output.splitlines() if line[:4].strip().isdecimal()]


def test_the_table_has_the_others_by_their_cosine(
    folder: Path, features: VideoFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = features.keys[2]
    ask(folder, "--query", key, "--count", 3, "--out", tmp_path / "sheet.png")
    cosines = cosines_with(features, features.values_nd[2])
    del cosines[key]
    expected = sorted(cosines, key=lambda each: -cosines[each])[:3]
    labels = dict(zip(features.keys, features.label_names, strict=True))
    assert rows_of(capsys.readouterr().out) == [
        [str(rank), f"{cosines[each]:.4f}", each, labels[each]] for rank, each in enumerate(expected, 1)
    ]


def frames_in_data(folder: Path, key: str) -> np.ndarray:
    """The middle window of a video in the centre crop, uint8 [T, S, S, 3]."""
    storage = Storage(str(folder / "data"))
    index = open_index(storage, "val")
    row = index[index.table["key"].to_pylist().index(key)]
    (window,) = temporal_views(row.frames, MODEL.frames, 2, "window", 1)
    frames = decode_rgb(MemberReader(storage, "").read(row), window)
    return near.frames_of(spatial_views(frames, SIDE, 1)[0])


def test_each_row_of_the_sheet_has_the_frames_of_its_video(
    folder: Path, features: VideoFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(folder, "--query", features.keys[0], "--out", tmp_path / "sheet.png")
    keys = [features.keys[0], *(row[2] for row in rows_of(capsys.readouterr().out))]
    assert sorted(keys) == sorted(features.keys)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell = SIDE * SCALE + GAP
    margin = page.shape[1] - MODEL.frames * cell
    assert page.shape[0] == len(keys) * cell + 8
    for row, key in enumerate(keys):
        for column, frame in enumerate(frames_in_data(folder, key)):
            x, y = margin + column * cell, row * cell
            shown = page[y : y + SIDE * SCALE, x : x + SIDE * SCALE]
            assert (shown == frame.repeat(SCALE, 0).repeat(SCALE, 1)).all(), (key, column)
        name = page[row * cell : (row + 1) * cell, :margin]
        assert (name < 128).any(), "its name stands beside it"


def test_the_animation_shows_a_frame_of_every_video_at_a_time(
    folder: Path, features: VideoFeatures, tmp_path: Path
) -> None:
    ask(folder, "--query", features.keys[0], "--out", tmp_path / "sheet.png", "--animate")
    movie = Image.open(tmp_path / "sheet.gif")
    assert len(list(ImageSequence.Iterator(movie))) == MODEL.frames
    columns = math.ceil(math.sqrt(VIDEOS))
    assert movie.size[0] == 2 + columns * (SIDE * SCALE + GAP)


@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_a_file_as_query_has_the_features_of_its_video_in_the_data_set(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The file that data_prep was given: it is prepared again, as the data set was."""
    features = read_features(str(folder / "runs" / kind))
    file = folder / "videos" / "left" / "clip3.mp4"
    ask(folder, "--query", file, "--out", tmp_path / "sheet.png", features=kind)
    index = open_index(Storage(str(folder / "data")), "val").table
    (key,) = (key for key, source in zip(*(index[n].to_pylist() for n in ("key", "source")), strict=True)
              if source.endswith("clip3.mp4"))  # fmt: skip
    first, *_ = rows_of(capsys.readouterr().out)
    assert first[1:] == ["1.0000", key, "left"]
    made = near_query(folder, features, file)
    np.testing.assert_allclose(made, features.values_nd[features.keys.index(key)], atol=1e-6, rtol=1e-5)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell = SIDE * SCALE + GAP
    margin = page.shape[1] - MODEL.frames * cell
    assert (page[: cell - GAP, margin:] == page[cell : 2 * cell - GAP, margin:]).all(), (
        "query and nearest alike"
    )


def near_query(folder: Path, features: VideoFeatures, file: Path) -> np.ndarray:
    from arvideo_dist.analysis.query import QueryVideo

    _, manifest = near.data_set(features.about["data"], None)
    return QueryVideo(file, features.about, manifest).features(None)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        ask(folder, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_key_is_answered_with_those_spelled_alike(
    folder: Path, features: VideoFeatures, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, folder, "--query", features.keys[1] + "x")
    assert f"no video with features has the key '{features.keys[1]}x'" in said
    assert f"spelled alike: {features.keys[1]}" in said


def test_a_data_set_that_has_moved_is_asked_for_and_another_one_refused(
    folder: Path, features: VideoFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "data", tmp_path / "moved")
    embed = embed_config(
        str(folder / "encoder"), str(tmp_path / "moved"), str(tmp_path), "f", embedding={"views": "1x1"}
    )
    made = Path(embed_here(embed)) / "features.parquet"
    (tmp_path / "moved").rename(tmp_path / "new place")
    query = ("--query", features.keys[0], "--out", tmp_path / "sheet.png")
    with pytest.raises(SystemExit):
        main([str(made), *map(str, query)])
    assert "give --data if they have moved" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
    main([str(made), *map(str, query), "--data", str(tmp_path / "new place")])
    assert (tmp_path / "sheet.png").exists()
    with pytest.MonkeyPatch.context() as patch:
        given = ("--videos", folder / "videos", "--out", tmp_path / "other", "--split", "val")
        assert prepare(patch, "folder", *given) == 0
    said = refused(capsys, folder, *query, "--data", tmp_path / "other")
    assert "is not the data set that has these features" in said


def test_an_encoder_that_has_moved_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = folder / "videos" / "right" / "clip0.mp4", ("--out", tmp_path / "sheet.png")
    (folder / "encoder").rename(folder / "moved")
    try:
        assert "Give --source" in refused(capsys, folder, "--query", file, *out)
        ask(folder, "--query", file, *out, "--source", folder / "moved")
    finally:
        (folder / "moved").rename(folder / "encoder")
    assert rows_of(capsys.readouterr().out)[0][1] == "1.0000"


def test_what_is_no_video_and_what_holds_no_features_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.mp4").write_text("no video")
    assert "note.mp4 cannot be used as query" in refused(capsys, folder, "--query", tmp_path / "note.mp4")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--query", "x"])
    assert "python -m arvideo_dist.embed" in capsys.readouterr().err


def commands_of(page: str) -> list[list[str]]:
    """Those that a page of the documentation shows as they are typed."""
    text = (ROOT / "docs" / page).read_text()
    blocks = text.split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python -m ")]
    return [line.split()[2:] for line in lines]


def test_the_commands_of_the_documentation_run(
    folder: Path,
    features: VideoFeatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`embed` up to its derived numbers, the others to their files; then the lines of Python."""
    shutil.copyfile(folder / "videos" / "left" / "clip1.mp4", tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    found = folder / "runs" / "mean"
    there = {"runs/mine": folder / "encoder", "DATA": folder / "data", "train": "val", "FEATURES": found}
    there |= {f"{name}_FEATURES": found for name in ("TRAIN", "VAL", "TEST")}
    there |= {"runs/mine/embeddings/step-00001000-train-1x1-mean": found, "KEY": features.keys[0]}
    ran = []
    for module, *words in commands_of("features.md"):
        given = [str(there.get(word, word)) for word in words]
        ran.append(module.rpartition(".")[2])
        {"embed": embed, "neighbours": main, "probe": probe}[ran[-1]](
            [*given, *(["--dry-run"] if ran[-1] == "embed" else [])]
        )
    assert ran == ["embed", "neighbours", "probe", *["neighbours"] * 2, "probe"]
    assert f'"total_places": {VIDEOS}' in capsys.readouterr().out
    made = {"neighbours.png", "sheet.png", "sheet.gif", "probe"}
    assert {file.name for file in (tmp_path / "build").iterdir()} == made
    monkeypatch.chdir(found)
    text = (ROOT / "docs" / "features.md").read_text()
    (block,) = (each for each in text.split("```") if each.startswith("python\n"))
    names: dict[str, np.ndarray] = {}
    exec(block.removeprefix("python\n"), names)
    np.testing.assert_allclose(
        names["features"].reshape(VIDEOS, 6, -1).mean(1), features.values_nd, atol=1e-6, rtol=1e-5
    )
