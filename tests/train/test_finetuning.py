"""Fine-tuning over interruptions and layouts, and the evaluation of what it made: the loops without Ray."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from arvideo_dist.config.commands import EvaluateConfig, FinetuneConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.evaluate import of_source
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.train import sequence
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.compose import train
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RESULT, RunStoppedError, StoreAwayError
from arvideo_dist.train.trained import read_weights
from tests.train.distributed import run_ranks
from tests.train.runs import damage, make_data
from tests.train.test_length import Told, _LeavesAfter

STEPS, CLASSES, VIDEOS, VIEWS = 6, 12, 16, 6
SIZE = EncoderSize(width=64, depth=2, heads=2)


def finetune_config(folder: Path, name: str, **sections: dict[str, Any]) -> FinetuneConfig:
    base: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "audit": True, "keep_last": 1},
        "data": {"path": str(folder / "data"), "stride": 2, "workers": 0, "repeats": 2},
        "model": {
            "encoder": "demo",
            "frames": 4,
            "image_size": 32,
            "tubelet": [2, 16, 16],
            "classes": CLASSES,
        },
        "optim": {"warmup_epochs": 0, "base_lr": 0.1},
        "train": {"global_batch": 8, "micro_batch": 4, "steps": STEPS, "log_every_steps": 1},
        "validation": {"every_steps": 2},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return FinetuneConfig.model_validate(merged)


def assigned(config: Any) -> Iterator[Assignment]:
    with acquire(run_folder(config), lease_s=600) as lease:
        yield Assignment(config, derive_checked(config), "", "", lease.guard)


def _train(assignment: Assignment, leave_after: int | None) -> dict[int, dict[str, float]]:
    told, control = Told(), dist.new_group(backend="gloo")
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}), contextlib.redirect_stdout(io.StringIO()):
        watch = _LeavesAfter(assignment.lease, control, leave_after)
        train(assignment, torch.device("cpu"), control, watch, told if dist.get_rank() == 0 else None)
    return told.points


def trained(
    config: FinetuneConfig, world: int, leave_after: int | None = None
) -> dict[int, dict[str, float]]:
    """What is logged by a start of this run."""
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
        for assignment in assigned(config):
            return run_ranks(world, _train, assignment, leave_after)[0]
    raise AssertionError


LOGGED = ("loss/train", "gradient_norm", "learning_rate", "loss/val", "accuracy/top1")


def logged(points: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {n: v for n, v in metrics.items() if n in LOGGED} for step, metrics in points.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, dict[str, float]]:
    return logged(trained(finetune_config(folder, "whole"), 2))


def test_an_interrupted_fine_tuning_goes_on_to_the_bit(folder: Path, whole: dict) -> None:
    config = finetune_config(folder, "interrupted")
    points = trained(config, 2, leave_after=3) | trained(config, 2)
    assert logged(points) == whole
    assert sorted(whole) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("first", "then"), [((1, 0), (2, 3)), ((3, 1), (1, 2))])
def test_stage_and_world_size_may_change_on_the_way(
    folder: Path, whole: dict, first: tuple[int, int], then: tuple[int, int]
) -> None:
    points: dict[int, dict[str, float]] = {}
    for (world, stage), leave_after in ((first, 3), (then, None)):
        config = finetune_config(folder, f"grid-{first}-{then}".translate(str.maketrans("(), ", "----")).strip("-"),
                                 train={"zero_stage": stage})  # fmt: skip
        points |= trained(config, world, leave_after)
    for step, metrics in logged(points).items():
        for name, value in metrics.items():
            assert value == pytest.approx(whole[step][name], rel=2e-4, abs=1e-6), (step, name)


def test_the_best_checkpoint_is_kept_beside_the_last(folder: Path, whole: dict) -> None:
    run = Storage(str(folder / "runs" / "whole"))
    accuracies = {
        step: metrics["accuracy/top1"] for step, metrics in whole.items() if "accuracy/top1" in metrics
    }
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert complete_checkpoints(run) == sorted({f"step-{best:08d}", f"step-{STEPS:08d}"})
    result = json.loads(run.read_bytes(RESULT))
    assert (result["best_step"], result["best_value"]) == (best, accuracies[best])


# The evaluation of that run.


class _Crash(Exception):  # noqa: N818
    """A fault of the machine."""


def _score(assignment: Assignment, crash_at: int | None) -> None:
    control = dist.new_group(backend="gloo")
    taken = 0
    original = sequence.SequenceRun._computed

    def scores(self: sequence.SequenceRun, host: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == crash_at:
            raise _Crash
        return original(self, host)

    with (
        mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}),
        mock.patch.object(sequence.SequenceRun, "_computed", scores),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(_Crash),
    ):
        watch = _LeavesAfter(assignment.lease, control, None)
        sequence.run_sequence(
            assignment, torch.device("cpu"), control, watch, Told() if dist.get_rank() == 0 else None
        )


def evaluate_config(folder: Path, name: str, **sections: dict[str, Any]) -> EvaluateConfig:
    base = {
        "run": {"name": name, "checkpoint_every_steps": 2},
        "data": {"workers": 0},
        "evaluation": {"views": "2x3"},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    source = mock.Mock(source=str(folder / "runs" / "whole"))
    return of_source(EvaluateConfig.model_validate(merged), source)


def evaluated(config: EvaluateConfig, *starts: tuple[int, int | None]) -> Storage:
    """The folder of an evaluation of several starts: workers, and the batch at which all of them are lost."""
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
        for world, crash_at in starts:
            for assignment in assigned(config):
                run_ranks(world, _score, assignment, crash_at)
    return run_folder(config)


@pytest.fixture(scope="module")
def alone(folder: Path, whole: dict) -> Storage:
    return evaluated(evaluate_config(folder, "alone"), (1, None))


@pytest.mark.parametrize(
    ("name", "starts"),
    [("two", [(2, None)]), ("three", [(3, None)]), ("lost", [(2, 4), (3, None)])],
)
def test_scores_are_the_same_to_the_bit_for_any_number_of_workers_and_over_their_loss(
    folder: Path, alone: Storage, name: str, starts: list[tuple[int, int | None]]
) -> None:
    """16 videos: three workers do not divide them."""
    config = evaluate_config(folder, name)
    if len(starts) > 1:
        evaluated(config, starts[0])
        assert not run_folder(config).exists(RESULT)
        assert complete_checkpoints(run_folder(config)) == ["step-00000004"], "two steps of two workers"
    run = evaluated(config, starts[-1])
    assert run.read_bytes("scores.parquet") == alone.read_bytes("scores.parquet")
    of_both = [json.loads(each.read_bytes(RESULT)) for each in (run, alone)]
    assert of_both[0] == of_both[1]


def read_scores(run: Storage) -> pa.Table:
    return pq.read_table(pa.BufferReader(run.read_bytes("scores.parquet")))


def test_every_view_of_every_video_is_scored_once_and_the_accuracy_is_scikit_learns(alone: Storage) -> None:
    table = read_scores(alone)
    pairs = list(zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True))
    assert len(pairs) == len(set(pairs)) == VIDEOS * VIEWS
    scores = np.array(table["scores"].to_pylist(), dtype=np.float64).reshape(VIDEOS, VIEWS, CLASSES)
    np.testing.assert_allclose(scores.sum(axis=2), 1, rtol=1e-5)
    labels, mean = table["label"].to_numpy()[::VIEWS], scores.mean(axis=1)
    result, every = json.loads(alone.read_bytes(RESULT)), np.arange(CLASSES)
    assert result["accuracy/top1"] == pytest.approx(top_k_accuracy_score(labels, mean, k=1, labels=every))
    assert result["accuracy/top5"] == pytest.approx(top_k_accuracy_score(labels, mean, k=5, labels=every))
    assert result["accuracy/mean_class"] == pytest.approx(balanced_accuracy_score(labels, mean.argmax(1)))
    assert (result["videos"], result["views"], result["bad_samples"]) == (VIDEOS, VIDEOS * VIEWS, 0)


def test_the_middle_view_alone_is_the_validation_of_the_run(
    folder: Path, whole: dict, alone: Storage
) -> None:
    run = evaluated(evaluate_config(folder, "middle", evaluation={"views": "1x1"}), (1, None))
    result = json.loads(run.read_bytes(RESULT))
    assert result["accuracy/top1"] == pytest.approx(whole[STEPS]["accuracy/top1"], abs=1 / VIDEOS + 1e-9)


def test_what_a_run_does_not_say_is_not_needed_and_its_results_lie_beside_its_checkpoints(
    folder: Path,
) -> None:
    config = evaluate_config(folder, "any")
    assert config.data.path == str(folder / "data")
    assert (config.data.split, config.data.stride) == ("val", 2)
    assert config.run.storage_path == str(folder / "runs" / "whole" / "evaluations")
    assert config.model.init_from == f"{folder}/runs/whole/{FOLDER}/step-{STEPS:08d}"
    given = EvaluateConfig.model_validate({"tracking": {"uri": "http://there"}})
    named = of_source(given, mock.Mock(source=str(folder / "runs" / "whole")))
    assert named.run.name == f"step-{STEPS:08d}-val-5x3"


def test_what_holds_no_classifier_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no classifier"):
        of_source(EvaluateConfig(), mock.Mock(source=str(folder / "data")))


def test_weights_of_another_size_are_refused_by_name(folder: Path, whole: dict) -> None:
    source = str(folder / "runs" / "whole")
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
        weights = read_weights(source)
    task = task_of(
        finetune_config(folder, "other", model={"init_from": source})
    )  # of the real size of `demo`
    module = task.build()
    with pytest.raises(ValueError, match=r"model\.init_from .*whole: it holds another encoder"):
        task.start_from(module, lambda source: weights)


@pytest.mark.parametrize("videos", [3, VIDEOS])
def test_videos_that_cannot_be_read_are_counted_and_named_and_have_no_part_in_the_accuracy(
    folder: Path, whole: dict, alone: Storage, tmp_path: Path, videos: int
) -> None:
    make_data(tmp_path / "data")
    damage(tmp_path / "data", "val", videos)
    data = {"path": str(tmp_path / "data"), "split": "val", "stride": 2, "max_bad_fraction": 1.0}
    run = evaluated(evaluate_config(folder, f"bad-{videos}", data={"workers": 0, **data}), (2, None))
    result = json.loads(run.read_bytes(RESULT))
    assert (result["videos"], result["bad_samples"]) == (VIDEOS - videos, videos * VIEWS)
    listed = pq.read_table(pa.BufferReader(run.read_bytes("bad_samples.parquet"))).to_pylist()
    assert [row["places"] for row in listed] == [VIEWS] * videos
    if videos == VIDEOS:
        assert "accuracy/top1" not in result
        assert read_scores(run).num_rows == 0
    else:
        assert read_scores(run).equals(read_scores(alone).slice(videos * VIEWS))


def _score_without_its_saves(assignment: Assignment) -> str:
    try:
        _score(assignment, None)
    except StoreAwayError as error:
        return str(error)
    return ""


def test_an_evaluation_whose_saves_are_away_is_waited_for_and_not_stopped(folder: Path, whole: dict) -> None:
    with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
        for assignment in assigned(evaluate_config(folder, "away")):
            (said,) = run_ranks(1, _score_without_its_saves, replace(assignment, seen=7))
    assert "step-00000007 was seen there" in said


def test_what_the_classifier_says_of_itself_cannot_be_given(folder: Path) -> None:
    given = EvaluateConfig.model_validate({"model": {"frames": 8}})
    with pytest.raises(ValueError, match=r"model\.frames: the classifier says its own"):
        of_source(given, mock.Mock(source=str(folder / "runs" / "whole")))


def _what_stops(assignments: list[Assignment], sources: list[str]) -> list[str]:
    """The error that ends this rank, whose node has the weights at its own of `sources`."""
    control, said = dist.new_group(backend="gloo"), []
    for assignment in assignments:
        config = assignment.config
        model = config.model.model_copy(update={"init_from": sources[dist.get_rank()]})
        own = replace(assignment, config=config.model_copy(update={"model": model}))
        watch = _LeavesAfter(assignment.lease, control, None)
        start = sequence.run_sequence if isinstance(config, EvaluateConfig) else train
        with mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
            try:
                start(own, torch.device("cpu"), control, watch, None)
            except RunStoppedError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("absent_on", [[1], [0, 1]])
def test_weights_that_a_node_does_not_have_stop_the_run_on_all_ranks(
    folder: Path, whole: dict, absent_on: list[int]
) -> None:
    """The driver has looked at them on its own node, and a restart would meet the same."""
    absent, there = str(folder / "absent.pth"), str(folder / "runs" / "whole")
    sources = [absent if rank in absent_on else there for rank in range(2)]
    name = f"absent-{len(absent_on)}"
    with contextlib.ExitStack() as held, mock.patch.dict(ENCODER_SIZES, {"demo": SIZE}):
        assignments = []
        for config in (finetune_config(folder, name), evaluate_config(folder, name)):
            guard = held.enter_context(acquire(run_folder(config), lease_s=600)).guard
            assignments.append(Assignment(config, derive_checked(config), "", "", guard))
        of_ranks = run_ranks(2, _what_stops, assignments, sources)
    assert of_ranks[0] == of_ranks[1]
    assert len(of_ranks[0]) == 2, "fine-tuning and evaluation"
    for said in of_ranks[0]:
        assert said.startswith("rank 1: ") == (len(absent_on) == 1)
        assert "absent.pth" in said
