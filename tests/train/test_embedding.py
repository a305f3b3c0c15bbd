"""Embedding over interruptions, on any number of workers, and the features that come of it; without Ray."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load

from arvideo_dist import command
from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.data.loader import ClipSamples, LoaderOptions
from arvideo_dist.embed import main
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.draws import label_of
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.tasks.feature_files import read_features
from arvideo_dist.train import sequence
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RESULT
from arvideo_dist.train.tracking.runs import close_run, open_run
from tests.train.distributed import run_ranks
from tests.train.encoders import MODEL, embed_config, make_encoder, save_encoder
from tests.train.runs import damage, make_data
from tests.train.test_length import Told, _LeavesAfter

VIDEOS, VIEWS, WIDTH, TOKENS = 16, 6, 192, 8
KINDS = [(pooling, format) for pooling in ("mean", "tokens") for format in ("parquet", "safetensors")]
FILES = {"parquet": ["features.parquet"], "safetensors": ["features.safetensors", "features.json"]}
MOST_WAITING_BYTES = 4 * VIEWS * TOKENS * WIDTH * 4  # four batches of whole tokens, or 31 of means
CRASH_AT = 4  # batch of each of two workers: two are saved, and one is not


class _Crash(Exception):  # noqa: N818
    """A fault of the machine."""


def _embed_all(assignments: dict[str, Assignment]) -> None:
    """Those of name `lost...` on two workers are lost half-way."""
    control, original = dist.new_group(backend="gloo"), sequence.SequenceRun._computed
    for name, assignment in assignments.items():
        taken = 0
        crashes = name.startswith("lost") and dist.get_world_size() == 2

        def computed(self: sequence.SequenceRun, host: Any, crashes: bool = crashes) -> torch.Tensor:
            nonlocal taken
            taken += 1
            if crashes and taken == CRASH_AT:
                raise _Crash
            return original(self, host)

        with (
            mock.patch.object(sequence.SequenceRun, "_computed", computed),
            mock.patch("arvideo_dist.tasks.embedding._GROUP_BYTES", 7 * 4 * WIDTH),
            mock.patch("arvideo_dist.train.sequence_saves._MOST_WAITING_BYTES", MOST_WAITING_BYTES),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(_Crash),
        ):
            activity.step = 0  # as in processes of their own
            watch = _LeavesAfter(assignment.lease, control, None)
            tracker = Told() if dist.get_rank() == 0 else None
            sequence.run_sequence(assignment, torch.device("cpu"), control, watch, tracker)


@dataclass(frozen=True)
class Place:
    folder: Path

    def config(self, name: str, pooling: str, format: str, data: str = "data", **run: Any) -> EmbedConfig:
        return embed_config(
            str(self.folder / "encoder"),
            str(self.folder / data),
            str(self.folder / "runs"),
            f"{name}-{pooling}-{format}",
            embedding={"views": "2x3", "pooling": pooling, "format": format},
            data={"max_bad_fraction": 0.5},
            run=run,
        )

    def embed(self, world: int, configs: list[EmbedConfig]) -> None:
        with contextlib.ExitStack() as held:
            assignments = {}
            for config in configs:
                guard = held.enter_context(acquire(run_folder(config), lease_s=600)).guard
                assignments[config.run.name] = Assignment(config, derive_checked(config), "", "", guard)
            run_ranks(world, _embed_all, assignments)

    def run(self, name: str, pooling: str, format: str) -> Storage:
        return run_folder(self.config(name, pooling, format))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """All embeddings in three sets of processes, since starting one costs seconds."""
    place = Place(tmp_path_factory.mktemp("embedding"))
    make_data(place.folder / "data")
    make_data(place.folder / "damaged")
    damage(place.folder / "damaged", "val", 3)
    save_encoder(place.folder / "encoder")
    damaged = [place.config("damaged", "mean", format, "damaged") for format in FILES]
    place.embed(1, [*(place.config("alone", *kind) for kind in KINDS), *damaged])
    seldom = place.config("seldom", "tokens", "parquet", checkpoint_every_steps=1000)
    place.embed(2, [*(place.config(name, *kind) for name in ("two", "lost") for kind in KINDS), seldom])
    for kind in KINDS:
        run = place.run("lost", *kind)
        assert not run.exists(RESULT)
        assert complete_checkpoints(run) == ["step-00000004"], "two steps of two workers"
    place.embed(3, [place.config(name, *kind) for name in ("three", "lost") for kind in KINDS])
    return place


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_files_are_the_same_to_the_bit_for_any_number_of_workers_and_over_their_loss(
    place: Place, kind: tuple[str, str]
) -> None:
    """16 videos: three workers do not divide them."""
    alone = place.run("alone", *kind)
    for name in ("two", "three", "lost"):
        run = place.run(name, *kind)
        for file in (*FILES[kind[1]], RESULT):
            assert run.read_bytes(file) == alone.read_bytes(file), (name, file)


def test_a_save_is_made_before_many_rows_wait(place: Place) -> None:
    """Whatever the number of steps between saves: those of all workers count."""
    run, alone = (place.run(name, "tokens", "parquet") for name in ("seldom", "alone"))
    assert len(complete_checkpoints(run)) == 2, "one on the way and the last"
    assert run.read_bytes("features.parquet") == alone.read_bytes("features.parquet")


def clips_of(config: EmbedConfig) -> torch.Tensor:
    """All views in the order of their places."""
    samples = ClipSamples(
        [Embedding(config).source()],
        clip_frames=MODEL.frames,
        image_size=MODEL.image_size,
        draw=label_of,
        seed=0,
        shuffle=False,
        options=LoaderOptions(repeats=VIEWS),
    )
    return samples[list(range(VIDEOS * VIEWS))].clips


@pytest.fixture(scope="module")
def expected(place: Place) -> np.ndarray:
    """Tokens [N, V, L, D] of the plain encoder: pixels normalised by ImageNet's figures, then cut into cubes."""
    pixels = clips_of(place.config("alone", "mean", "parquet")).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(3, 1, 1, 1)) / deviation.view(3, 1, 1, 1)
    cubes = pixels.unfold(2, 2, 2).unfold(3, 16, 16).unfold(4, 16, 16)  # [B, C, t, h, w, p_t, p_h, p_w]
    cubes_blp = cubes.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4).flatten(1, 3)
    encoder = make_encoder().eval()
    with torch.no_grad():
        tokens = torch.cat([encoder(cubes_of_video) for cubes_of_video in cubes_blp.split(VIEWS)])
    return tokens.numpy().reshape(VIDEOS, VIEWS, TOKENS, WIDTH)


