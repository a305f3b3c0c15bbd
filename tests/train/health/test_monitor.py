"""Whether a run hangs and which rank is to blame, from made-up heartbeats; and the monitor that collects them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from arvideo_dist.launch.hangs import autopsy
from arvideo_dist.processes import process_identity
from arvideo_dist.train.health.activity import Activity
from arvideo_dist.train.health.monitor import Beat, Hang, Monitor, judge, seconds_between_beats

HUNG_S = 60.0
WAITS = Beat(
    group="a:1",
    rank=0,
    world_size=4,
    node="n",
    host="h",
    pid=100,
    process=None,
    step=7,
    phase="agrees on the step with the other ranks",
    together=True,
    meetings=50,
    idle_s=70.0,
)


def _ranks(**other: dict) -> list[tuple[Beat, float]]:
    """Four ranks that wait for each other, heard a second ago; `r2={...}` changes rank 2."""
    beats = []
    for rank in range(4):
        changes = {"rank": rank, "pid": 100 + rank, **other.get(f"r{rank}", {})}
        ago = changes.pop("ago", 1.0)
        beats.append((replace(WAITS, **changes), ago))
    return beats


def _hang(heard: list[tuple[Beat, float]], waited_s: float = 1000.0) -> Hang:
    hang = judge(heard, 4, waited_s, HUNG_S)
    assert hang is not None
    return hang


def test_nothing_hangs_while_any_rank_makes_progress() -> None:
    assert judge(_ranks(r3={"idle_s": 5.0}), 4, 1000.0, HUNG_S) is None
    assert judge(_ranks(r3={"idle_s": 58.0}), 4, 1000.0, HUNG_S) is None
    # Its heartbeats are lost, but it takes part in the steps, or the others could not make any.
    assert judge(_ranks(r0={"ago": 500.0}, r1={"idle_s": 1.0}), 4, 1000.0, HUNG_S) is None


def test_rank_without_heartbeats_is_to_blame_and_is_to_be_ended_from_outside() -> None:
    hang = _hang(_ranks(r1={"ago": 65.0, "idle_s": 0.0, "phase": "optimiser step"}))
    assert hang.guilty == (1,)
    assert [beat.rank for beat in hang.mute] == [1]
    assert "rank 1 (pid 101 on h) has sent no heartbeat for 65 s" in hang.reason
    assert "last in 'optimiser step' after step 7" in hang.reason
    assert "; ranks 0, 2-3 in 'agrees on the step with the other ranks' after step 7" in hang.reason


def test_rank_that_waits_for_batches_is_to_blame_while_the_others_wait_for_it() -> None:
    phase = "waits for batches: decode worker 0 reads place 17 (train-000001.tar, k3)"
    hang = _hang(_ranks(r2={"phase": phase, "together": False, "meetings": 49}))
    assert hang.guilty == (2,)
    assert not hang.mute
    assert f"rank 2 (pid 102 on h) in '{phase}' after step 7 for 71 s; ranks 0-1, 3 in" in hang.reason
    assert [line.split()[1] for line in hang.table.splitlines()] == ["0", "1", "2", "3"]


def test_rank_that_has_begun_fewer_common_phases_is_to_blame() -> None:
    hang = _hang(_ranks(r3={"phase": "forward and backward of micro batch 1", "meetings": 48}))
    assert hang.guilty == (3,)


def test_rank_on_its_own_is_to_blame_where_all_are_equally_far() -> None:
    hang = _hang(_ranks(r0={"phase": "writes metrics", "together": False}))
    assert hang.guilty == (0,)


def test_all_are_named_where_all_do_the_same() -> None:
    assert _hang(_ranks()).guilty == (0, 1, 2, 3)
    alone = {"phase": "waits for batches", "together": False}
    assert _hang(_ranks(**{f"r{rank}": alone for rank in range(4)})).guilty == (0, 1, 2, 3)


def test_rank_that_was_never_heard_is_to_blame_after_the_same_time() -> None:
    heard = _ranks()[:3]
    assert judge(heard, 4, HUNG_S - 1, HUNG_S) is None
    hang = _hang(heard, HUNG_S + 1)
    assert hang.guilty == (3,)
    assert "rank 3 never sent a heartbeat" in hang.reason


def test_workers_that_are_all_silent_are_told_from_a_hang_with_witnesses() -> None:
    silent = {f"r{rank}": {"ago": 500.0} for rank in range(4)}
    hang = _hang(_ranks(**silent))  # they may have been killed, and their successors wait for room
    assert not hang.live
    assert [beat.rank for beat in hang.mute] == [0, 1, 2, 3]
    assert _hang(_ranks(r1={"ago": 500.0})).live


def test_ranks_that_have_left_hang_no_more() -> None:
    left = {f"r{rank}": {"left": True, "ago": 900.0} for rank in range(4)}
    assert judge(_ranks(**left), 4, 1000.0, HUNG_S) is None
    hang = _hang(_ranks(r1={"left": True, "ago": 900.0}, r2={"together": False}))
    assert hang.guilty == (2,)


def test_a_thousand_ranks_are_named_briefly() -> None:
    heard = [(replace(WAITS, rank=rank, world_size=1000), 1.0) for rank in range(1000)]
    hang = judge(heard, 1000, 1000.0, HUNG_S)
    assert hang is not None
    assert len(hang.reason) < 1500
    assert "and 992 more" in hang.reason
    assert len(hang.table.splitlines()) == 1000


def test_monitor_orders_the_ranks_of_a_hang_to_end_and_forgives_the_next_set() -> None:
    async def life() -> None:
        monitor = Monitor(hung_s=1.0, generation=3)
        waiting = asyncio.create_task(monitor.next_hang())
        beats = [replace(WAITS, world_size=2, rank=rank, idle_s=0.0) for rank in range(2)]
        assert [await monitor.beat(beat) for beat in beats] == [None, None]
        hang = await asyncio.wait_for(waiting, 30)
        assert hang.guilty == (0, 1)
        assert hang.folder.startswith("hangs/00000003-")
        order = await monitor.beat(beats[0])
        assert order is not None
        assert (order.folder, order.reason) == (hang.folder, hang.reason)
        assert await monitor.beat(replace(beats[0], group="b:2")) is None
        assert await monitor.beat(beats[1]) is None  # a late word of the set before begins nothing

    asyncio.run(life())


def test_an_autopsy_ends_the_process_that_it_means_and_none_that_got_its_pid_later() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = process_identity(child.pid)
        assert identity is not None
        assert autopsy(child.pid, identity + "0") is None
        assert child.poll() is None
        found = autopsy(child.pid, identity)
    assert found is not None
    assert found.startswith(f"process {child.pid}, ")
    assert child.returncode == -signal.SIGKILL


def test_heartbeats_stay_rare_and_a_hang_is_found_soon() -> None:
    assert 1000 / seconds_between_beats(600.0) <= 200
    for hung_s in (5.0, 10.0, 60.0, 600.0):
        assert seconds_between_beats(hung_s) <= hung_s / 10


def test_work_that_advances_within_a_phase_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("arvideo_dist.train.health.activity.time.monotonic", lambda: now)
    activity = Activity()
    activity.together("optimiser step")
    activity.alone("waits for batches", lambda: "decode worker 0 reads place 17")
    now = 104.0
    assert activity.reading() == (0, "waits for batches", False, 1, 4.0)
    now = 130.0
    assert activity.reading() == (0, "waits for batches: decode worker 0 reads place 17", False, 1, 30.0)
    activity.tick()
    assert activity.reading().idle_s == 0.0

    def fails() -> str:
        raise OSError("the index is away")

    activity.alone("waits for batches", fails)
    now = 200.0
    assert activity.reading() == (0, "waits for batches", False, 1, 70.0)
