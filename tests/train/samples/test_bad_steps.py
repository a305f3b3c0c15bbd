"""Steps that are not finite: as if they had not been, listed with their samples, and ended by a way back."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.config.optim import OptimConfig, TrainConfig
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.storage import Storage
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.checkpoint.retention import weights_step
from arvideo_dist.train.checkpoint.seen import CHECKPOINT_TAG
from arvideo_dist.train.compose import train
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.run.stop import Interruption, RunStoppedError
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.audit import applied_places
from arvideo_dist.train.samples.bad_steps import ROLLBACKS_TAG, BadSteps
from arvideo_dist.train.tracking import runs as tracking
from arvideo_dist.train.tracking.deferred import DeferredWrites
from arvideo_dist.train.tracking.outbox import QueuedTracker
from tests.conftest import ROOT
from tests.data.conftest import encode, write_dataset
from tests.train.distributed import make_saver, run_ranks
from tests.train.engines import engine_of
from tests.train.keyed import DECODER, GLOBAL_BATCH, MICRO_BATCH, MODEL, new_model, train_steps
from tests.train.poison import poisoned
from tests.train.runs import PretrainProcess, history, run_arguments, runs_folder


@contextlib.contextmanager
def _suppressed(engine_steps: Collection[int]) -> Iterator[None]:
    """The optimiser's update is left out at these calls of `Engine.apply`, of which the first is number 1."""
    original, count = Engine.apply, 0

    def apply(self: Engine, learning_rate: float) -> Any:
        nonlocal count
        count += 1
        if count not in engine_steps:
            return original(self, learning_rate)
        with mock.patch.object(zero_state._adamw(self), "step", return_value=None):
            return original(self, learning_rate)

    with mock.patch.object(Engine, "apply", apply):
        yield


STAGES = (0, 1, 2, 3)
PRECISIONS = {"fp32": None, "bf16": 0.01}  # and the largest gradient norm
STEPS = 6
# Rank 1 has the second half of each global batch of 4, a place at a time: step 2's first, step 4's last place, ...
BAD_PLACES = {6: "nan", 15: "inf", 16: "gradient"}
BAD_STEPS = (2, 4, 5)


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(2, _leave_out_all, str(tmp_path_factory.mktemp("left-out")))


def _leave_out_all(folder: str) -> dict[Any, dict[str, Any]]:
    return {
        (stage, precision): _leave_out(f"{folder}/{stage}-{precision}", stage, precision, clip)
        for stage in STAGES
        for precision, clip in PRECISIONS.items()
    }


def _leave_out(folder: str, stage: int, precision: str, clip: float | None) -> dict[str, Any]:
    config = TrainConfig(
        global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage, precision=precision
    )
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * dist.get_world_size())

    def new_engine() -> Engine:
        return engine_of(new_model(), config, OptimConfig(clip_grad_norm=clip), accumulation)

    found: dict[str, Any] = {}
    engine = new_engine()
    with poisoned(BAD_PLACES):
        train_steps(engine, 0, STEPS, STEPS)
    found["poisoned"] = _state_of(engine)

    engine, run = new_engine(), Storage(folder)
    saver = make_saver(run, engine)
    with _suppressed(BAD_STEPS):
        losses = train_steps(engine, 0, STEPS, STEPS, saver, save_after=lambda step: step == 3)
    found["suppressed"] = _state_of(engine)
    saver.finish()

    Checkpoint(run, "step-00000003").restore(engine)
    with _suppressed([step - 3 for step in BAD_STEPS if step > 3]):
        found["losses again"] = train_steps(engine, 3, STEPS, STEPS)
    found["losses"], found["again"] = losses[3:], _state_of(engine)
    return found