def table_of(run: Storage) -> pa.Table:
    return pq.read_table(pa.BufferReader(run.read_bytes("features.parquet")))


def test_a_row_of_the_table_is_what_the_plain_encoder_makes_of_the_view(
    place: Place, expected: np.ndarray
) -> None:
    for pooling, made in (("mean", expected.mean(2)), ("tokens", expected)):
        table = table_of(place.run("alone", pooling, "parquet"))
        index = pq.read_table(place.folder / "data" / "index-val.parquet")
        assert table.column_names == ["key", "view", "label", "label_name", "features"]
        for name in ("key", "label", "label_name"):
            assert table[name].to_pylist() == [
                value for value in index[name].to_pylist() for _ in range(VIEWS)
            ]
        assert table["view"].to_pylist() == list(range(VIEWS)) * VIDEOS
        features = table["features"].combine_chunks()
        assert features.type == pa.list_(pa.float32(), made[0, 0].size)
        np.testing.assert_allclose(
            features.flatten().to_numpy().reshape(made.shape), made, atol=1e-6, rtol=1e-6
        )


def test_the_tensor_holds_the_same_and_its_keys_stand_beside_it(place: Place, expected: np.ndarray) -> None:
    for pooling, made in (("mean", expected.mean(2)), ("tokens", expected)):
        run = place.run("alone", pooling, "safetensors")
        features = load(run.read_bytes("features.safetensors"))["features"]
        assert features.shape == made.shape
        np.testing.assert_allclose(features, made, atol=1e-6, rtol=1e-6)
        beside = json.loads(run.read_bytes("features.json"))
        index = pq.read_table(place.folder / "data" / "index-val.parquet")
        for name, column in (("keys", "key"), ("labels", "label"), ("label_names", "label_name")):
            assert beside[name] == index[column].to_pylist()
        assert beside["about"]["pooling"] == pooling


