"""Which checkpoints are deleted: as many distinct good weights stay as were asked for, and all that is newer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import (
    FOLDER,
    MANIFEST,
    STATE,
    checkpoint_name,
    complete_checkpoints,
)
from arvideo_dist.train.checkpoint.retention import Retention, clear_leftovers, weights_step


def _names(*steps: int) -> list[str]:
    return [checkpoint_name(step) for step in steps]


def _state(in_a_row: int = 0, rollbacks: dict[int, int] | None = None) -> dict[str, Any]:
    pairs = [{"step": step, "to_step": to_step} for step, to_step in (rollbacks or {}).items()]
    return {"bad_steps": {"steps": [], "in_a_row": in_a_row, "rollbacks": pairs}}


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def _write(run: Storage, step: int, state: dict[str, Any] | None = None) -> None:
    folder = f"{FOLDER}/{checkpoint_name(step)}"
    run.write_bytes(f"{folder}/part", b"x")
    run.write_bytes(f"{folder}/{STATE}", json.dumps(state or _state()).encode())
    run.write_bytes(f"{folder}/{MANIFEST}", json.dumps({"parts": [{"name": "part"}]}).encode())


@pytest.fixture
def make_checkpoints(run: Storage) -> Callable[..., Storage]:
    """A run's folder with good checkpoints of `steps` and leftovers without a manifest of `killed`."""

    def make(steps: list[int], killed: list[int]) -> Storage:
        for step in steps:
            _write(run, step)
        for step in killed:
            run.write_bytes(f"{FOLDER}/{checkpoint_name(step)}/part", b"x")
        return run

    return make


def _save_all(run: Storage, states: dict[int, dict[str, Any]], keep_last: int, **options: Any) -> list[str]:
    """What is left when the run has made these checkpoints one after another."""
    retention = Retention(run, keep_last, options.get("keep_every"))
    for step, state in states.items():
        _write(run, step, state)
        retention.saved(checkpoint_name(step), weights_step(state, step))
    return run.names(FOLDER)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, None, [40, 50]), (1, None, [50]), (1, 20, [20, 40, 50]), (9, None, [10, 20, 30, 40, 50])],
)
def test_the_newest_and_the_multiples_of_keep_every_are_kept(
    make_checkpoints: Callable[..., Storage], keep_last: int, keep_every: int | None, kept: list[int]
) -> None:
    """Also by workers that did not make them."""
    run = make_checkpoints([10, 20, 30, 40, 50], killed=[35])
    Retention(run, keep_last, keep_every).saved("step-00000050", 50)
    assert run.names(FOLDER) == _names(*kept)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [([15, 20, 25, 40, 55], [20, 40, 55]), ([15, 23, 25, 47, 55, 61], [23, 47, 61])],
    ids=["all as due", "those due at 20, 40 and 60 failed"],
)
def test_in_place_of_a_checkpoint_for_good_that_failed_the_next_one_is_kept(
    run: Storage, steps: list[int], kept: list[int]
) -> None:
    assert _save_all(run, {step: _state() for step in steps}, 1, keep_every=20) == _names(*kept)


@pytest.mark.parametrize("stretch", [[10], [10, 11], [10, 11, 12, 13]], ids=len)
@pytest.mark.parametrize("keep_last", [1, 2])
def test_however_often_a_run_is_told_to_leave_amid_bad_steps_good_weights_to_go_back_to_are_left(
    run: Storage, keep_last: int, stretch: list[int]
) -> None:
    """Such a checkpoint holds suspected weights; of it the newest alone is of use, to go on from."""
    states = {4: _state(), 8: _state(), **{step: _state(in_a_row=step - 8) for step in stretch}}
    assert _save_all(run, states, keep_last) == _names(*[4, 8][-keep_last:], stretch[-1])


