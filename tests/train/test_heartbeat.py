"""What a rank says of itself to the monitor."""

from __future__ import annotations

import os

from arvideo_dist.train.heartbeat import name_of_this_set
from tests.train.distributed import run_ranks


def test_a_set_of_workers_is_told_from_an_older_one_that_met_at_the_same_address() -> None:
    sets = [run_ranks(2, _name_at_an_address_that_comes_again) for _ in range(2)]
    names = [set(of_ranks) for of_ranks in sets]
    assert [len(of_set) for of_set in names] == [1, 1], "one name for all ranks of a set"
    assert names[0].isdisjoint(names[1])


def _name_at_an_address_that_comes_again() -> str:
    os.environ.update(MASTER_ADDR="10.0.0.1", MASTER_PORT="4711")
    return name_of_this_set()
