"""Saves beside the training: what they hold, when they are due, and what is kept."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from arvideo_dist.data.loader import BadRecord
from arvideo_dist.storage import Storage
from arvideo_dist.train.agreement import agree
from arvideo_dist.train.checkpoint import saver as saver_module
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity
from tests.services.s3 import S3
from tests.train.distributed import make_saver, run_ranks, save_checkpoint
from tests.train.keyed import micro_batch, new_engine, new_model, state_at, train_steps


class HeldStorage(Storage):
    """Parts wait until they are let go."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.begun, self.let_go = threading.Event(), threading.Event()

    @contextmanager
    def streaming(self, name: str) -> Iterator[IO[bytes]]:
        self.begun.set()
        assert self.let_go.wait(60)
        with super().streaming(name) as file:
            yield file


class HeldEnd(Storage):
    """A part that is written ends once it is let go; on disk and in an object store."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.let_go = threading.Event()

    @contextmanager
    def streaming(self, name: str) -> Iterator[IO[bytes]]:
        with super().streaming(name) as file:
            yield file
            assert self.let_go.wait(60), "nothing came from the step loop"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def found(folder: Path, s3: S3) -> list[dict[str, Any]]:
    """What two ranks found, by rank; all in one pair of processes, since starting one costs seconds."""
    s3.make_bucket("held")
    return run_ranks(2, _find, str(folder), s3.uri("held/run"))


def _find(folder: str, remote: str) -> dict[str, Any]:
    engine = new_engine(new_model(), stage=0)
    return {
        "held": _train_past_a_held_save(f"{folder}/held", engine),
        "upload": _wait_for_an_end(remote, engine),
        "disk": _wait_for_an_end(f"{folder}/hanging", engine),
        "votes": _votes(engine),
        "agreed": _agree_on_bad(),
        "random": _random_states(engine),
        "parts": _save_fresh(f"{folder}/parts"),
        "unprivileged": _save_unprivileged(engine),  # the last: niceness cannot be taken back
    }


def _train_past_a_held_save(folder: str, engine: Engine) -> dict[str, Any]:
    run = HeldStorage(folder)
    saver = make_saver(run, engine)
    train_steps(engine, 0, 2, 4, saver)
    then = {name: value.clone() for name, value in engine.module.state_dict().items()}
    bad_steps = [1]
    saver.request(2, {**state_at(2), "bad_steps": bad_steps})
    train_steps(engine, 2, 4, 4, saver)
    bad_steps.append(3)
    assert run.begun.wait(60)
    before = complete_checkpoints(run)
    run.let_go.set()
    saver.finish()
    model = new_model()
    checkpoint = Checkpoint(run, "step-00000002")
    checkpoint.load_weights(model)
    saved, now = model.state_dict(), engine.module.state_dict()
    return {
        "bad steps": checkpoint.state["bad_steps"],
        "complete while held": before,
        "complete then": complete_checkpoints(run),
        "as it was": all(torch.equal(saved[name], then[name]) for name in then),
        "as it is": all(torch.equal(saved[name], now[name]) for name in now),
    }


def test_training_goes_on_while_the_state_as_it_was_is_saved(found: list[dict[str, Any]]) -> None:
    assert found[0]["held"] == {
        "bad steps": [1],
        "complete while held": [],
        "complete then": ["step-00000002"],
        "as it was": True,
        "as it is": False,
    }


def _wait_for_an_end(uri: str, engine: Engine) -> dict[str, Any]:
    """The step loop waits for a part whose pieces are all taken, and whose end is let go at its third look."""
    run = HeldEnd(uri)
    saver = make_saver(run, engine)
    original, seen = saver._snapshot.uploading.is_set, []
    signs: list[int] = []  # of progress that the step loop's own thread gave, by the number of its looks

    def look() -> bool:
        seen.append(original())
        if len(seen) == 3:
            run.let_go.set()
        return seen[-1]

    def tick() -> None:
        if threading.current_thread() is threading.main_thread():
            signs.append(len(seen))

    with (
        mock.patch.object(saver_module, "_SLICE_S", 0.05),
        mock.patch.object(saver._snapshot.uploading, "is_set", look),
        mock.patch.object(activity, "tick", tick),
    ):
        saver.request(1, state_at(1))
        if not run.is_local:
            assert saver._snapshot.uploading.wait(60)
        saver.finish()
    return {"signs": signs[:3], "complete": complete_checkpoints(run)}


def test_an_upload_that_the_step_loop_waits_for_is_progress_and_a_disk_that_takes_no_more_is_not(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["upload"] == {"signs": [1, 2, 3], "complete": ["step-00000001"]}
        assert rank["disk"] == {"signs": [], "complete": ["step-00000001"]}


def _save_fresh(folder: str) -> None:
    save_checkpoint(Storage(folder), new_engine(new_model(), stage=3), 1, state_at(1))


def test_parts_are_what_the_safetensors_library_reads(found: list[dict[str, Any]], folder: Path) -> None:
    """The header is written here, since the library writes files from tensors only."""
    parts = sorted((folder / "parts" / FOLDER / "step-00000001").glob("part-*"))
    tensors = [load_file(part) for part in parts]
    assert len(tensors) == 2
    for name, parameter in new_model().named_parameters():
        whole = torch.cat([part[f"weight/{name}"] for part in tensors if f"weight/{name}" in part])
        assert torch.equal(whole, parameter.detach().flatten()), name
        assert not any(part[f"exp_avg/{name}"].any() for part in tensors if f"exp_avg/{name}" in part)


class NoticesNiceness(Storage):
    """What the thread that writes parts has."""

    niceness = 0

    @contextmanager
    def streaming(self, name: str) -> Iterator[IO[bytes]]:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        with super().streaming(name) as file:
            yield file


def _save_unprivileged(engine: Engine) -> tuple[list[str], int]:
    """As Ray's workers save in a container: with niceness 15, and without the right to lower it."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    os.chmod(folder[0], 0o777)
    os.nice(15)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    run = NoticesNiceness(folder[0])
    save_checkpoint(run, engine, 1, state_at(1))
    found = complete_checkpoints(run)
    dist.barrier()
    if root:
        os.seteuid(0)
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return found, run.niceness


