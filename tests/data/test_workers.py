"""Accidents of decode workers: nothing is lost, nothing comes twice, nothing hangs, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from arvideo_dist.data import workers as workers_module
from arvideo_dist.data.workers import DecodePool, DecodeWorkersError
from arvideo_dist.storage import Storage
from tests.data.conftest import FRAMES, encode
from tests.data.in_workers import (
    Accidents,
    AlwaysDead,
    WaitingDecoder,
    hang_in_a_library,
    hang_with_the_lock_held,
    kill_self,
)
from tests.data.test_loader import batches, make_loader, seen  # noqa: F401  # make_loader is a fixture


def requests() -> Iterator[list[int]]:
    for first in range(0, 24, 2):
        yield [first, first + 1]


def children() -> list[psutil.Process]:
    """The processes below the fork server. Other tests' processes may stand below this one, too (tests/warm)."""
    return [
        worker
        for child in psutil.Process().children()
        if any("multiprocessing.forkserver" in word for word in child.cmdline())
        for worker in child.children(recursive=True)
    ]


@pytest.mark.parametrize(
    ("accident", "workers"),
    [(kill_self, 1), (kill_self, 2), (hang_with_the_lock_held, 1), (hang_in_a_library, 2)],
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_positions_are_read_again(
    tmp_path: Path, accident: Callable[[], None], workers: int
) -> None:
    samples = Accidents(tmp_path, place=5, times=1, accident=accident)
    delivered = list(DecodePool(samples, workers, pin_memory=False).run(requests()))
    assert delivered == [[(place, "fine") for place in request] for request in requests()]
    assert len(list(tmp_path.iterdir())) == 1
    psutil.wait_procs(children(), timeout=20)
    assert not children()


def test_the_sample_that_a_worker_is_at_is_named_while_a_batch_is_waited_for(
    dataset: Storage,
    make_loader: Callable,  # noqa: F811
    tmp_path: Path,
) -> None:
    loader = make_loader(dataset, workers=1, stop_position=2, global_batch=2, micro_batch=2)
    assert loader.busy_with() == ""
    loader.samples.decode_rgb = decoder = WaitingDecoder(tmp_path)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: list(batches(loader)))
        assert decoder.begun.read_text() == "decodes"
        (located,) = loader.samples.order.locate([0])
        row = loader.samples.indexes[0][located.row]
        assert loader.busy_with() == f"decode worker 0 decodes place 0 ({row.shard}, {row.key})"
        decoder.begun.unlink()
        decoder.go_on.write_text("")
        (batch,) = waiting.result(60)
    assert batch.weights.tolist() == [1, 1]
    assert loader.busy_with() == ""


def test_a_sample_that_kills_two_workers_is_bad_and_the_rest_goes_on(tmp_path: Path) -> None:
    samples = Accidents(tmp_path, place=7, times=1000, accident=kill_self)
    delivered = [
        entry for batch in DecodePool(samples, 2, pin_memory=False).run(requests()) for entry in batch
    ]
    assert [place for place, _ in delivered] == list(range(24))
    assert {place: reason for place, reason in delivered if reason != "fine"} == {
        7: "decode: 2 workers died or hung on it"
    }
    assert len(list(tmp_path.iterdir())) == 2


def test_workers_that_never_deliver_end_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_STARTS_WITHOUT_RESULT", 2)
    with pytest.raises(
        DecodeWorkersError, match=r"died 2 times in a row .*\(exit codes \['-9'\]\): check the node's memory"
    ):
        list(DecodePool(AlwaysDead(), 1, pin_memory=False).run(requests()))


def test_a_killed_decode_worker_loses_and_repeats_nothing(dataset: Storage, make_loader: Callable) -> None:  # noqa: F811
    expected = seen(make_loader(dataset))
    loader = make_loader(dataset, workers=2)
    got = {}
    for number, step in enumerate(loader):
        if number in (1, 3):
            children()[0].kill()
        for batch in step:
            for place, clip, weight in zip(batch.places.tolist(), batch.clips, batch.weights, strict=True):
                if place >= 0:
                    assert place not in got
                    got[place] = (clip.clone(), float(weight))
    whole = {}
    for batch in batches(make_loader(dataset)):
        whole |= {
            place: clip for place, clip in zip(batch.places.tolist(), batch.clips, strict=True) if place >= 0
        }
    assert sorted(got) == sorted(expected)
    assert all(bool((got[place][0] == whole[place]).all()) for place in whole)
    assert all(weight == 1 for _, weight in got.values())


def test_ending_the_iteration_ends_the_workers(dataset: Storage, make_loader: Callable) -> None:  # noqa: F811
    for step in make_loader(dataset, workers=2, stop_position=None):
        assert step
        assert len(children()) == 2
        break
    _, alive = psutil.wait_procs(children(), timeout=20)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("device_transforms", [False, True])
def test_memory_of_a_worker_stays_flat_through_20000_clips(
    tmp_path: Path,
    videos: list[bytes],
    make_dataset: Callable[..., Storage],
    make_loader: Callable,  # noqa: F811
    device_transforms: bool,
) -> None:
    """Less than 5 % growth over the last 80 %, with both decoders in use and a bad sample among them."""
    hevc = encode(tmp_path / "hevc.mp4", 40, 1, ("-c:v", "libx265", "-x265-params", "log-level=none"))
    storage = make_dataset(tmp_path / "data", [*videos, hevc, b"broken"], [*FRAMES, 40, 40])
    loader = make_loader(
        storage,
        workers=1,
        global_batch=16,
        micro_batch=16,
        stop_position=20_000,
        device_transforms=device_transforms,
    )
    resident = []
    for number, _ in enumerate(loader):
        if number % 50 == 49:
            (worker,) = children()
            resident.append(worker.memory_info().rss)
    settled = resident[len(resident) // 5 :]
    print(
        f"resident MB: first {settled[0] / 1e6:.1f}, last {settled[-1] / 1e6:.1f}, peak {max(settled) / 1e6:.1f}"
    )
    assert len(resident) == 25
    assert max(settled) < 1.05 * settled[0]
