"""One driver at a time writes a run: taking, refusing, expiry, and that who lost the lease changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arvideo_dist.launch.preemption import wait_to_restart
from arvideo_dist.storage import Storage
from arvideo_dist.train.run import lease as lease_module
from arvideo_dist.train.run.lease import FOLDER, Guard, Lease, LeaseHeldError, LeaseLostError, acquire
from arvideo_dist.train.run.stop import RunInterruptedError
from arvideo_dist.train.tracking.deferred import DeferredWrites
from tests.services.s3 import S3

HOLD = """
import sys, threading
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.lease import acquire
with acquire(Storage(sys.argv[1]), float(sys.argv[2])) as lease:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    """URI of a bucket."""
    s3.make_bucket("leases")
    return s3.uri("leases")


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty run folder, on disk and on S3."""
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    return Storage(request.getfixturevalue("bucket")).child(tmp_path.name)


@pytest.fixture
def other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process can be looked up, as where holder and observer are on different machines."""
    monkeypatch.setattr(lease_module, "process_identity", lambda pid: None)


class HoldingProcess:
    """Another process that holds the run's lease until it is ended."""

    def __init__(self, run: Storage, lease_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, run.address, str(lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait()


@pytest.fixture
def holder(run: Storage) -> Iterator[HoldingProcess]:
    held = HoldingProcess(run, lease_s=3)
    yield held
    held.process.kill()
    held.process.communicate()


def test_live_holder_is_named_to_the_second(run: Storage) -> None:
    holder = HoldingProcess(run, lease_s=30)
    with pytest.raises(LeaseHeldError, match=rf"process {holder.process.pid} on .* alive.*run\.name"):
        acquire(run, lease_s=3)
    holder.end(signal.SIGKILL)


def test_released_lease_is_free_at_once_and_generations_only_grow(run: Storage) -> None:
    guards = []
    for _ in range(3):
        with acquire(run, lease_s=600) as lease:
            guards.append(lease.guard)
    assert [guard.generation for guard in guards] == [1, 2, 3]
    with pytest.raises(LeaseLostError, match="generation 3, this one is 1"):
        guards[0].check()
    guards[2].check()
    assert len(run.names(FOLDER)) == 1


def test_what_a_holder_left_that_was_killed_as_it_wrote_goes_with_its_lease(tmp_path: Path) -> None:
    """The file beside a lease that was to take its place; never one of a later holder."""
    run = Storage(str(tmp_path))
    with acquire(run, 10.0) as first:
        left = tmp_path / FOLDER / f".{first.guard.name}.{'ab' * 16}.partial"
        left.write_text("{")
    later = tmp_path / FOLDER / f".00000009-{'0' * 32}.json.{'cd' * 16}.partial"
    later.write_text("{")
    with acquire(run, 10.0) as second:
        assert sorted(run.names(FOLDER)) == sorted([second.guard.name, later.name])


def test_lease_of_a_process_of_this_machine_that_has_ended_is_free_at_once(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    held = HoldingProcess(run, lease_s=600)  # waiting for it would exceed the test's time limit
    held.end(signal.SIGKILL)
    with acquire(run, lease_s=600) as lease:
        assert lease.guard.generation == 2


@pytest.mark.usefixtures("other_host")
def test_silent_holder_is_followed_after_its_lease_time_and_changes_nothing_when_it_wakes(
    run: Storage, holder: HoldingProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    holder.process.send_signal(signal.SIGSTOP)
    with acquire(run, lease_s=3) as lease:
        assert lease.guard.generation == 2
        assert f"held by process {holder.process.pid}" in capsys.readouterr().out
        holder.process.send_signal(signal.SIGCONT)
        _, _ = holder.process.communicate("")  # it gives its lease back, or would
        assert holder.process.returncode == 0
        (mine,) = [name for name in run.names(FOLDER) if not name.endswith(".partial")]
        assert mine == lease.guard.name


def test_nothing_is_written_or_deleted_under_an_older_generation(run: Storage, tmp_path: Path) -> None:
    with acquire(run, lease_s=600) as first:
        mine = pickle.loads(pickle.dumps(first.guard)).storage()
        mine.write_bytes("result.json", b"first")

        def append() -> None:
            deferred = DeferredWrites(mine)
            deferred.append("lines.jsonl", b"line\n")
            deferred.flush()

        with acquire_released(run):
            local = tmp_path / "part"
            local.write_bytes(b"part")
            for change in (
                lambda: mine.write_bytes("result.json", b"old"),
                lambda: mine.put_file(local, "part"),
                lambda: mine.delete("result.json"),
                append,
            ):
                with pytest.raises(LeaseLostError, match="taken over by process"):
                    change()
        assert run.read_bytes("result.json") == b"first"
        assert not run.exists("part")
        assert not [name for name in run.names() if name.startswith("lines")]


def acquire_released(run: Storage) -> Lease:
    """Take the run from a holder that has not given it back, as its expiry would allow."""
    (name,) = run.names(FOLDER)
    record = json.loads(run.read_bytes(f"{FOLDER}/{name}"))
    run.write_bytes(f"{FOLDER}/{name}", json.dumps({**record, "released": True}).encode())
    return acquire(run, lease_s=600)


def test_of_drivers_that_start_together_exactly_one_takes_the_run(run: Storage) -> None:
    drivers = 6
    together = threading.Barrier(drivers)

    def start() -> Lease | LeaseHeldError:
        together.wait()
        try:
            # Long enough that a winner on a crowded machine gets to its first heartbeats.
            return acquire(run, lease_s=12).__enter__()
        except LeaseHeldError as error:
            return error

    with ThreadPoolExecutor(drivers) as pool:
        results = [future.result() for future in [pool.submit(start) for _ in range(drivers)]]
    winners = [result for result in results if isinstance(result, Lease)]
    assert len(winners) == 1, results
    winners[0].guard.check()
    winners[0].__exit__(None, None, None)


def test_workers_hear_that_the_driver_wants_them_to_stop(run: Storage) -> None:
    with acquire(run, lease_s=3) as lease:
        workers = Guard(run.address, lease.guard.name)
        record = workers.record()
        assert record is not None
        assert (record.stop, record.widen) == (None, None)
        lease.ask_to_stop("SIGTERM")
        lease.ask_to_widen("first set")
    record = workers.record()
    assert record is not None
    assert (record.stop, record.widen) == ("SIGTERM", "first set")


def test_pause_before_a_restart_ends_when_the_run_is_asked_to_stop(run: Storage) -> None:
    with acquire(run, lease_s=3) as lease:
        wait_to_restart(lease, 0.01)
        asking = threading.Timer(0.1, lease.ask_to_stop, ["SIGTERM"])
        asking.start()
        with pytest.raises(
            RunInterruptedError, match="SIGTERM while no workers ran; the same command continues"
        ):
            wait_to_restart(lease, 24 * 3600)


def test_held_by_its_own_process_is_not_taken_for_ended() -> None:
    assert not lease_module.Holder.this_process().has_ended()
    assert lease_module.Holder.this_process().pid == os.getpid()