def test_a_process_without_rights_saves_below_its_own_priority(found: list[dict[str, Any]]) -> None:
    assert [rank["unprivileged"] for rank in found] == [(["step-00000001"], 19)] * 2


def _votes(engine: Engine) -> list[bool]:
    """Whether a save is due by time at three steps, between which 31 s pass on rank 0's clock alone."""
    control = dist.group.WORLD
    assert control is not None
    saver = make_saver(
        Storage("unused"), engine, checkpoint_every_steps=100, checkpoint_every_minutes=1, keep_every=3
    )
    due = []
    for _ in range(3):
        due.append(agree([micro_batch([0])], control, save_due=saver.due_by_time(), look=False).save_due)
        if dist.get_rank() == 0:
            saver._requested_at -= 31
    return [*due, *(saver.due_by_step(step) for step in (100, 6, 7))]


def test_a_save_is_due_by_step_or_by_rank_0s_clock_alike_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["votes"] == [False, False, True, True, True, False]


def _agree_on_bad() -> tuple[float, int]:
    control = dist.group.WORLD
    assert control is not None
    batch = micro_batch([5, 6] if dist.get_rank() else [7, -1])
    batch.bad = [BadRecord(5, "shard", "key", "reason")] * dist.get_rank()
    facts = agree([batch], control, save_due=False, look=False)
    return facts.total_weight, facts.bad_samples


def test_weight_and_bad_samples_of_the_global_batch_are_the_same_on_all_ranks(
    found: list[dict[str, Any]],
) -> None:
    assert [rank["agreed"] for rank in found] == [(2.0, 1), (2.0, 1)]


def _random_states(engine: Engine) -> list[bool]:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    train_steps(engine, 0, 2, 4)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    return [torch.equal(before[0], after[0]), bool((before[1] == after[1]).all()), before[2] == after[2]]


def test_a_training_step_draws_from_no_global_generator(found: list[dict[str, Any]]) -> None:
    """So a checkpoint holds no random state: seed and position are all there is to it."""
    for rank in found:
        assert rank["random"] == [True, True, True]
