"""A run that ends at any single change of the storage, and is continued: the files of an undisturbed run."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from arvideo_dist import storage as storage_module
from arvideo_dist.storage import Storage
from data_prep.items import Inputs, Item, shuffled
from data_prep.prepare import prepare
from data_prep.shards import Outcome, Sample, SliceRecord, write_slice
from tests.data_prep.runs import digests

SETTINGS = {"shard_size": 2, "seed": 0}
NAMES = [item.source for item in shuffled((Item(f"{number}.mp4") for number in range(8)), seed=0)]
HALF = len(NAMES) // 2


class Mortal(Storage):
    """Fails for good at its change number `last`; a folder is removed file by file."""

    def __init__(self, folder: Path, last: int | None = None, backwards: bool = False) -> None:
        super().__init__(str(folder))
        self._last, self._backwards, self.changes = last, backwards, 0

    def _before_change(self) -> None:
        self.changes += 1
        if self._last is not None and self.changes >= self._last:
            raise OSError("the machine is gone")

    def delete(self, name: str) -> None:
        path = Path(self.path(name))
        if path.is_dir():
            for member in sorted(os.listdir(path), reverse=self._backwards):
                super().delete(f"{name}/{member}")
        super().delete(name)


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class Instant:
    """Takes files as they are; one that is not there is rejected. Futures are done when they are given."""

    slots = 4

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def video(self, item: Item) -> Future[Outcome]:
        assert item.path
        if not Path(item.path).exists():
            return done(Outcome(item.source, reason="unreadable: it is not there"))
        data = Path(item.path).read_bytes()
        sample = Sample(
            key=item.key,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            width=16,
            height=16,
            fps=1.0,
            frames=2,
            duration=2.0,
            label=-1,
            label_name=None,
            source=item.source,
        )
        return done(Outcome(item.source, sample=sample, video=data))

    def shard(self, number: int, videos: list[Future[Outcome]]) -> Future[SliceRecord]:
        return done(write_slice(self._storage, "train", number, [video.result() for video in videos]))

    def wait(self, handles: set[Future[Any]]) -> set[Future[Any]]:
        return handles

    def outcome(self, handle: Future[Outcome]) -> Outcome:
        return handle.result()

    def record(self, handle: Future[SliceRecord]) -> SliceRecord:
        return handle.result()


def run(storage: Storage, videos: Path, retry: bool = False) -> None:
    items = [Item(name, path=str(videos / name)) for name in sorted(NAMES)]
    inputs = Inputs(items, [], {"source": "test"})

    @contextlib.contextmanager
    def executor() -> Iterator[Instant]:
        yield Instant(storage)

    prepare(inputs, storage, "train", SETTINGS, executor, retry)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "sync", lambda path: None)  # the machine does not really go


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Whole slices of the first run are there, and whole ones are not."""
    folder = tmp_path / "videos"
    folder.mkdir()
    add(folder, NAMES[:HALF])
    return folder


def add(videos: Path, names: list[str]) -> None:
    for name in names:
        (videos / name).write_bytes(name.encode() * 100)


def calm(out: Path, videos: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The files after a first run, and after a retry for which all videos but one have come."""
    run(Storage(str(out)), videos)
    first = digests(out)
    add(videos, NAMES[:-1])
    run(Storage(str(out)), videos, retry=True)
    for name in NAMES[HALF:]:
        (videos / name).unlink(missing_ok=True)
    return first, digests(out)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_run_that_ends_at_any_change_is_continued_and_its_rejects_can_be_retried(
    tmp_path: Path, videos: Path, backwards: bool
) -> None:
    first, second = calm(tmp_path / "calm", videos)
    whole = Mortal(tmp_path / "whole")
    run(whole, videos)
    assert whole.changes > 10
    for last in range(1, whole.changes + 1):
        out = tmp_path / f"out-{last}"
        with pytest.raises(OSError, match="the machine is gone"):
            run(Mortal(out, last, backwards), videos)
        run(Storage(str(out)), videos)
        assert digests(out) == first
        add(videos, NAMES[:-1])
        run(Storage(str(out)), videos, retry=True)
        assert digests(out) == second
        sources = [pq.read_table(out / f"{kind}-train.parquet")["source"] for kind in ("index", "rejects")]
        assert sorted(name for column in sources for name in column.to_pylist()) == sorted(NAMES)
        for name in NAMES[HALF:]:
            (videos / name).unlink(missing_ok=True)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_retry_that_ends_at_any_change_is_continued(tmp_path: Path, videos: Path, backwards: bool) -> None:
    _, second = calm(tmp_path / "calm", videos)

    def finished(out: Path) -> None:
        run(Storage(str(out)), videos)
        add(videos, NAMES[:-1])

    finished(tmp_path / "whole")
    whole = Mortal(tmp_path / "whole")
    run(whole, videos, retry=True)
    assert whole.changes > 10
    for last in range(1, whole.changes + 1):
        for name in NAMES[HALF:]:
            (videos / name).unlink(missing_ok=True)
        out = tmp_path / f"out-{last}"
        finished(out)
        with pytest.raises(OSError, match="the machine is gone"):
            run(Mortal(out, last, backwards), videos, retry=True)
        run(Storage(str(out)), videos)  # ends a retry that has begun, and clears what is left of one
        assert "progress-train" not in os.listdir(out)
        run(Storage(str(out)), videos, retry=True)
        assert digests(out) == second


def test_a_retry_half_removed_by_an_earlier_release_is_not_continued(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    run(Storage(str(out)), videos)
    (out / "progress-train").mkdir()
    (out / "progress-train" / "base-manifest.json").write_bytes((out / "dataset-train.json").read_bytes())
    add(videos, NAMES)
    run(Storage(str(out)), videos, retry=True)
    assert pq.read_table(out / "rejects-train.parquet").num_rows == 0
    assert sorted(pq.read_table(out / "index-train.parquet")["source"].to_pylist()) == sorted(NAMES)
