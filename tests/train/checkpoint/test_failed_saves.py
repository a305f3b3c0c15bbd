"""Storage that fails: a full disk, an S3 that is away. The checkpoints before stay, and the training goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.data.loader import BadRecord
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.agreement import agree
from arvideo_dist.train.checkpoint import saver as saver_module
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.checkpoint.saver import Saver
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.run.lease import LeaseLostError, acquire
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.samples.audit import Audit, applied_places
from arvideo_dist.train.samples.bad_samples import ARTIFACT, BadSamples
from arvideo_dist.train.tracking.deferred import DeferredWrites
from tests.services.disk import small_disk
from tests.services.relays import CutOff
from tests.services.s3 import S3
from tests.train.distributed import run_ranks
from tests.train.keyed import micro_batch, new_engine, new_model, state_at, train_steps

FULL_DISK_MIB = 4


class FailingStorage(Storage):
    """Fails on rank 1 when parts are written, in as many saves as `fails` says."""

    fails = 0
    error: Exception = OSError("No space left on device")

    @contextlib.contextmanager
    def streaming(self, name: str) -> Iterator[Any]:
        if dist.get_rank() == 1 and self.fails:
            self.fails -= 1
            raise self.error
        with super().streaming(name) as file:
            yield file


class Reported(list[tuple[int, int, str]]):
    """What a saver reports."""

    def __call__(self, *told: Any) -> None:
        self.append(told)


@contextlib.contextmanager
def _pauses(seconds: float) -> Iterator[None]:
    before = saver_module._FIRST_PAUSE_S
    saver_module._FIRST_PAUSE_S = seconds
    yield
    saver_module._FIRST_PAUSE_S = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failed-saves")


@pytest.fixture(scope="module")
def full_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of FULL_DISK_MIB; None where this user may not mount one."""
    with contextlib.ExitStack() as mounted:
        try:
            mounted.enter_context(small_disk(folder / "disk", FULL_DISK_MIB))
        except OSError:
            yield None
        else:
            yield folder / "disk"


@pytest.fixture(scope="module")
def found(folder: Path, full_disk: Path | None, s3: S3) -> list[dict[str, Any]]:
    """What two ranks found, by rank; all in one pair of processes, since starting one costs seconds."""
    s3.make_bucket("saves")
    return run_ranks(2, _find, str(folder), full_disk and str(full_disk), s3)


def _find(folder: str, disk: str | None, s3: S3) -> dict[str, Any]:
    engine = new_engine(new_model(), stage=0)
    return {
        "once": _fail_once(f"{folder}/once", engine),
        "often": _fail_often(f"{folder}/often", engine, OSError(errno.ENOSPC, "No space left on device")),
        "away": _fail_often(f"{folder}/away", engine, OSError("AWS Error NETWORK_CONNECTION")),
        "last": _fail_at_the_end(f"{folder}/last", engine),
        "over": _save_over_a_damaged_one(f"{folder}/over", engine),
        "alone": _fail_and_finish_without_another_try(f"{folder}/alone", engine),
        "lost": _lose_the_lease(f"{folder}/lost", engine),
        "retention": _fail_to_delete(f"{folder}/retention", engine),
        "flush": _fail_to_flush(f"{folder}/flush", engine),
        "disk": None if disk is None else _fill_the_disk(Path(disk), engine),
        "s3": _lose_s3(s3, engine),
        "bad": _bad_samples_on_a_full_disk(f"{folder}/bad"),
        "audit": _audit_while_the_store_fails(f"{folder}/audit"),
    }


def _saver(run: Storage, engine: Engine, report: Callable[..., None], **options: Any) -> Saver:
    return Saver(run, engine, RunConfigSection(**options), lambda line: None, report=report)


def _due(saver: Saver) -> bool:
    control = dist.group.WORLD
    assert control is not None
    return agree([micro_batch([0])], control, save_due=saver.due_by_time(), look=False).save_due


def _ended(saver: Saver) -> None:
    """On all ranks the save in flight has come to its end, unseen by the saver."""
    assert saver._thread is not None
    saver._thread.join()
    dist.barrier()