def test_rows_are_written_in_groups_of_fixed_size(place: Place) -> None:
    """Whatever the parts were: here of seven means, or one view of whole tokens."""
    for pooling, rows in (("mean", 7), ("tokens", 1)):
        file = pq.ParquetFile(
            pa.BufferReader(place.run("lost", pooling, "parquet").read_bytes("features.parquet"))
        )
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert groups[:-1] == [rows] * (len(groups) - 1)
        assert sum(groups) == VIDEOS * VIEWS


def test_videos_that_cannot_be_read_have_no_rows_and_no_numbers(place: Place) -> None:
    whole = table_of(place.run("alone", "mean", "parquet"))
    table = table_of(place.run("damaged", "mean", "parquet"))
    assert table.equals(whole.slice(3 * VIEWS))
    tensor = load(place.run("damaged", "mean", "safetensors").read_bytes("features.safetensors"))["features"]
    assert np.isnan(tensor[:3]).all()
    assert not np.isnan(tensor[3:]).any()
    result = json.loads(place.run("damaged", "mean", "parquet").read_bytes(RESULT))
    found = [result[name] for name in ("videos", "views", "bad_samples")]
    assert found == [VIDEOS - 3, (VIDEOS - 3) * VIEWS, 3 * VIEWS]


@pytest.mark.parametrize("name", ["alone", "damaged"])
def test_a_video_is_read_back_as_the_mean_of_its_views_and_tokens_from_every_kind_of_file(
    place: Place, expected: np.ndarray, name: str
) -> None:
    made = expected.mean((1, 2))
    for pooling, format in KINDS:
        if name == "damaged" and pooling == "tokens":
            continue
        found = read_features(place.run(name, pooling, format).uri)
        first = 3 if name == "damaged" else 0
        assert len(found.keys) == VIDEOS - first
        np.testing.assert_allclose(found.values_nd, made[first:], atol=1e-6, rtol=1e-6)
        assert found.labels == [label for label in found.labels if label is not None]


def test_a_finished_embedding_says_so_at_once_and_another_one_is_refused_in_its_folder(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config("alone", "mean", "parquet")
    run = run_folder(config)
    close_run(config, open_run(config, {}, run), "FINISHED")

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run starts nothing")

    for name in ("launch", "acquire", "check_driver"):
        monkeypatch.setattr(command, name, refuse)
    given = {"--data": place.folder / "data", "--data.stride": 2, "--views": "2x3"}
    given |= {
        "--run.name": config.run.name,
        "--run.storage_path": place.folder / "runs",
        "--cluster.device": "cpu",
    }
    arguments = [str(place.folder / "encoder"), *(str(word) for pair in given.items() for word in pair)]
    main(arguments)
    output = capsys.readouterr().out
    assert f"run {config.run.name} is finished: step 16 was its last, nothing is left to embed\n" in output
    assert f"features    {run.uri}/features.parquet\n" in output
    assert f"{VIDEOS * VIEWS} views of {VIDEOS} videos, {WIDTH} numbers each\n" in output
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--pooling", "tokens"])
    assert ended.value.code == 2
    assert "embedding.pooling: 'mean' in the checkpoint, 'tokens' now" in capsys.readouterr().err
