"""Features measured while pretraining: the same at any world size and over an interruption."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.compose import train
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RunStoppedError
from tests.data.conftest import write_dataset
from tests.train.distributed import run_ranks
from tests.train.runs import make_data
from tests.train.test_length import Told, _LeavesAfter

STEPS = 4
SIZE = EncoderSize(width=64, depth=1, heads=1)
NAMES = ("knn_top1", "ridge_top1", "effective_rank", "deviation")


def config_of(folder: Path, name: str, **sections: dict[str, Any]) -> PretrainConfig:
    base: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs")},
        "data": {"path": str(folder / "data"), "stride": 2, "workers": 0},
        "model": {
            **{"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16]},
            **{"cluster": [1, 1, 1], "mask_ratio": 0, "target_norm": "none"},
        },
        "decoder": {"width": 64, "depth": 1},
        "optim": {"warmup_epochs": 0, "base_lr": 0.1},
        "train": {"global_batch": 6, "micro_batch": 2, "steps": STEPS},
        "measure": {"every_steps": 2, "neighbours": 3},
        "validation": {"every_steps": 100, "max_clips": 2},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return PretrainConfig.model_validate(merged)


def _train(assignment: Assignment, leave_after: int | None) -> tuple[Any, str, str | None]:
    told, control, said = Told(), dist.new_group(backend="gloo"), io.StringIO()
    stopped = None
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}), contextlib.redirect_stdout(said):
        watch = _LeavesAfter(assignment.lease, control, leave_after)
        try:
            train(assignment, torch.device("cpu"), control, watch, told if dist.get_rank() == 0 else None)
        except RunStoppedError as error:
            stopped = str(error)
    return told.points, said.getvalue(), stopped


def measured(
    config: PretrainConfig, world: int, leave_after: int | None = None
) -> tuple[dict[int, dict[str, float]], str, str | None]:
    """What a start of this run measures, what it says, and what stops it."""
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}), acquire(run_folder(config), lease_s=600) as lease:
        assignment = Assignment(config, derive_checked(config), "", "", lease.guard)
        points, said, stopped = run_ranks(world, _train, assignment, leave_after)[0]
    found = {s: {n: v for n, v in p.items() if n.startswith("features/")} for s, p in points.items()}
    return {step: metrics for step, metrics in found.items() if metrics}, said, stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[int, dict[str, float]], str]:
    return measured(config_of(folder, "whole"), 2)[:2]


def test_every_measure_stands_beside_the_untrained_encoders_which_stays(whole: Any) -> None:
    points, said = whole
    assert sorted(points) == [2, 4]
    for metrics in points.values():
        assert sorted(metrics) == sorted(
            f"features/{n}{which}" for n in NAMES for which in ("", "_untrained")
        )
    for name in NAMES:
        assert points[2][f"features/{name}_untrained"] == points[4][f"features/{name}_untrained"]
    assert points[2]["features/deviation"] != points[4]["features/deviation"]
    assert "features: knn top1 " in said
    assert "% of the time)" in said


def test_the_untrained_encoder_is_the_one_that_training_begins_from_and_ranks_and_stages_change_nothing(
    folder: Path,
) -> None:
    """At a rate that moves no weight, measured by one, two and three ranks, of 48 and 16 videos in batches of 5."""
    found = {}
    for world, stage in ((1, 0), (2, 2), (3, 3)):
        name = f"still-{world}"
        still = {"optim": {"base_lr": 1e-30, "base_min_lr": 1e-30}}
        batches = {"train": {"micro_batch": 5, "steps": 1, "zero_stage": stage}}
        found[world] = measured(config_of(folder, name, **still, **batches), world)[0][1]
    assert found[1] == found[2] == found[3]
    for name in NAMES:
        assert found[1][f"features/{name}"] == found[1][f"features/{name}_untrained"]


def test_a_run_that_goes_on_measures_the_same(folder: Path, whole: Any) -> None:
    config = config_of(folder, "interrupted")
    first, _, _ = measured(config, 2, leave_after=3)
    then, _, _ = measured(config, 2)
    assert first | then == whole[0]


def test_videos_that_cannot_be_read_are_named_and_stop_the_run_past_the_limit(folder: Path) -> None:
    write_dataset(folder / "bad", [bytes(1000)] * 4, [20] * 4, "train")
    write_dataset(folder / "bad", [bytes(1000)] * 4, [20] * 4, "val")
    broken = {"measure": {"path": str(folder / "bad"), "every_steps": 1}}
    _, said, stopped = measured(config_of(folder, "stopped", **broken), 1)
    assert stopped is not None
    assert "set measure.every_steps to null" in stopped
    assert said.count("bad validation sample: ") == 4
    lenient = {**broken, "data": {"max_bad_fraction": 1.0}}
    points, said, stopped = measured(config_of(folder, "lenient", **lenient), 1)
    assert (points, stopped) == ({}, None)
    assert "no video could be used" in said


def test_a_split_without_labels_is_refused_before_anything_starts(folder: Path) -> None:
    write_dataset(folder / "plain", [bytes(10)], [20], "train")
    write_dataset(folder / "plain", [bytes(10)], [20], "val")
    config = config_of(folder, "unlabelled", measure={"path": str(folder / "plain")})
    with pytest.raises(ValueError, match=r"has no labels, which measure\.every_steps wants"):
        task_of(config).settled()


def test_what_is_not_measured_costs_nothing(folder: Path) -> None:
    config = config_of(folder, "off", measure={"every_steps": None})
    with mock.patch("arvideo_dist.train.compose.FeatureMeasures") as made:
        assert measured(config, 1)[0] == {}
    made.assert_not_called()