def _fail_once(folder: str, engine: Engine) -> dict[str, Any]:
    run, report = FailingStorage(folder), Reported()
    saver = _saver(run, engine, report, checkpoint_every_minutes=None)
    saver.request(1, state_at(1))
    train_steps(engine, 1, 2, 4, saver)
    _ended(saver)
    run.fails = 1
    saver.request(2, state_at(2))
    train_steps(engine, 2, 3, 4, saver)
    _ended(saver)
    due = [_due(saver)]
    saver.request(3, state_at(3))  # due by step, too soon after a failure
    begun = saver._thread is not None
    if dist.get_rank() == 0:
        saver._failed_at -= 31
    due.append(_due(saver))
    saver.request(3, state_at(3))
    saver.finish()
    return {
        "due": due,
        "begun too soon": begun,
        "reported": list(report),
        "complete": complete_checkpoints(run),
    }


def test_a_failed_save_is_reported_leaves_nothing_and_is_soon_tried_again(
    found: list[dict[str, Any]], folder: Path
) -> None:
    for rank in found:
        assert rank["once"]["due"] == [False, True]
        assert not rank["once"]["begun too soon"]
        assert rank["once"]["complete"] == ["step-00000001", "step-00000003"]
    first, mended = found[0]["once"]["reported"]
    assert first[:2] == (2, 1)
    assert "step-00000002 failed: rank 1: OSError: No space left on device" in first[2]
    assert mended == (3, 0, "")
    assert found[1]["once"]["reported"] == []
    assert not (folder / "once" / FOLDER / "step-00000002").exists()


def _fail_often(folder: str, engine: Engine, error: Exception) -> dict[str, Any]:
    run = FailingStorage(folder)
    run.error = error
    saver = _saver(run, engine, Reported(), max_failed_saves=2, checkpoint_every_minutes=None)
    saver.request(1, state_at(1))
    saver.finish()
    run.fails = 2
    said, passing = "", None
    with _pauses(0.0):
        saver.request(2, state_at(2))
        train_steps(engine, 2, 3, 4, saver)
        saver.request(3, state_at(3))
        _ended(saver)
        saver_module._FIRST_PAUSE_S = 1000.0
        due = _due(saver)  # at once: nothing is to be waited for
        try:
            saver.request(4, state_at(4))
        except RunStoppedError as error:
            said, passing = str(error), error.passing
    return {"due": due, "said": said, "passing": passing, "complete": complete_checkpoints(run)}


