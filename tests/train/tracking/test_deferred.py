"""What a run's storage does not take waits in order, and a flush ends only once all of it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.train.tracking.deferred import DeferredWrites
from tests.services.s3 import S3


class FailingStorage(Storage):
    """Takes nothing while it is told to fail; keeps the names of what was written, in order."""

    fails = False

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.written: list[str] = []

    def _before_change(self) -> None:
        if self.fails:
            raise OSError("No space left on device")

    def write_bytes(self, name: str, data: bytes) -> None:
        super().write_bytes(name, data)
        self.written.append(name)

    def append(self, name: str, content: bytes) -> None:
        super().append(name, content)
        self.written.append(name)


def test_what_waits_is_written_in_order_by_the_next_write_that_the_storage_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FailingStorage(str(tmp_path))
    deferred = DeferredWrites(run)
    run.fails = True
    deferred.put("b", b"old")
    deferred.append("a.jsonl", b"1\n")
    deferred.put("c", b"c")
    deferred.put("b", b"new")
    assert (
        f"b, a.jsonl, c: not written to {run.uri} yet, tried again later: No space" in capsys.readouterr().out
    )
    with pytest.raises(OSError, match="No space"):
        deferred.flush()
    assert run.names() == []
    run.fails = False
    deferred.append("a.jsonl", b"2\n")
    assert run.written == ["b", "a.jsonl", "c"]
    assert [run.read_bytes(name) for name in run.written] == [b"new", b"1\n2\n", b"c"]
    deferred.flush()
    assert len(run.written) == 3
    assert capsys.readouterr().out == ""


def test_in_object_storage_lines_wait_for_a_flush_and_make_numbered_files(s3: S3) -> None:
    s3.make_bucket("deferred")
    run = Storage(s3.uri("deferred"))
    deferred = DeferredWrites(run)
    for lines in (b"12", b"34"):
        for line in lines:
            deferred.append("audit/rank-00000.jsonl", b"%c\n" % line)
        deferred.flush()
    assert run.names("audit") == ["rank-00000.000000.jsonl", "rank-00000.000001.jsonl"]
    assert run.read_bytes("audit/rank-00000.000001.jsonl") == b"3\n4\n"


def test_a_flush_includes_what_others_keep_back(tmp_path: Path) -> None:
    kept = [b"entry"]

    def flush_outbox() -> None:
        if kept:
            raise OSError("the outbox cannot be written")

    deferred = DeferredWrites(Storage(str(tmp_path)), [flush_outbox])
    deferred.put("note", b"note")
    with pytest.raises(OSError, match="outbox"):
        deferred.flush()
    kept.clear()
    deferred.flush()
