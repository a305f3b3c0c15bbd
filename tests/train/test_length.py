"""The run's length and rate by places, and what a validation or a step says that could read nothing.

Runs of the loop without Ray, all in one process: starting one costs seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.storage import Storage
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.compose import train
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.schedule import learning_rate, plan_of
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.run.stop import RESULT, Interruption, RunStoppedError
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.audit import applied_places
from tests.data.conftest import encode, write_dataset
from tests.train.distributed import run_ranks
from tests.train.keyed import DECODER, MODEL

SAMPLES, PLACES = 6, 48  # of the data set; of each run below, whatever its batch
EPOCHS = PLACES / SAMPLES


@dataclass(frozen=True)
class Case:
    """A run that is told to leave after each of `leave_after`, and goes on with the next of `batches`."""

    name: str
    batches: tuple[int, ...]
    leave_after: tuple[int, ...] = ()
    train: dict[str, Any] = field(default_factory=lambda: {"epochs": EPOCHS})
    data: dict[str, Any] = field(default_factory=dict)


SHORT = {"steps": 2}
CASES = [
    Case("plain", (4,)),
    Case("doubled", (4, 8), (6,)),
    Case("halved", (4, 2), (6,)),
    Case("uneven", (4, 5), (6,)),
    Case("twice, by steps", (4, 8, 3), (6, 7), {"steps": PLACES // 4}),
    Case("some bad", (4,), (), SHORT, {"val_split": "some", "max_bad_fraction": 0.5}),
    Case("all bad", (4,), (), SHORT, {"val_split": "none", "max_bad_fraction": 1.0}),
    Case("too many bad", (4,), (), SHORT, {"val_split": "some", "max_bad_fraction": 0.2}),
    Case("an empty step", (1,), (), {"steps": SAMPLES}, {"split": "some", "max_bad_fraction": 1.0}),
]


def _config(folder: Path, case: Case, batch: int) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {
                **{
                    "name": case.name.replace(" ", "-").replace(",", ""),
                    "storage_path": str(folder / "runs"),
                },
                **{"audit": True, "checkpoint_every_steps": 1000, "allow_change": ["train.global_batch"]},
            },
            "data": {
                **{"path": str(folder / "data"), "val_split": None, "workers": 0, "stride": 1},
                **case.data,
            },
            "model": MODEL.model_dump(),
            "decoder": DECODER.model_dump(),
            "optim": {"warmup_epochs": 3 if "epochs" in case.train else 0},
            "train": {"global_batch": batch, "micro_batch": 2, "log_every_steps": 1, **case.train},
            "validation": {"every_steps": 1},
            "cluster": {"workers": 1, "device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits `train` without, `some` with two and `none` with only bad samples."""
    folder = tmp_path_factory.mktemp("length")
    frames = [20, 24, 28, 32, 36, 40]
    videos = [encode(folder / f"{i}.mp4", number, i) for i, number in enumerate(frames)]
    for split, bad in (("train", ()), ("some", (1, 4)), ("none", range(SAMPLES))):
        damaged = [bytes(len(video)) if i in bad else video for i, video in enumerate(videos)]
        write_dataset(folder / "data", damaged, frames, split)
    return folder