def test_max_failed_saves_in_a_row_stop_the_run_on_all_ranks_and_say_what_to_do(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["often"]["due"]
        assert "2 saves in a row failed (run.max_failed_saves)" in rank["often"]["said"]
        assert (
            "step-00000003 failed: rank 1: OSError: [Errno 28] No space left on device"
            in rank["often"]["said"]
        )
        assert "the same command goes on from step 1" in rank["often"]["said"]
        assert rank["often"]["complete"] == ["step-00000001"]


def test_a_run_that_stops_for_a_store_that_may_come_back_is_told_from_one_that_needs_a_person(
    found: list[dict[str, Any]],
) -> None:
    assert [(rank["often"]["passing"], rank["away"]["passing"]) for rank in found] == [(False, True)] * 2


def _fail_at_the_end(folder: str, engine: Engine) -> list[str]:
    run = FailingStorage(folder)
    saver = _saver(run, engine, Reported())
    run.fails = 2
    with _pauses(0.01):
        saver.request(5, state_at(5))
        saver.finish(lambda: saver.request(5, state_at(5)))
    return complete_checkpoints(run)


def test_the_last_save_is_tried_again_until_it_is_whole(found: list[dict[str, Any]]) -> None:
    assert [rank["last"] for rank in found] == [["step-00000005"]] * 2


def _save_over_a_damaged_one(folder: str, engine: Engine) -> dict[str, Any]:
    """A run went back past the damaged checkpoint of step 5 and is there again; its first try fails."""
    run, step = FailingStorage(folder), f"{FOLDER}/step-00000005"
    saver = _saver(run, engine, Reported())
    saver.request(5, state_at(5))
    saver.finish()
    before = run.names(step)
    parts = [name for name in before if name.startswith("part-")]
    dist.barrier()
    if dist.get_rank() == 0:
        run.write_bytes(f"{step}/{parts[0]}", b"damaged")
    dist.barrier()
    run.fails = 1
    with _pauses(0.01):
        saver.request(5, state_at(5))
        _ended(saver)
        failed = complete_checkpoints(run), run.names(step) == before
        dist.barrier()
        saver.finish(lambda: saver.request(5, state_at(5)))
    Checkpoint(run, "step-00000005").verify()
    after = run.names(step)
    left = sorted(set(after) & set(parts))
    return {"shown": failed[0], "as it was": failed[1], "left": left, "files": len(after)}


def test_a_step_that_was_seen_is_seen_also_while_a_save_of_it_fails(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["over"] == {"shown": ["step-00000005"], "as it was": True, "left": [], "files": 4}


def _fail_and_finish_without_another_try(folder: str, engine: Engine) -> str:
    run = FailingStorage(folder)
    saver = _saver(run, engine, Reported())
    run.fails = 1
    saver.request(1, state_at(1))
    try:
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failed_save_that_is_not_tried_again_is_an_error_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "No space left on device" in rank["alone"]


def _lose_the_lease(folder: str, engine: Engine) -> str:
    run = FailingStorage(folder)
    run.fails, run.error = 1, LeaseLostError("taken over by another driver")
    saver = _saver(run, engine, Reported())
    saver.request(1, state_at(1))
    try:
        saver.finish(lambda: saver.request(1, state_at(1)))
    except RunStoppedError as error:
        return str(error)
    return ""


def test_a_lost_lease_is_no_failing_storage_and_ends_the_run_at_once(found: list[dict[str, Any]]) -> None:
    assert [rank["lost"] for rank in found] == ["taken over by another driver"] * 2


class KeepingStorage(Storage):
    """Deletes no checkpoint that is complete."""

    def delete(self, name: str) -> None:
        if name.endswith("manifest.json") and self.exists(name):
            raise OSError("Read-only file system")
        super().delete(name)


def _fail_to_delete(folder: str, engine: Engine) -> Any:
    run, report = KeepingStorage(folder), Reported()
    saver = _saver(run, engine, report, keep_last=1)
    for step in (1, 2):
        saver.request(step, state_at(step))
        saver.finish()
    return [list(report), complete_checkpoints(run)]


def test_a_save_whose_older_ones_cannot_be_deleted_is_whole(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["retention"] == [[], ["step-00000001", "step-00000002"]]


def _fail_to_flush(folder: str, engine: Engine) -> list[str]:
    def flush() -> None:
        if dist.get_rank() == 0:
            raise OSError("the outbox cannot be written")

    saver = Saver(Storage(folder), engine, RunConfigSection(), lambda line: None, flush=flush)
    saver.request(1, state_at(1))
    with contextlib.suppress(CheckpointError):
        saver.finish()
    return complete_checkpoints(Storage(folder))


def test_no_checkpoint_becomes_visible_before_what_it_rests_on_is_written(
    found: list[dict[str, Any]],
) -> None:
    assert [rank["flush"] for rank in found] == [[], []]


def _fill_the_disk(disk: Path, engine: Engine) -> dict[str, Any]:
    """Two checkpoints fit, then something else takes the room; then that goes."""
    run, report = Storage(str(disk)), Reported()
    saver = _saver(run, engine, report, checkpoint_every_minutes=None)
    saver.request(1, state_at(1))
    saver.finish()
    ballast = disk / "ballast"
    if dist.get_rank() == 0:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - 200_000)
    dist.barrier()
    free_before = os.statvfs(disk).f_bavail
    train_steps(engine, 1, 2, 4, saver)
    saver.request(2, state_at(2))
    train_steps(engine, 2, 3, 4, saver)
    _ended(saver)
    result = {
        "reported": list(report),
        "taken": free_before - os.statvfs(disk).f_bavail,
        "files": sorted(path.name for path in disk.rglob("*") if path.is_file() and path != ballast),
    }
    Checkpoint(run, "step-00000001").verify()
    dist.barrier()
    if dist.get_rank() == 0:
        ballast.unlink()
    with _pauses(0.0):
        saver.request(3, state_at(3))
        saver.finish()
    Checkpoint(run, "step-00000003").verify()
    return result


def test_a_full_disk_leaves_the_checkpoint_before_and_no_partial_file(found: list[dict[str, Any]]) -> None:
    if found[0]["disk"] is None:
        pytest.skip("only root may mount the small file system that this test fills")
    ((step, failures, message),) = found[0]["disk"]["reported"]
    assert (step, failures) == (2, 1)
    assert message.count("No space left on device") == 1, "one rank speaks for all"
    assert message.endswith(", and 1 more ranks alike")
    for rank in found:
        parts, others = [], []
        for name in rank["disk"]["files"]:
            (parts if name.startswith("part-") else others).append(name)
        assert others == ["manifest.json", "state.json"]
        assert len(parts) == 2
        assert rank["disk"]["taken"] <= 0


def _lose_s3(s3: S3, engine: Engine) -> dict[str, Any]:
    relay, report = CutOff(s3.address), Reported()
    run = Storage(s3.uri("saves/run", through=relay.address))
    saver = _saver(run, engine, report)
    saver.request(1, state_at(1))
    saver.finish()
    with relay.cut():
        saver.request(2, state_at(2))
        train_steps(engine, 2, 3, 4, saver)
        _ended(saver)
    dist.barrier()
    before = complete_checkpoints(run)
    with _pauses(0.0):
        saver.request(3, state_at(3))
        saver.finish()
    Checkpoint(run, "step-00000003").verify()
    after, left = complete_checkpoints(run), run.names(FOLDER)
    dist.barrier()
    relay.close()
    return {"reported": list(report), "before": before, "after": after, "left": left}


def test_s3_that_is_away_for_one_save_costs_that_save(found: list[dict[str, Any]]) -> None:
    assert [failures for _, failures, _ in found[0]["s3"]["reported"]] == [1, 0]
    for rank in found:
        assert rank["s3"]["before"] == ["step-00000001"]
        assert rank["s3"]["after"] == rank["s3"]["left"] == ["step-00000001", "step-00000003"]


class FullStorage(Storage):
    """Takes nothing while it is full."""

    full = True

    def _before_change(self) -> None:
        if self.full:
            raise OSError("No space left on device")


def _bad_samples_on_a_full_disk(folder: str) -> list[Any]:
    control = dist.group.WORLD
    assert control is not None
    run = FullStorage(folder)
    notes = DeferredWrites(run)
    bad = BadSamples(notes, 0.5, 100, control)
    for place in (3, 4):
        batch = micro_batch([place])
        batch.bad = [BadRecord(place, "shard", f"key {place}", "reason")] if dist.get_rank() else []
        bad.account([batch], 1, place)
        bad.collect()
    run.full = False
    if dist.get_rank() == 0:
        notes.flush()  # as before a checkpoint becomes visible
    dist.barrier()
    return [bad.places, run.read_bytes(ARTIFACT) == bad.parquet()]


def test_bad_samples_are_listed_once_the_disk_has_room(found: list[dict[str, Any]]) -> None:
    assert [rank["bad"] for rank in found] == [[2, True]] * 2


def _audit_while_the_store_fails(folder: str) -> dict[int, list[int]]:
    control = dist.group.WORLD
    assert control is not None
    opened: list[Any] = [acquire(Storage(folder), 60).guard if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(opened, src=0)
    guard = opened[0]
    notes = DeferredWrites(guard.storage())
    audit = Audit(guard, notes, 0, control)
    for step in (1, 2, 3):
        with mock.patch.object(guard, "check", side_effect=OSError("away") if step == 2 else None):
            audit.applied(step, [micro_batch([2 * step + dist.get_rank()])])
    notes.flush()
    dist.barrier()
    return applied_places(Storage(folder))


def test_lines_of_the_audit_that_the_store_did_not_take_are_written_later(
    found: list[dict[str, Any]],
) -> None:
    assert [rank["audit"] for rank in found] == [{1: [2, 3], 2: [4, 5], 3: [6, 7]}] * 2


def test_a_line_that_a_disk_takes_in_part_is_taken_back(tmp_path: Path) -> None:
    """The kernel lets no file of this process grow beyond the limit: half of the second line."""
    run = Storage(str(tmp_path))
    run.append("lines", b"first\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="only a part"):
            run.append("lines", b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.append("lines", b"second\n")
    assert run.read_bytes("lines") == b"first\nsecond\n"


def test_patience_has_an_end_and_takes_a_missing_member_for_an_answer(tmp_path: Path) -> None:
    errors = [OSError("once"), OSError("twice")]

    def fail_twice() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(fail_twice) == "done"
    with pytest.raises(FileNotFoundError):
        patiently(lambda: Storage(str(tmp_path)).read_bytes("missing"))
    with pytest.raises(json.JSONDecodeError):
        patiently(lambda: json.loads("{"))
    with pytest.raises(OSError, match="always"):
        patiently(lambda: (_ for _ in ()).throw(OSError("always")), patience_s=0.1)