def _state_of(engine: Engine) -> dict[str, Any]:
    """Digest of this rank's weights and moments, and the optimiser's step count."""
    digest = hashlib.sha256()
    for fragment in zero_state.held_fragments(engine):
        for values in zero_state.state_of(engine, fragment).values():
            digest.update(values.numpy().tobytes())
    return {"sha256": digest.hexdigest(), "steps": zero_state.optimizer_steps(engine)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_as_if_the_optimiser_had_left_it_out(
    left_out: list[dict[Any, dict[str, Any]]], stage: int, precision: str
) -> None:
    """NaN loss, Inf loss with a finite gradient, finite loss with an Inf gradient, each on one rank of two."""
    for rank in left_out:
        found = rank[stage, precision]
        assert found["poisoned"] == found["suppressed"]
        assert found["poisoned"]["steps"] == STEPS - len(BAD_STEPS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_went_back_to_a_checkpoint_trains_bit_equal_from_there(
    left_out: list[dict[Any, dict[str, Any]]], stage: int, precision: str
) -> None:
    for rank in left_out:
        found = rank[stage, precision]
        assert found["losses again"] == found["losses"]
        assert found["again"] == found["suppressed"]


# What the training loop makes of it: its runs, all in one pair of processes.


@dataclass(frozen=True)
class Case:
    """A run of the loop: where it is poisoned, or at which steps its optimiser is suppressed."""

    name: str
    places: dict[int, str]
    suppressed: tuple[int, ...] = ()
    crash_at: int | None = None  # the forward pass of this place fails once, and the run is started again
    audit_waits: bool = False  # the storage takes nothing of the audit but while a save is written
    # At each of these steps the run is told to leave, and then started again.
    leave_after: tuple[int, ...] = ()
    keep_last: int = 9
    options: tuple[tuple[str, Any], ...] = ()


TOTAL = 10
ALL_OF_STEPS = {  # one place of each: step s has [4 (s - 1), 4 s)
    step: 4 * step - 1 for step in range(1, TOTAL + 1)
}


def _nan_at(*steps: int) -> dict[int, str]:
    return {ALL_OF_STEPS[step]: "nan" for step in steps}


CASES = [
    Case("single", {9: "gradient", **_nan_at(8)}),
    Case("single-expected", {}, suppressed=(3, 8)),
    Case("rollback", _nan_at(6, 7, 8)),
    Case("rollback-expected", {}, suppressed=(5, 6, 7, 8)),
    Case("rollback-without-room", _nan_at(6, 7, 8), audit_waits=True),
    Case("restarted", _nan_at(6, 7, 8), crash_at=37),
    Case("stop", _nan_at(6, 7, 8), options=(("on_bad_steps", "stop"),)),
    Case("two-in-a-row", _nan_at(2, 3), options=(("max_bad_steps", 2),)),
    Case("again", _nan_at(6, 7, 8, 9, 10), keep_last=1, options=(("max_bad_steps", 2),)),
    Case("told-to-leave", _nan_at(6, 7, 8), leave_after=(6, 7), keep_last=1),
]


def _config(folder: Path, case: Case) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {
                **{"name": case.name, "storage_path": str(folder / "runs"), "audit": True},
                **{"checkpoint_every_steps": 4, "keep_last": case.keep_last},
            },
            "data": {"path": str(folder / "data"), "val_split": None, "workers": 0, "stride": 1},
            "model": MODEL.model_dump(),
            "decoder": DECODER.model_dump(),
            "optim": {"base_lr": 0.05, "warmup_epochs": 0},
            "train": {
                **{"steps": TOTAL, "global_batch": 4, "micro_batch": 1, "zero_stage": 2},
                **{"log_every_steps": 1, **dict(case.options)},
            },
            "cluster": {"workers": 2, "device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-steps")
    frames = [20, 24, 28, 32, 36, 40]
    videos = [encode(folder / f"{i}.mp4", number, i) for i, number in enumerate(frames)]
    write_dataset(folder / "data", videos, frames)
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, list[str]]:
    """By case: what each start of the run printed, and at its end the error that it stopped with, if any."""
    with contextlib.ExitStack() as leases:
        tasks = []
        for case in CASES:
            config = _config(folder, case)
            derived, run = derive_checked(config), run_folder(config)
            lease = leases.enter_context(acquire(run, lease_s=600))
            run_id = tracking.open_run(config, {}, run)
            tasks.append(Assignment(config, derived, tracking.tracking_uri(config), run_id, lease.guard))
        return run_ranks(2, _train_cases, tasks)[0]


def _train_cases(tasks: list[Assignment]) -> dict[str, list[str]]:
    with mock.patch.dict(ENCODER_SIZES, {MODEL.encoder: EncoderSize(width=64, depth=1, heads=1)}):
        return {case.name: _train_case(case, task) for case, task in zip(CASES, tasks, strict=True)}


def _train_case(case: Case, task: Assignment) -> list[str]:
    crashes = [] if case.crash_at is None else [case.crash_at]
    outputs = []
    waiting = _audit_waits() if case.audit_waits else contextlib.nullcontext()
    with poisoned(case.places), _suppressed(case.suppressed), waiting:
        while True:
            control = dist.new_group(backend="gloo")
            ended, said = False, io.StringIO()
            with contextlib.redirect_stdout(said), _crashing(crashes):
                try:
                    with _queue(task) as tracker:
                        watch = _Watch(task.lease, control, case.leave_after[len(outputs) :][:1])
                        ended = train(task, torch.device("cpu"), control, watch, tracker) is None
                except RunStoppedError as error:
                    print(f"RunStoppedError: {error}")
                    ended = True
                except _Crash:
                    for thread in threading.enumerate():
                        if thread.name.startswith("save-"):
                            thread.join()
            outputs.append(said.getvalue())
            if ended:
                return outputs
            crashes = []


def _queue(task: Assignment) -> contextlib.AbstractContextManager[QueuedTracker | None]:
    if dist.get_rank():
        return contextlib.nullcontext()
    to_mlflow = tracking.Tracker(task.tracking_uri, task.mlflow_run_id, task.lease.check)
    return QueuedTracker(to_mlflow, task.lease.storage())


class _Watch(Watch):
    """Tells all ranks to leave after optimiser steps `leave_after`."""

    def __init__(self, guard: Guard, control: dist.ProcessGroup, leave_after: tuple[int, ...]) -> None:
        super().__init__(guard, control, lambda: None)
        self._leave_after = leave_after

    def due(self, *, saves_fail: bool = False) -> bool:
        return True

    def look(self, step: int) -> Interruption | None:
        return Interruption("told to", step) if step in self._leave_after else None


class _Crash(Exception):  # noqa: N818
    """A fault of the machine."""


@contextlib.contextmanager
def _crashing(places: list[int]) -> Iterator[None]:
    """All ranks fail at the step of one of `places`."""
    original = Engine.accumulate

    def accumulate(self: Engine, batches: Any, total_weight: float) -> torch.Tensor:
        if any(place // 4 == int(batches[0].places[0]) // 4 for place in places):
            raise _Crash
        return original(self, batches, total_weight)

    with mock.patch.object(Engine, "accumulate", accumulate):
        yield


@contextlib.contextmanager
def _audit_waits() -> Iterator[None]:
    """The step loop's own thread finds a full disk on every rank."""
    original = DeferredWrites._write

    def write(self: DeferredWrites) -> None:
        of_audit = any(name.startswith("audit/") for name in self._waiting)
        if of_audit and threading.current_thread() is threading.main_thread():
            raise OSError("No space left on device")
        original(self)

    with mock.patch.object(DeferredWrites, "_write", write):
        yield


def _checkpoint(folder: Path, name: str, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """State and all tensors of a checkpoint, by part and name."""
    run = Storage(str(folder / "runs" / name))
    opened = Checkpoint(run, f"step-{step:08d}")
    tensors = {}
    for number, part in enumerate(sorted(entry.name for entry in opened.manifest.parts)):
        for key, values in load_file(folder / "runs" / name / FOLDER / opened.name / part).items():
            tensors[f"{number}/{key}"] = values
    return opened.state, tensors


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def _client(folder: Path, name: str) -> tuple[MlflowClient, str]:
    record = json.loads((folder / "runs" / name / "run.json").read_text())
    return MlflowClient(tracking_uri=record["tracking_uri"]), record["mlflow_run_id"]


@pytest.mark.parametrize(
    ("case", "steps"), [("single", 8), ("rollback", 6), ("restarted", 6), ("told-to-leave", 6)]
)
def test_the_run_ends_with_the_weights_of_one_whose_optimiser_left_the_steps_out(
    printed: dict[str, list[str]], folder: Path, case: str, steps: int
) -> None:
    """`rollback` gives up step 5, which was good; `restarted` fails at step 10 and begins behind the rollback;
    `told-to-leave` saves and leaves between bad steps, and goes back behind that checkpoint."""
    expected = f"{'single' if case == 'single' else 'rollback'}-expected"
    state, tensors = _checkpoint(folder, case, TOTAL)
    expected_state, expected_tensors = _checkpoint(folder, expected, TOTAL)
    _assert_equal(tensors, expected_tensors)
    assert state["optimizer_steps"] == expected_state["optimizer_steps"] == steps
    assert state["position"] == TOTAL * 4


def test_the_samples_of_a_bad_step_are_listed_with_rank_and_loss(
    printed: dict[str, list[str]], folder: Path
) -> None:
    table = pq.read_table(folder / "runs/single/bad_steps").sort_by([("place", "ascending")]).to_pylist()
    assert [(row["step"], row["place"]) for row in table] == [
        *((3, place) for place in range(8, 12)),
        *((8, place) for place in range(28, 32)),
    ]
    assert [row["rank"] for row in table] == [0, 0, 1, 1] * 2
    assert all(row["weight"] == 1 for row in table)
    assert [row["place"] for row in table if not math.isfinite(row["loss"])] == [31]
    keys = set(pq.read_table(folder / "data/index-train.parquet")["key"].to_pylist())
    assert {(row["shard"], row["key"] in keys) for row in table} <= {
        ("train-000000.tar", True),
        ("train-000001.tar", True),
    }
    culprit = table[-1]
    (output,) = printed["single"]
    assert (
        "step 3  not applied, number 1 in a row: all losses are finite, the gradient norm is not." in output
    )
    assert (
        "step 8  not applied, number 1 in a row: the loss of 1 of 4 samples is not finite: "
        f"{culprit['shard']} {culprit['key']} on rank 1" in output
    )
    assert f"{folder}/runs/single/bad_steps/step-00000008.parquet" in output
    client, run_id = _client(folder, "single")
    assert [file.path for file in client.list_artifacts(run_id, "bad_steps")] == [
        "bad_steps/step-00000003.parquet",
        "bad_steps/step-00000008.parquet",
    ]


def test_every_step_is_logged_and_a_bad_ones_loss_is_a_gap(
    printed: dict[str, list[str]], folder: Path
) -> None:
    runs = folder / "runs"
    every = list(range(1, TOTAL + 1))
    assert [step for step, _ in history(runs, "single", "learning_rate")] == every
    assert history(runs, "single", "learning_rate") == history(runs, "single-expected", "learning_rate")
    assert [step for step, _ in history(runs, "single", "gradient_norm")] == [
        step for step in every if step not in (3, 8)
    ]
    assert [step for step, _ in history(runs, "single", "loss/train")] == [
        step for step in every if step != 8
    ]
    assert [value for _, value in history(runs, "single", "bad_steps")] == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]


def test_the_audit_has_neither_bad_steps_nor_those_that_a_rollback_gave_up(
    printed: dict[str, list[str]], folder: Path
) -> None:
    given_up = (5, 6, 7, 8)
    for case, gone in (
        *(("single", (3, 8)), ("rollback", given_up)),
        *(("rollback-without-room", given_up), ("restarted", given_up)),
    ):
        assert applied_places(Storage(str(folder / "runs" / case))) == {
            step: list(range(4 * (step - 1), 4 * step)) for step in range(1, TOTAL + 1) if step not in gone
        }, case


def test_a_rollback_whose_audit_finds_no_room_goes_on_and_keeps_every_line_for_the_next_checkpoint(
    printed: dict[str, list[str]], folder: Path
) -> None:
    """`applied_places` above shows the lines; here that the old attempt has those of the step given up, too."""
    (output,) = printed["rollback-without-room"]  # no worker was lost
    assert "tried again later: No space left on device" in output
    audits = [folder / "runs" / case / "audit" for case in ("rollback", "rollback-without-room")]
    written, waited = [
        {str(file.relative_to(audit)): file.read_text() for file in audit.rglob("*.json*")}
        for audit in audits
    ]
    assert waited == written
    assert len(written) == 6  # of two attempts the start and two ranks' lines
    state, tensors = _checkpoint(folder, "rollback-without-room", TOTAL)
    expected_state, expected_tensors = _checkpoint(folder, "rollback", TOTAL)
    _assert_equal(tensors, expected_tensors)
    assert state["bad_steps"] == expected_state["bad_steps"]


def test_a_checkpoint_waits_for_a_good_step_and_follows_a_rollback_at_once(
    printed: dict[str, list[str]], folder: Path
) -> None:
    runs = folder / "runs"
    assert complete_checkpoints(Storage(str(runs / "single"))) == [
        f"step-{n:08d}" for n in (4, 9, 10)  # step 8 was bad
    ]  # fmt: skip
    assert complete_checkpoints(Storage(str(runs / "rollback"))) == [f"step-{n:08d}" for n in (4, 8, 10)]
    before, old = _checkpoint(folder, "rollback", 4)
    after, new = _checkpoint(folder, "rollback", 8)
    _assert_equal(new, old)
    assert after["bad_steps"] == {
        "steps": [6, 7, 8], "in_a_row": 0, "rollbacks": [{"step": 8, "to_step": 4}]
    }  # fmt: skip
    assert (before["optimizer_steps"], after["optimizer_steps"]) == (4, 4)
    assert after["position"] == 32


def test_weights_older_than_those_gone_back_to_stay_until_there_are_newer_ones(
    printed: dict[str, list[str]], folder: Path
) -> None:
    """One checkpoint is kept, but that of step 7 holds the weights of step 4."""
    run = Storage(str(folder / "runs/again"))
    assert complete_checkpoints(run) == ["step-00000004", "step-00000007"]
    assert weights_step(Checkpoint(run, "step-00000007").state, 7) == 4


def test_a_checkpoint_made_between_bad_steps_is_not_gone_back_to_and_displaces_none_that_is(
    printed: dict[str, list[str]], folder: Path
) -> None:
    """One checkpoint is kept, and the run is told to leave twice amid bad steps."""
    run = Storage(str(folder / "runs/told-to-leave"))
    first, second, third = printed["told-to-leave"]
    assert "continues from" not in first
    assert f"continues from {run.uri}/checkpoints/step-00000006, step 6" in second
    assert f"continues from {run.uri}/checkpoints/step-00000007, step 7" in third
    assert f"the weights are those of {run.uri}/checkpoints/step-00000004 again" in third
    assert complete_checkpoints(run) == ["step-00000010"]


def test_mlflow_has_the_newest_checkpoints_step(printed: dict[str, list[str]], folder: Path) -> None:
    for case in ("single", "told-to-leave"):
        client, run_id = _client(folder, case)
        assert client.get_run(run_id).data.tags[CHECKPOINT_TAG] == "10"


def test_a_rollback_is_said_and_tagged_also_where_the_run_was_started_again(
    printed: dict[str, list[str]], folder: Path
) -> None:
    assert (
        f"the weights are those of {folder}/runs/rollback/checkpoints/step-00000004 again, "
        "what steps 5 to 8 learned is given up" in printed["rollback"][0]
    )
    first, second = printed["restarted"]
    assert "what steps 5 to 8 learned is given up" in first
    assert "continues from" in second
    assert "step 8" in second
    assert "not applied" not in second
    for case in ("rollback", "restarted"):
        client, run_id = _client(folder, case)
        assert client.get_run(run_id).data.tags[ROLLBACKS_TAG] == "step 8: weights of 4"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "stop",
            "3 steps in a row had a loss or gradient norm that is not finite .*on_bad_steps rollback goes",
        ),
        ("two-in-a-row", "2 steps in a row .*and there is no checkpoint to go back to.*Check optim.base_lr"),
        ("again", "2 steps in a row .*directly after the weights had gone back to those of step 4"),
    ],
)
def test_a_run_that_cannot_go_on_stops_and_names_the_list_and_the_remedy(
    printed: dict[str, list[str]], folder: Path, case: str, message: str
) -> None:
    *_, last = printed[case][0].splitlines()
    assert last.startswith("RunStoppedError: ")
    assert f"listed in {folder}/runs/{case}/bad_steps" in last
    with pytest.raises(RunStoppedError, match=message):
        raise RunStoppedError(last)