class Told:
    """What a tracker is told."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.files: list[str] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.points.setdefault(step, {}).update(metrics)

    def log_bytes(self, name: str, data: bytes) -> None:
        self.files.append(name)

    def tag(self, key: str, value: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def leave(self) -> None:
        pass


class _LeavesAfter(Watch):
    def __init__(self, guard: Guard, control: dist.ProcessGroup, step: int | None) -> None:
        super().__init__(guard, control, lambda: None)
        self._step = step

    def due(self, *, saves_fail: bool = False) -> bool:
        return True

    def look(self, step: int) -> Interruption | None:
        return Interruption("told to", step) if step == self._step else None


@dataclass
class Found:
    said: str
    points: dict[int, dict[str, float]]
    files: list[str]
    rates: list[float]
    steps: list[int]  # at the end of each start
    positions: list[int]
    stopped: str | None


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Found]:
    with contextlib.ExitStack() as leases:
        tasks = []
        for case in CASES:
            configs = [_config(folder, case, batch) for batch in case.batches]
            guard = leases.enter_context(acquire(run_folder(configs[0]), lease_s=600)).guard
            tasks.append([Assignment(config, derive_checked(config), "", "", guard) for config in configs])
        return run_ranks(1, _train_cases, tasks)[0]


def _train_cases(tasks: list[list[Assignment]]) -> dict[str, Found]:
    with mock.patch.dict(ENCODER_SIZES, {MODEL.encoder: EncoderSize(width=64, depth=1, heads=1)}):
        return {case.name: _train(case, each) for case, each in zip(CASES, tasks, strict=True)}


def _train(case: Case, tasks: list[Assignment]) -> Found:
    told, said, rates = Told(), io.StringIO(), list[float]()
    steps, positions, stopped = [], [], None
    with contextlib.redirect_stdout(said), _noted(rates):
        for number, task in enumerate(tasks):
            control = dist.new_group(backend="gloo")
            leave_after = case.leave_after[number] if number < len(case.leave_after) else None
            watch = _LeavesAfter(task.lease, control, leave_after)
            try:
                train(task, torch.device("cpu"), control, watch, told)
            except RunStoppedError as error:
                stopped = str(error)
            newest = _newest(run_folder(task.config))
            steps.append(newest.state["step"])
            positions.append(newest.state["position"])
    return Found(said.getvalue(), told.points, told.files, rates, steps, positions, stopped)


@contextlib.contextmanager
def _noted(rates: list[float]) -> Iterator[None]:
    original = Engine.apply

    def apply(self: Engine, learning_rate: float) -> Any:
        rates.append(learning_rate)
        return original(self, learning_rate)

    with mock.patch.object(Engine, "apply", apply):
        yield


def _newest(run: Storage) -> Checkpoint:
    return Checkpoint(run, complete_checkpoints(run)[-1])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("plain", [12]),
        ("doubled", [6, 6 + 3]),
        ("halved", [6, 6 + 12]),
        ("uneven", [6, 6 + 5]),
        ("twice, by steps", [6, 7, 7 + 6]),
    ],
)
def test_a_run_ends_after_the_places_that_it_was_planned_for_whatever_its_batch(
    found: dict[str, Found], folder: Path, name: str, steps: list[int]
) -> None:
    assert found[name].positions[-1] == PLACES, f"{found[name].positions[-1] / PLACES:.0%} of the plan"
    assert found[name].steps == steps
    assert f"step {steps[-1]}/{steps[-1]}  loss" in found[name].said
    run = Storage(str(folder / "runs" / name.replace(" ", "-").replace(",", "")))
    applied = applied_places(run)
    assert sorted(applied) == list(range(1, steps[-1] + 1))
    assert [place for step in applied.values() for place in step] == list(range(PLACES)), "each place once"
    assert json.loads(run.read_bytes(RESULT))["step"] == steps[-1]


def test_the_rate_is_the_same_share_of_its_peak_at_a_place_whatever_the_batch(
    found: dict[str, Found],
) -> None:
    plain = found["plain"].rates
    assert found["doubled"].rates[:6] == plain[:6]
    assert found["doubled"].rates[6:] == pytest.approx([2 * rate for rate in plain[6::2]], rel=1e-12)
    assert found["halved"].rates[6::2] == pytest.approx([rate / 2 for rate in plain[6:]], rel=1e-12)


@pytest.mark.parametrize("batch", [3, 7, 48, 256, 2048])
def test_a_run_whose_batch_never_changes_has_the_rates_of_its_steps_to_the_bit(
    folder: Path, batch: int
) -> None:
    train = {"epochs": 100_000}
    config = _config(folder, Case("rates", (batch,), train=train, data={}), batch)
    derived = derive_checked(config)
    assert derived.total_steps is not None
    plan = plan_of(config, derived, None)
    steps = [*range(100), *range(100, derived.total_steps, 97), derived.total_steps - 1]
    assert [plan.rate(step * batch) for step in steps] == [
        learning_rate(
            step,
            total_steps=derived.total_steps,
            warmup_steps=derived.warmup_steps,
            peak=derived.peak_lr,
            final=derived.min_lr,
        )
        for step in steps
    ]
    assert plan.total_places == derived.total_steps * batch
    assert plan.steps_left(0) == derived.total_steps


def test_other_epochs_make_another_plan_and_an_older_checkpoint_tells_its_own(folder: Path) -> None:
    config = _config(folder, CASES[0], 4)
    derived = derive_checked(config)
    older = {
        "config": {"train": {"steps": None, "epochs": EPOCHS, "global_batch": 8}},
        "derived": {"samples": SAMPLES, "total_steps": 6, "global_batch": 8},
    }
    assert plan_of(config, derived, older).total_places == PLACES
    assert plan_of(config, derived, older | {"total_places": 47}).total_places == 47
    longer = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2 * EPOCHS})})
    assert plan_of(longer, derive_checked(longer), older).total_places == 2 * PLACES


def _bad(folder: Path, name: str) -> list[tuple[str, str, int]]:
    rows = pq.read_table(folder / "runs" / name / "bad_samples.parquet").to_pylist()
    return [(row["split"], row["key"], row["places"]) for row in rows]


def test_bad_validation_samples_are_counted_named_and_left_out(found: dict[str, Found], folder: Path) -> None:
    point = found["some bad"].points[2]
    assert point["bad_validation_samples"] == 2
    assert point["loss/val"] > 0.1
    assert _bad(folder, "some-bad") == [("some", "video001", 2), ("some", "video004", 2)], "two validations"
    assert found["some bad"].said.count("bad validation sample: some-000000.tar video001: ") == 1
    assert found["some bad"].files.count("bad_samples.parquet") == 2
    listed = _newest(Storage(str(folder / "runs" / "some-bad"))).state
    assert [entry["key"] for entry in listed["bad_validation_samples"]] == ["video001", "video004"]
    assert listed["bad_samples"] == []


def test_a_validation_that_reads_nothing_has_no_loss_and_no_picture(
    found: dict[str, Found], folder: Path
) -> None:
    point = found["all bad"].points[2]
    assert point["bad_validation_samples"] == SAMPLES
    assert not {"loss/val", "loss/constant_predictor", "loss/val_other_context"} & point.keys()
    assert "loss/val" not in json.loads((folder / "runs/all-bad" / RESULT).read_bytes())
    assert "step 2  no loss/val: no clip of the validation could be used" in found["all bad"].said
    assert not any(name.startswith("pictures/") for name in found["all bad"].files)


def test_past_the_allowed_share_the_validation_stops_the_run_which_keeps_what_it_learned(
    found: dict[str, Found], folder: Path
) -> None:
    stopped = found["too many bad"].stopped
    assert stopped is not None
    assert stopped.startswith("2 bad samples of 6 in the validation are more than data.max_bad_fraction 0.2")
    assert "some-000001.tar video004 of split some" in stopped
    assert found["too many bad"].steps == [1]
    assert len(_bad(folder, "too-many-bad")) == 2


def test_a_step_without_a_usable_sample_has_no_loss(found: dict[str, Found]) -> None:
    points = found["an empty step"].points
    empty = [step for step in points if "loss/train" not in points[step]]
    assert len(empty) == 2
    assert not any("gradient_norm" in points[step] for step in empty)
    assert all(points[step]["loss/train"] > 0.01 for step in points if step not in empty)
    assert points[SAMPLES]["bad_samples"] == 2