def test_weights_that_a_rollback_repeats_count_once(run: Storage) -> None:
    """The checkpoints of steps 11 and 14 hold the weights of 8: with these, those of 4 are the second newest."""
    states = {
        4: _state(),
        8: _state(),
        11: _state(rollbacks={11: 8}),
        14: _state(rollbacks={11: 8, 14: 11}),
    }
    assert _save_all(run, states, keep_last=2) == _names(4, 8, 11, 14)
    later = {16: _state(rollbacks={11: 8, 14: 11})}
    assert _save_all(run, later, keep_last=2) == _names(8, 11, 14, 16)
    later = {20: _state(rollbacks={11: 8, 14: 11})}
    assert _save_all(run, later, keep_last=2) == _names(16, 20)


def test_for_good_is_kept_what_can_be_gone_back_to(run: Storage) -> None:
    states = {20: _state(in_a_row=1), 23: _state(), 30: _state(), 41: _state()}
    assert _save_all(run, states, 1, keep_every=20) == _names(23, 41)


def test_nothing_newer_than_what_was_just_saved_is_deleted(
    make_checkpoints: Callable[..., Storage],
) -> None:
    """A run went on at step 8 from an empty store, and then the store came back with the steps 16 and 24."""
    run = make_checkpoints([8, 16, 24], killed=[32])
    Retention(run, 1, None).saved("step-00000008", 8)
    assert run.names(FOLDER) == _names(8, 16, 24, 32)


def test_a_checkpoint_that_could_not_be_used_counts_as_none_and_goes_once_the_run_is_past_it(
    make_checkpoints: Callable[..., Storage],
) -> None:
    run = make_checkpoints([10, 20, 30], killed=[])
    retention = Retention(run, 2, None, damaged=_names(30))
    retention.saved("step-00000020", 20)
    assert run.names(FOLDER) == _names(10, 20, 30)
    _write(run, 40)
    retention.saved("step-00000040", 40)
    assert run.names(FOLDER) == _names(20, 40)


def test_what_a_store_does_not_let_be_read_is_not_deleted(make_checkpoints: Callable[..., Storage]) -> None:
    """Neither a checkpoint whose state it denies, nor one whose manifest it denies though its listing shows it."""

    class Denies(Storage):
        def read_bytes(self, name: str) -> bytes:
            if name == f"{FOLDER}/step-00000010/{STATE}":
                raise FileNotFoundError(name)
            return super().read_bytes(name)

        def exists(self, name: str = "") -> bool:
            return name != f"{FOLDER}/step-00000020/{MANIFEST}" and super().exists(name)

    run = make_checkpoints([10, 20, 30, 40], killed=[25])
    Retention(Denies(run.address), 1, None).saved("step-00000040", 40)
    assert run.names(FOLDER) == _names(10, 20, 40)


def test_what_the_run_did_not_make_is_neither_deleted_nor_taken_for_a_checkpoint(
    make_checkpoints: Callable[..., Storage],
) -> None:
    run = make_checkpoints([10, 20], killed=[15])
    foreign = [".snapshot", "step-00000010-copy", "step-10", "step-000000010", "tmp"]
    for name in foreign:
        run.write_bytes(f"{FOLDER}/{name}/{MANIFEST}", b"{}")
    Retention(run, 1, 20).saved("step-00000020", 20)
    assert run.names(FOLDER) == sorted([*foreign, "step-00000020"])
    assert complete_checkpoints(run) == ["step-00000020"]


@pytest.mark.parametrize("manifest", [None, b"{", b"{}"], ids=["as written", "cut off", "of another kind"])
def test_a_step_that_was_seen_is_seen_while_its_damaged_checkpoint_is_cleared(
    run: Storage, manifest: bytes | None
) -> None:
    """Else a save of that step, killed, would leave a store that looks as if it had lost it."""
    _write(run, 8)
    folder = f"{FOLDER}/step-00000008"
    run.write_bytes(f"{folder}/part-of-a-killed-save", b"x")
    if manifest is not None:
        run.write_bytes(f"{folder}/{MANIFEST}", manifest)
    assert clear_leftovers(run, "step-00000008")
    assert run.names(folder) == sorted([MANIFEST, STATE, *(["part"] if manifest is None else [])])
    run.delete(f"{folder}/{MANIFEST}")
    assert not clear_leftovers(run, "step-00000008")
    assert run.names(FOLDER) == []
