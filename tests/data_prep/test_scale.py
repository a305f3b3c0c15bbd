"""Large sets: rows stay out of memory, and the store is asked by listings."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from werkzeug.serving import WSGIRequestHandler

from arvideo_dist.data.index import ShardEntry
from arvideo_dist.storage import PatientStorage, Storage
from data_prep import datasets, folder, lists
from data_prep import prepare as prepare_module
from data_prep import table as table_module
from data_prep.items import DUPLICATE, Inputs, Item, shuffled
from data_prep.ledger import Ledger
from data_prep.prepare import prepare
from data_prep.shards import SliceRecord
from data_prep.table import ItemTable, temporary_database
from tests.data_prep.runs import prepare as prepare_command
from tests.data_prep.test_datasets import touch
from tests.data_prep.test_kill_points import SETTINGS, Instant
from tests.services.s3 import S3

ROWS = 1500
SLICES = 30


def annotated(top: Path) -> list[Any]:
    """Calls that read `ROWS` inputs each, of the sources that can be large."""
    names = [f"{number:011x}_{number % 90:06d}_{number % 90 + 10:06d}" for number in range(ROWS)]
    touch(top / "videos", *(f"{place % 7}/{name}.mp4" for place, name in enumerate(names)))
    rows = (
        f"label {place % 5},{name[:11]},{place % 90},{place % 90 + 10}" for place, name in enumerate(names)
    )
    (top / "rows.csv").write_text("\n".join(("label,youtube_id,time_start,time_end", *rows)))
    (top / "list.txt").write_text(
        "".join(f"{place % 7}/{name}.mp4 {place % 5}\n" for place, name in enumerate(names))
    )
    videos = str(top / "videos")
    return [
        lambda: datasets.kinetics("kinetics400", str(top / "rows.csv"), videos, None),
        lambda: lists.listed(str(top / "list.txt"), videos, None),
        lambda: folder.read(videos, labels_from_folders=True),
    ]


@pytest.mark.parametrize("source", [0, 1, 2])
def test_inputs_take_no_memory_for_their_rows(tmp_path: Path, source: int) -> None:
    read = annotated(tmp_path)[source]
    read()  # what is made once: caches, modules
    tracemalloc.start()
    try:
        inputs = read()
        order = shuffled(inputs.items, 0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(order) == len(inputs.items) == ROWS
    assert sum(item.path is not None for item in order) == ROWS
    assert kept / ROWS < 40, "eight bytes a row for the order, and little else"
    assert peak / ROWS < 150


def test_what_became_of_them_takes_none_either() -> None:
    row = {"key": "k", "shard": "s", "offset": 0, "size": 1, "sha256": "0" * 64, "width": 1, "height": 1}
    row |= {"fps": 1.0, "frames": 1, "duration": 1.0, "label": 0, "label_name": "run"}
    Ledger().add(0, SliceRecord(shard=None, rows=[row | {"source": "x"}], rejects=[]))  # imports
    ledger = Ledger()
    pool = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for number in range(100):
            rows = [row | {"source": f"{number}/{place}"} for place in range(100)]
            shard = ShardEntry(name=f"{number}", size=1, sha256="0" * 64, samples=100)
            ledger.add(number, SliceRecord(shard=shard, rows=rows, rejects=[(f"r{number}", "damaged: x")]))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (kept + pa.total_allocated_bytes() - pool) / 10_000 < 20
    assert (ledger.samples, ledger.rejects) == (10_000, 100)
    sources = [name for table in ledger.index() for name in table["source"].to_pylist()]
    assert sources == [f"{number}/{place}" for number in range(100) for place in range(100)]
    rejects = [name for table in ledger.rejected() for name in table["source"].to_pylist()]
    assert rejects == sorted(f"r{number}" for number in range(100))


def test_order_and_digest_do_not_depend_on_how_inputs_are_kept() -> None:
    """So a split that an earlier release began is continued."""
    extras = ({}, {"caption": 'a "b"\nü'}, {"boxes": ["902,0.1,0.1,0.2,0.2,3,1"], "video_start": 0.1})
    items = [
        Item(f"video {number % 90}", label=number % 4 - 1, label_name="é", extra=extras[number % 3], path="x")
        for number in range(100)
    ]
    table = ItemTable(items)

    def digest(item: Item) -> tuple[str, str]:
        return hashlib.sha256(f"7/{item.source}".encode()).hexdigest(), item.source

    assert [item.source for item in shuffled(table, 7)] == [item.source for item in sorted(items, key=digest)]
    assert [item.label for item in shuffled(table, 7)] == [item.label for item in sorted(items, key=digest)]
    assert Inputs(table, [], {}).digest() == Inputs(items, [], {}).digest()
    assert [item.reason for item in table] == [None] * 90 + [DUPLICATE] * 10
    assert table[99] == list(table)[-1] == table[-1]
    assert table[3:5] == list(table)[3:5]


def test_a_full_temporary_folder_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small() -> sqlite3.Connection:
        base = temporary_database()
        base.execute("pragma max_page_count = 8")
        return base

    monkeypatch.setattr(table_module, "temporary_database", small)
    touch(tmp_path / "videos", *(f"{number}.mp4" for number in range(500)))
    assert (
        prepare_command(monkeypatch, "folder", "--videos", tmp_path / "videos", "--out", tmp_path / "out")
        == 1
    )
    said = capsys.readouterr().err
    assert "database or disk is full; let TMPDIR name a folder with more room" in said


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that the S3 server has answered, by method."""
    seen: Counter[str] = Counter()

    def count(handler: WSGIRequestHandler, *_: object) -> None:
        seen[str(handler.command)] += 1

    monkeypatch.setattr(WSGIRequestHandler, "log_request", count)
    return seen


