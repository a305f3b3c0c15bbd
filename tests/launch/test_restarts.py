"""The budget of restarts: what refills it, when a crash loop ends, and what the person on call reads."""

from __future__ import annotations

import pytest
import ray.train
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from arvideo_dist.launch.restarts import Restarts, cause_of
from arvideo_dist.train.run.stop import CrashLoopError


def test_a_new_checkpoint_refills_the_budget() -> None:
    restarts = Restarts(2, "/runs/x")
    for step in range(50):
        line, pause = restarts.lost("rank 1: gone", f"step-{step:08d}")
        assert "restart 1 of 2" in line
        assert pause == 0


def test_a_crash_loop_ends_and_says_which_errors_since_which_checkpoint_and_what_to_do() -> None:
    restarts = Restarts(2, "/runs/x")
    restarts.lost("rank 0: earlier", "step-00000100")
    restarts.lost("rank 1: OSError: first", "step-00000200")
    line, pause = restarts.lost("rank 1: OSError: second", "step-00000200")
    assert "restart 2 of 2 since checkpoint step-00000200, in 15 s" in line
    assert pause == 15
    with pytest.raises(CrashLoopError) as ended:
        restarts.lost("rank 2: OSError: third", "step-00000200")
    said = str(ended.value)
    assert "lost 3 times since checkpoint step-00000200" in said
    assert said.index("1. rank 1: OSError: first") < said.index("3. rank 2: OSError: third")
    assert "earlier" not in said
    assert "/runs/x/hangs" in said
    assert "the same command continues from checkpoint step-00000200" in said


def test_no_restart_is_made_where_none_is_allowed() -> None:
    with pytest.raises(CrashLoopError, match="before any checkpoint"):
        Restarts(0, "/runs/x").lost("rank 0: gone", None)


def test_pauses_grow_so_that_a_store_may_be_away_for_minutes() -> None:
    restarts = Restarts(10, "/runs/x")
    pauses = [restarts.lost("gone", None)[1] for _ in range(10)]
    assert pauses[:6] == [0, 15, 30, 60, 120, 240]
    assert max(pauses) == 240


def test_the_rank_that_died_is_named_before_those_that_lost_their_neighbour() -> None:
    died = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    error = ray.train.WorkerGroupError("lost", worker_failures={0: lost, 1: died, 2: lost})
    assert cause_of(error).startswith("rank 1 (and 2 more ranks): its process ended")
    root = ValueError("a shard is gone")
    outer = RuntimeError("while it trained")
    outer.__cause__ = root
    error = ray.train.WorkerGroupError("lost", worker_failures={0: lost, 3: outer})
    assert cause_of(error) == "rank 3 (and 1 more ranks): ValueError: a shard is gone"


def test_a_store_that_shows_fewer_checkpoints_is_no_progress() -> None:
    restarts = Restarts(2, "/runs/x")
    restarts.lost("gone", "step-00000024")
    line, _ = restarts.lost("gone", None)
    assert "restart 2 of 2 since checkpoint step-00000024" in line
    with pytest.raises(CrashLoopError, match="3 times since checkpoint step-00000024"):
        restarts.lost("gone", "step-00000016")


def test_workers_that_did_not_start_are_told_with_what_ended_them() -> None:
    died = RayActorError(error_msg="The actor died.\npid: 7\nip: 10.0.0.9\nWorker exit type: SYSTEM_ERROR")
    told = cause_of(ray.train.ControllerError(died))
    assert told == (
        "the workers did not start: its process ended (ip: 10.0.0.9, pid: 7): Worker exit type: SYSTEM_ERROR"
    )
