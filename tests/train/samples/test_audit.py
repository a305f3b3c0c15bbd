"""The audit of applied places: written by every rank at its step, read as what the final weights are made of."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.data.loader import Batch
from arvideo_dist.data.order import places_of_rank
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.samples.audit import Audit, applied_places
from arvideo_dist.train.tracking.deferred import DeferredWrites
from tests.train.distributed import run_ranks

GLOBAL_BATCH, MICRO_BATCH = 10, 2


def _attempt(guard: Guard, first: int, last: int, remote: bool) -> None:
    """Apply steps `first` + 1 to `last`; `remote`: as on storage that cannot append, flushed at every third."""
    control = dist.group.WORLD
    assert control is not None
    storage = guard.storage()
    storage.is_local = not remote
    notes = DeferredWrites(storage)
    audit = Audit(guard, notes, first, control)
    # Object storage, which this stands for, needs no folders.
    Path(storage.path(audit._name("any"))).parent.mkdir(parents=True, exist_ok=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(first + 1, last + 1):
        micro = places_of_rank((step - 1) * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, rank, world_size)
        nothing = torch.zeros(0)
        batches = [Batch(nothing, {}, nothing, torch.tensor(places), []) for places in micro]
        audit.applied(step, batches)
        if step % 3 == 0:
            notes.flush()


def test_steps_lost_with_their_workers_do_not_count_and_every_place_counts_once(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    with acquire(run, lease_s=600) as lease:
        run_ranks(2, _attempt, lease.guard, 0, 5, False)  # the checkpoint is step 3's
        run_ranks(3, _attempt, lease.guard, 3, 6, True)  # which leaves a rank without a place to pad
    with acquire(run, lease_s=600) as lease:  # another driver; step 6's checkpoint was damaged
        run_ranks(1, _attempt, lease.guard, 3, 9, False)
    assert applied_places(run) == {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, 10)
    }


def test_a_place_that_was_applied_twice_shows(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    with acquire(run, lease_s=600) as lease:
        run_ranks(2, _attempt, lease.guard, 0, 2, False)
        (attempt,) = run.names("audit")
        first, second = (tmp_path / "run/audit" / attempt / f"rank-0000{rank}.jsonl" for rank in (0, 1))
        second.write_text(first.read_text())  # both ranks read the same stretch
    assert applied_places(run)[1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_an_attempt_that_was_killed_before_it_began_changes_nothing(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    run.write_bytes("audit/00000001-0001/start.json", b'{"start_step": 0, "world_size": 1}')
    run.write_bytes("audit/00000001-0001/rank-00000.jsonl", b'{"step": 1, "places": [[0, 3]]}\n')
    (tmp_path / "audit/00000001-0002").mkdir()
    assert applied_places(run) == {1: [0, 1, 2]}


def _attempts_after_a_gap(guard: Guard) -> None:
    control = dist.group.WORLD
    assert control is not None
    folder = f"{guard.storage().path('audit')}/{guard.generation:08d}"
    Path(f"{folder}-0003").mkdir(parents=True)  # of 1 and 2 the storage took nothing
    audit = Audit(guard, DeferredWrites(guard.storage()), 4, control)
    audit.go_back(2)
    assert json.loads(Path(f"{folder}-0004/start.json").read_text())["start_step"] == 4
    assert json.loads(Path(f"{folder}-0005/start.json").read_text())["start_step"] == 2


def test_an_attempt_is_numbered_after_every_earlier_one_though_some_left_nothing(tmp_path: Path) -> None:
    with acquire(Storage(str(tmp_path / "run")), lease_s=600) as lease:
        run_ranks(1, _attempts_after_a_gap, lease.guard)
    assert len(list((tmp_path / "run/audit").iterdir())) == 3


class SmallDisk(Storage):
    has_room = False

    def write_bytes(self, name: str, data: bytes) -> None:
        if not self.has_room:
            raise OSError(errno.ENOSPC, "No space left")
        super().write_bytes(name, data)


def _begin_on_a_full_disk(guard: Guard) -> None:
    control, disk = dist.group.WORLD, SmallDisk(guard.run_address)
    assert control is not None
    notes = DeferredWrites(disk)
    audit = Audit(guard, notes, 4, control)
    audit.applied(5, [Batch(torch.zeros(0), {}, torch.zeros(0), torch.tensor([8, 9]), [])])
    with pytest.raises(OSError, match="No space left"):
        notes.flush()  # no checkpoint becomes visible without what stands there
    disk.has_room = True
    notes.flush()


def test_workers_that_start_while_the_disk_is_full_lose_no_line(tmp_path: Path) -> None:
    """It was raised at the start of the workers, which used up the restarts."""
    run = Storage(str(tmp_path / "run"))
    with acquire(run, lease_s=600) as lease:
        run_ranks(1, _begin_on_a_full_disk, lease.guard)
    (attempt,) = run.names("audit")
    assert json.loads(run.read_bytes(f"audit/{attempt}/start.json")) == {"start_step": 4, "world_size": 1}
    assert applied_places(run) == {5: [8, 9]}