def test_a_slice_costs_two_requests_and_resuming_it_two(
    s3: S3, tmp_path: Path, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.make_bucket("slices")
    storage = PatientStorage(s3.uri("slices/one"))
    videos = touch(tmp_path, *(f"{number}.mp4" for number in range(2 * SLICES)))
    items = [Item(f"{number}.mp4", path=str(videos / f"{number}.mp4")) for number in range(2 * SLICES)]

    @contextlib.contextmanager
    def executor() -> Iterator[Instant]:
        yield Instant(storage)

    def run() -> None:
        prepare(Inputs(items, [], {}), storage, "train", SETTINGS, executor)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", lambda *_: (None, None))
        run()
    assert len(storage.names()) == SLICES + 1
    assert asked.total() <= 2 * SLICES + 12, asked  # the shard and its record
    asked.clear()
    run()
    # Listings, the records (which the client may ask for twice: head and content), and what is published.
    assert asked.total() <= 2 * SLICES + 25, asked
    table = pq.read_table(pa.BufferReader(storage.read_bytes("index-train.parquet")))
    assert sorted(table["source"].to_pylist()) == sorted(item.source for item in items)


def test_one_listing_tells_names_and_sizes(s3: S3, tmp_path: Path, asked: Counter[str]) -> None:
    s3.make_bucket("sizes")
    for storage in (Storage(str(tmp_path)), Storage(s3.uri("sizes/one"))):
        assert storage.sizes("absent") == {}
        storage.write_bytes("a", b"xyz")
        storage.write_bytes("below/b", b"")
        asked.clear()
        assert storage.sizes() == {"a": 3}
        assert storage.sizes("below") == {"b": 0}
    assert asked.total() == 2


def test_large_files_still_go_up_in_parts(s3: S3, tmp_path: Path, asked: Counter[str]) -> None:
    s3.make_bucket("parts")
    storage = Storage(s3.uri("parts/one"))
    content = bytes(range(256)) * (12 * 2**12)
    (tmp_path / "large").write_bytes(content)
    storage.put_file(tmp_path / "large", "large")
    assert asked["POST"] == 2
    assert hashlib.sha256(storage.read_bytes("large")).digest() == hashlib.sha256(content).digest()
