"""Who reaches whom, how far clocks stand apart, which link is slow."""

from __future__ import annotations

import time

import pytest

from arvideo_dist.checks import network
from arvideo_dist.checks.finding import Level
from arvideo_dist.checks.network import (
    Listener,
    check_clock,
    check_reach,
    clock_offset,
    greet,
    link_outliers,
    targets,
)


def test_worker_that_cannot_be_reached_is_named_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CONNECT_TIMEOUT_S", 0.5)
    here = Listener("here")
    # TEST-NET-1 (RFC 5737) is nobody's.
    addresses = [("127.0.0.1", here.port, "here"), ("192.0.2.7", 5000, "there")]
    labels = ["worker 0 on a", "worker 1 on b"]
    (found,) = check_reach(labels, addresses, [0, 1])
    here.close()
    assert found.level is Level.ERROR
    assert found.message.startswith("cannot connect to worker 1 on b at 192.0.2.7:5000 (")
    assert "worker 0" not in found.message
    assert "let TCP through between all workers" in found.message


def test_listener_answers_many_and_another_program_is_not_taken_for_it() -> None:
    listener = Listener("token")
    assert [greet("127.0.0.1", listener.port, "token") for _ in range(20)] == [None] * 20
    assert greet("127.0.0.1", listener.port, "other") == "something else answered there"
    listener.close()


def test_small_worlds_try_all_pairs_and_large_ones_stay_connected() -> None:
    assert targets(1, 4) == [0, 2, 3]
    assert targets(0, 1) == []
    assert targets(500, 1000) == [0, 499, 501]
    assert targets(0, 1000) == list(range(1, 1000))
    assert targets(999, 1000) == [0, 998]


@pytest.mark.parametrize(("ahead_s", "level"), [(0.0, Level.OK), (-5.0, Level.WARNING), (90.0, Level.ERROR)])
def test_clock_skew_is_measured_within_its_bound(ahead_s: float, level: Level) -> None:
    offset, bound = clock_offset(lambda: time.time() + ahead_s)
    assert abs(offset - ahead_s) <= bound + 1e-3
    assert check_clock(offset, bound).level is level


def test_skew_within_the_round_trip_accuses_nobody() -> None:
    assert check_clock(5.0, 4.5).level is Level.OK


def test_slow_link_is_found_among_links_of_its_kind() -> None:
    two_nodes = ["a"] * 4 + ["b"] * 4
    # Ranks at the nodes' borders (0, 3, 4, 7) go over the network, the others over NVLink.
    rates = [10e9, 200e9, 190e9, 11e9, 9e9, 60e9, 200e9, 10e9]
    assert link_outliers(two_nodes, rates) == {5: pytest.approx(195e9)}
    rates[3] = 4e9
    assert set(link_outliers(two_nodes, rates)) == {3, 5}
    assert link_outliers(["a", "b"], [1e9, 5e9]) == {}, "of two nobody can say which is the slow one"
