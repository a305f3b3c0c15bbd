"""The flow of work: never more in flight than allowed, every input once, in its slice and place."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.items import Item
from data_prep.prepare import _OPEN_SLICES, _work
from data_prep.shards import Outcome, SliceRecord


class Imagined:
    """An executor whose videos and shards end in an order drawn by a seed; it watches what is in flight."""

    def __init__(self, slots: int, seed: int, stuck: str) -> None:
        self.slots, self._draw, self._stuck = slots, random.Random(seed), stuck
        self.running: dict[int, Outcome | SliceRecord] = {}
        self.staged = 0
        self._handles = iter(range(10**6))
        self._ended: dict[int, Any] = {}

    def _start(self, result: Outcome | SliceRecord) -> int:
        handle = next(self._handles)
        self.running[handle] = result
        return handle

    def video(self, item: Item) -> int:
        self.staged += 1
        assert sum(isinstance(result, Outcome) for result in self.running.values()) < self.slots
        assert self.staged <= max(_OPEN_SLICES * 5, 2 * self.slots + 5)  # slices are of at most 5
        return self._start(Outcome(item.source))

    def shard(self, number: int, videos: list[Any]) -> int:
        parts = [video if isinstance(video, Outcome) else self._ended[video] for video in videos]
        return self._start(
            SliceRecord(shard=None, rows=[{"number": number}], rejects=[(part.source, "") for part in parts])
        )

    def wait(self, handles: set[int]) -> set[int]:
        assert set(handles) == set(self.running)
        # One video takes so long that everything else that may end ends before it.
        others = [handle for handle in handles if getattr(self.running[handle], "source", "") != self._stuck]
        return {self._draw.choice(sorted(others or handles))}

    def outcome(self, handle: int) -> Outcome:
        self._ended[handle] = self.running.pop(handle)
        return self._ended[handle]

    def record(self, handle: int) -> SliceRecord:
        record = self.running.pop(handle)
        assert isinstance(record, SliceRecord)
        self.staged -= sum(source.startswith("video") for source, _ in record.rejects)
        return record


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), max_size=30),
    slots=st.integers(1, 9),
    seed=st.integers(0, 99),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_work_in_flight_is_bounded_and_complete(
    counts: list[int], slots: int, seed: int, missing: float
) -> None:
    draw = random.Random(seed)
    slices = []
    for number, count in enumerate(counts):
        absent = [draw.random() < missing for _ in range(count)]
        slices.append(
            (
                number,
                [
                    Item(
                        f"{'absent' if gone else 'video'}-{number}-{place}",
                        reason="missing" if gone else None,
                    )
                    for place, gone in enumerate(absent)
                ],
            )
        )
    executor = Imagined(slots, seed, stuck="video-0-0")
    results = list(_work(iter(slices), executor))
    records = dict(result for result in results if not isinstance(result, Outcome))
    assert {number: [source for source, _ in record.rejects] for number, record in records.items()} == {
        number: [item.source for item in items] for number, items in slices
    }
    outcomes = [result.source for result in results if isinstance(result, Outcome)]
    assert sorted(outcomes) == sorted(item.source for _, items in slices for item in items)


@pytest.mark.parametrize(("size", "missing"), [(1, 0), (2, 0), (8, 0), (8, 7), (64, 63)])
def test_every_slot_is_at_work_however_few_videos_a_slice_has(size: int, missing: int) -> None:
    slots = 48
    executor = Imagined(slots, seed=0, stuck="video-0-0")
    busiest = []
    wait = executor.wait

    def watched(handles: set[int]) -> set[int]:
        busiest.append(sum(isinstance(result, Outcome) for result in executor.running.values()))
        return wait(handles)

    executor.wait = watched
    slices = [
        (
            number,
            [
                Item(f"video-{number}-{place}", reason="missing" if place < missing else None)
                for place in range(size)
            ],
        )
        for number in range(400)
    ]
    list(_work(iter(slices), executor))
    assert max(busiest) == slots


def test_slices_without_a_video_are_not_all_open_at_once() -> None:
    executor = Imagined(slots=8, seed=0, stuck="")
    begun: list[int] = []

    def slices() -> Iterator[tuple[int, list[Item]]]:
        for number in range(100):
            begun.append(number)
            assert len(begun) - len(written) <= 8
            yield number, [Item(f"absent-{number}", reason="missing")]

    written: list[int] = []
    for result in _work(slices(), executor):
        if not isinstance(result, Outcome):
            written.append(result[0])
    assert sorted(written) == list(range(100))


def test_largest_files_are_begun_first_and_the_slice_keeps_its_order(tmp_path: Path) -> None:
    sizes = {"short": 10, "long": 900, "middle": 50}
    items = []
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
        items.append(Item(name, path=str(tmp_path / name)))
    items.append(Item("vanished", path=str(tmp_path / "vanished")))  # whoever opens it says so
    executor = Imagined(slots=1, seed=0, stuck="")
    results = list(_work(iter([(0, items)]), executor))
    begun = [result.source for result in results if isinstance(result, Outcome)]
    assert begun == ["long", "middle", "short", "vanished"]
    ((_, record),) = [result for result in results if not isinstance(result, Outcome)]
    assert [source for source, _ in record.rejects] == ["short", "long", "middle", "vanished"]
