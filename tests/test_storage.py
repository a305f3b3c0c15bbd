"""The one door to files: a name shows the whole content or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_dist.storage import Storage


def test_a_member_appears_only_after_a_clean_end(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.writing("folder/member") as aside:
        aside.write_bytes(b"whole")
        assert storage.names("folder") == [aside.name]
    assert storage.read_bytes("folder/member") == b"whole"

    def die_while_writing() -> None:
        with storage.writing("folder/member") as aside:
            aside.write_bytes(b"ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_while_writing()
    assert storage.read_bytes("folder/member") == b"whole"
    assert storage.names("folder") == ["member"]


def test_nothing_is_published_where_nothing_was_written(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.writing("member"):
        pass
    assert storage.names() == []


def test_leftovers_of_killed_writers_are_cleared_by_name(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for name in (
        ".train-000000.tar.0f.partial",
        ".index-train.parquet.0f.partial",
        ".val-000000.tar.0f.partial",
    ):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "train-000001.tar").write_bytes(b"whole")
    storage.clear_partial("train-", "index-train.parquet.")
    assert storage.names() == [".val-000000.tar.0f.partial", "train-000001.tar"]