def test_a_fourth_way_back_to_the_same_weights_is_refused(tmp_path: Path) -> None:
    """Each rollback is followed by a checkpoint, so the next one goes back to that, unless a newer one was made."""
    chain = [{"step": 503, "to_step": 500}, {"step": 510, "to_step": 503}, {"step": 520, "to_step": 510}]
    run = Storage(str(tmp_path))
    notes = DeferredWrites(run)
    bad_steps = BadSteps(run, notes, TrainConfig(), lambda places: [], None, None)
    bad_steps.restore({"steps": [], "in_a_row": 3, "rollbacks": chain})
    with pytest.raises(RunStoppedError, match="gone back 3 times without a checkpoint of newer weights"):
        bad_steps.go_back(530, engine=None, seen=0)
    chain[-1]["to_step"] = 515  # a checkpoint in between, as the schedule makes them
    assert bad_steps._rollbacks_to_same_weights() == 1


@pytest.mark.slow
def test_pretrain_on_ray_goes_back_and_ends_with_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps in a row are poisoned in the workers, which find the poison by PYTHONPATH."""
    runs_folder(tmp_path)
    path = [
        str(ROOT / "tests/train/poisoned_workers"),
        str(ROOT),
        *os.environ.get("PYTHONPATH", "").split(":"),
    ]
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, path)))
    monkeypatch.setenv("TEST_POISONED_PLACES", json.dumps({16 * step + 13: "nan" for step in (5, 6, 7)}))
    process = PretrainProcess(run_arguments(tmp_path, "poisoned"))
    assert process.finish() == 0, process.output
    assert "what steps 5 to 8 learned is given up" in process.output
    rows = pq.read_table(tmp_path / "runs/poisoned/bad_steps").to_pylist()
    assert {row["step"] for row in rows} == {6, 7, 8}
    assert [(row["place"], row["rank"]) for row in rows if not math.isfinite(row["loss"])] == [
        (16 * step + 13, 1) for step in (5, 6, 7)
    ]
    runs = tmp_path / "runs"
    assert [step for step, _ in history(runs, "poisoned", "learning_rate")] == list(range(1, 13))
    assert [step for step, _ in history(runs, "poisoned", "loss/train")] == [*range(1, 6), *range(9, 13)]
    state = Checkpoint(Storage(str(runs / "poisoned")), "step-00000012").state
    assert (state["position"], state["optimizer_steps"]) == (12 * 16, 8)
