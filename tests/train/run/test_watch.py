"""How the ranks of a run learn that it shall be interrupted."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from ray.train.v2.api.preemption import PreemptionInfo

from arvideo_dist.launch.worker import ranks_of
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.run.stop import Interruption
from arvideo_dist.train.run.watch import Watch
from tests.train.distributed import run_ranks

NOTICE = PreemptionInfo(deadline_ms=1_700_000_000_000, preempted_node_to_ranks={"b": [1], "a": [0, 2]})


def test_rank_zero_alone_is_sent_the_notice_and_all_ranks_meet_only_once_it_has_one(tmp_path: Path) -> None:
    with acquire(Storage(str(tmp_path)), lease_s=600) as lease:
        wanted, heard = zip(*run_ranks(2, _hear_of_leaving_nodes, lease.guard), strict=True)
    # Nobody asks for a meeting, at the first step neither, until the notice is there.
    assert wanted == ([False, False, True], [False, False, False])
    interruption = Interruption("preemption notice for the nodes of ranks 0, 1, 2", 7, goes_on=True)
    assert heard == (interruption, interruption)


def test_workers_make_way_for_more_after_a_step_of_their_own_and_not_while_saves_fail(tmp_path: Path) -> None:
    with acquire(Storage(str(tmp_path)), lease_s=600) as lease:
        lease.ask_to_widen("these")
    first, second = run_ranks(2, _hear_of_room, lease.guard)
    room = Interruption("the cluster has room for more workers", 9, goes_on=True)
    assert first == [([False, False, True], room), ([False, False, False], None)]
    assert second == [([False, False, False], room), ([False, False, False], None)]


def _hear_of_room(guard: Guard) -> list[tuple[list[bool], Interruption | None]]:
    """Of the set that is asked and of another: asked before the first step, while saves fail, and then."""
    heard = []
    for name in ("these", "other workers"):
        watch = Watch(guard, dist.new_group(backend="gloo"), lambda: None, name)
        wanted = [watch.due(), watch.due(saves_fail=True), watch.due()]
        heard.append((wanted, watch.look(step=9)))
    return heard


def _hear_of_leaving_nodes(guard: Guard) -> tuple[list[bool], Interruption | None]:
    notices: list[list[int]] = []

    def notice() -> list[int] | None:
        assert dist.get_rank() == 0, "another rank would be one more call to Ray's one actor"
        return notices[0] if notices else None

    control = dist.new_group(backend="gloo")
    watch = Watch(guard, control, notice)
    wanted = [watch.due(), watch.due()]
    notices.append(ranks_of(NOTICE))
    wanted.append(watch.due())
    return wanted, watch.look(step=7)
