"""Scores on a disk that is full for a while: as a training, an evaluation goes on and tries its saves again."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.folder import run_folder
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.scoring import SCORES, Scoring
from arvideo_dist.train import sequence
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint import saver
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RESULT, RunStoppedError
from arvideo_dist.train.sequence_saves import SequenceSaves
from tests.services.disk import small_disk
from tests.train.classifiers import VIEWS, evaluate_config, save_classifier
from tests.train.distributed import run_ranks
from tests.train.runs import make_data
from tests.train.test_length import Told, _LeavesAfter

VIDEOS, BATCHES = 16, 8  # of each of two ranks


@dataclass
class Found:
    said: list[str]  # by start
    stopped: list[str | None]
    tags: list[str]


class Tagged(Told):
    """What a tracker is told, tags among it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def tag(self, key: str, value: str) -> None:
        assert key == saver.FAILED_TAG
        self.tags.append(value)


def _fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**12))


def _empty(disk: Path) -> None:
    (disk / "ballast").unlink()


@contextlib.contextmanager
def _at_batches(actions: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Rank 0 does what is given for the number of a batch, before it scores that."""
    original, scored = sequence.SequenceRun._computed, 0

    def scores(self: sequence.SequenceRun, host: Any) -> torch.Tensor:
        nonlocal scored
        scored += 1
        if dist.get_rank() == 0 and scored in actions:
            actions[scored]()
        return original(self, host)

    with mock.patch.object(sequence.SequenceRun, "_computed", scores):
        yield


@contextlib.contextmanager
def _before_the_result(action: Callable[[], None]) -> Iterator[None]:
    original = SequenceSaves.read_parts

    def read_parts(self: SequenceSaves) -> Iterable[Any]:
        action()
        return original(self)

    with mock.patch.object(SequenceSaves, "read_parts", read_parts):
        yield


def _score(assignment: Assignment, found: Found) -> None:
    control, said, told = dist.new_group(backend="gloo"), io.StringIO(), Tagged()
    stopped = None
    with contextlib.redirect_stdout(said):
        watch = _LeavesAfter(assignment.lease, control, None)
        tracker: Any = told if dist.get_rank() == 0 else None
        try:
            sequence.run_sequence(assignment, torch.device("cpu"), control, watch, tracker)
        except RunStoppedError as error:
            stopped = str(error)
    found.said.append(said.getvalue())
    found.stopped.append(stopped)
    found.tags += told.tags


def _evaluate_all(assignments: dict[str, Assignment], disk: str) -> dict[str, Found]:
    saver._FIRST_PAUSE_S = 0.0
    found = {name: Found([], [], []) for name in assignments}
    fill, empty = (lambda: _fill(Path(disk))), (lambda: _empty(Path(disk)))
    _score(assignments["undisturbed"], found["undisturbed"])
    with _at_batches({2: fill, 6: empty}):
        _score(assignments["a while"], found["a while"])
    with _at_batches({BATCHES: fill}):
        _score(assignments["too long"], found["too long"])
    _empty_together(disk)
    _score(assignments["too long"], found["too long"])
    with _before_the_result(fill):
        _score(assignments["at the end"], found["at the end"])
    _empty_together(disk)
    _score(assignments["at the end"], found["at the end"])
    return found


def _empty_together(disk: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        _empty(Path(disk))
    dist.barrier()


NAMES = {"undisturbed": 3, "a while": 50, "too long": 2, "at the end": 3}  # run.max_failed_saves


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("score-saves") / "disk"
    with contextlib.ExitStack() as mounted:
        try:
            mounted.enter_context(small_disk(folder, size_mib=4))
        except OSError as error:
            pytest.skip(f"this process may not mount a small disk: {error}")
        yield folder


@pytest.fixture(scope="module")
def found(disk: Path) -> list[dict[str, Found]]:
    """What two ranks found, by rank; all in one pair of processes, since starting one costs seconds."""
    data = str(make_data(disk.parent / "data"))
    classifier = save_classifier(disk.parent / "classifier")
    with contextlib.ExitStack() as held:
        assignments = {}
        for name, tries in NAMES.items():
            config = evaluate_config(
                classifier, data, str(disk), name.replace(" ", "-"), max_failed_saves=tries
            )
            guard = held.enter_context(acquire(run_folder(config), lease_s=600)).guard
            assignments[name] = Assignment(config, derive_checked(config), "", "", guard)
        return run_ranks(2, _evaluate_all, assignments, str(disk))


def _results(disk: Path, name: str) -> dict[str, bytes]:
    run = Storage(str(disk / name.replace(" ", "-")))
    return {file: run.read_bytes(file) for file in (SCORES, RESULT)}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "undisturbed"])
def test_whatever_was_full_the_results_are_those_of_an_undisturbed_evaluation(
    found: list[dict[str, Found]], disk: Path, name: str
) -> None:
    assert found[0][name].stopped[-1] is None
    assert _results(disk, name) == _results(disk, "undisturbed")


def test_scoring_goes_on_while_saves_fail_and_all_is_saved_once_there_is_room(
    found: list[dict[str, Found]], disk: Path
) -> None:
    (said,) = found[0]["a while"].said
    first = said.index("the save failed (1 of run.max_failed_saves 50 in a row)")
    assert "No space left on device" in said[first:]
    assert said.index(f"view {2 * 2 * VIEWS}  ") <= first < said.index("save step-00000012 is complete")
    assert "save step-00000004 is complete" not in said
    assert f"view {VIDEOS * VIEWS}  save" in said
    failed, mended = found[0]["a while"].tags[0], found[0]["a while"].tags[-1]
    assert "No space left on device" in failed
    assert mended == "none since step-00000012"
    parts = [path.name for path in (disk / "a-while" / Scoring.parts_folder).iterdir()]
    assert not [name for name in parts if name.endswith(".partial")]
    assert not (disk / "a-while" / FOLDER / "step-00000004").exists()


def test_max_failed_saves_in_a_row_stop_the_evaluation_on_all_ranks_and_say_what_it_goes_on_from(
    found: list[dict[str, Found]],
) -> None:
    """At its end there is nothing to score meanwhile: it waits."""
    for rank in found:
        stopped, again = rank["too long"].stopped
        assert again is None
        assert stopped is not None
        assert stopped.startswith("2 saves in a row failed (run.max_failed_saves); the last one: save of ")
        assert stopped.endswith("the same command goes on from view 72")
    assert "continues from" in found[0]["too long"].said[1]
    assert "view 72\n" in found[0]["too long"].said[1]


def test_no_room_for_the_result_stops_the_evaluation_and_says_so(found: list[dict[str, Found]]) -> None:
    stopped, again = found[0]["at the end"].stopped
    assert again is None
    assert stopped is not None
    assert "the run is done and saved, but" in stopped
    assert "Make room there; the same command ends the run" in stopped
    assert found[1]["at the end"].stopped == [None, None], "the result is rank 0's"
