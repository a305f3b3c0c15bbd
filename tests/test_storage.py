"""The one door to files: a name shows the whole content or nothing."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

import arvideo_dist.storage as storage_module
from arvideo_dist.s3 import S3Reader
from arvideo_dist.storage import Storage, is_missing, lasts, patiently, shown, without_credentials
from tests.services.relays import CutOff, CutsAnswers, RefusesOthers, RefusesWrites, Requests
from tests.services.s3 import S3


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


@pytest.mark.parametrize("size", [10, 30 * 2**20], ids=["one-put", "multipart"])
def test_a_store_that_refuses_new_content_keeps_the_old(s3: S3, tmp_path: Path, size: int) -> None:
    relay, bucket = RefusesWrites(s3.address), f"refuses-{size}"
    s3.make_bucket(bucket)
    storage = Storage(s3.uri(f"{bucket}/folder", through=relay.address))
    old, new = b"o" * size, tmp_path / "new"
    new.write_bytes(b"n" * size)
    storage.write_bytes("member", old)
    relay.refuses = True
    with pytest.raises(OSError, match="bucket is full"):
        storage.write_bytes("member", new.read_bytes())
    with pytest.raises(OSError, match="bucket is full"):
        storage.put_file(new, "member")
    relay.refuses = False
    assert relay.refused
    assert storage.read_bytes("member") == old
    storage.put_file(new, "member")
    assert storage.read_bytes("member") == new.read_bytes()
    relay.close()


def test_an_empty_file_is_a_member_too(s3: S3, tmp_path: Path) -> None:
    s3.make_bucket("empty")
    storage = Storage(s3.uri("empty/folder"))
    (tmp_path / "empty").touch()
    storage.put_file(tmp_path / "empty", "member")
    assert storage.size("member") == 0


def test_a_stream_that_is_left_by_an_exception_publishes_nothing(s3: S3) -> None:
    s3.make_bucket("streams")
    storage = Storage(s3.uri("streams/folder"))

    def die_while_writing() -> None:
        with storage.streaming("member") as file:
            file.write(b"ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_while_writing()
    assert not storage.exists("member")


def test_credentials_in_an_address_open_the_store_and_are_not_shown(s3: S3) -> None:
    s3.make_bucket("secrets")
    storage = Storage(s3.uri("secrets/folder")).child("below")
    assert storage.address.startswith("s3://test:test@secrets/folder/below?")
    assert storage.uri.startswith("s3://***@secrets/folder/below?")
    storage.write_bytes("member", b"content")
    assert Storage(storage.address).read_bytes("member") == b"content"
    config = {"run": {"storage_path": storage.address, "keep_last": 2}, "list": ["http://me:secret@host/x"]}
    cleaned = {"run": {"storage_path": storage.uri, "keep_last": 2}, "list": ["http://***@host/x"]}
    assert without_credentials(config) == cleaned


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://AKIA:ab/cd+e@bucket/x", "s3://***@bucket/x"),
        ("postgresql://u:p@ss/w@host/db", "postgresql://***@host/db"),
        ("request to http://me:pw@host:5000/api failed", "request to http://***@host:5000/api failed"),
        ("abfs://box@host/x?sv=2024&sig=a%2Fb&se=1", "abfs://***@host/x?sv=2024&sig=***&se=1"),
        ("gs://b/x?client_secret=abc", "gs://b/x?client_secret=***"),
        ("s3://bucket/a@b?region=eu", "s3://bucket/a@b?region=eu"),
        ("http://host:5000/api", "http://host:5000/api"),
    ],
)
def test_no_secret_of_an_address_is_shown(text: str, clean: str) -> None:
    assert shown(text) == clean


def test_an_address_that_cannot_be_read_is_named_without_its_secret() -> None:
    with pytest.raises(ValueError, match="cannot open storage") as refused:
        Storage("s3://AKIA:se/cret@bucket/x")
    assert "cret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_slash_at_the_end_of_an_address_changes_nothing(s3: S3) -> None:
    s3.make_bucket("slashes")
    with_slash = Storage(s3.uri("slashes/folder/"))
    with_slash.child("below").write_bytes("member", b"content")
    assert Storage(s3.uri("slashes/folder")).read_bytes("below/member") == b"content"


@pytest.fixture
def requests(s3: S3) -> Iterator[Requests]:
    relay = Requests(s3.address)
    yield relay
    relay.close()


@pytest.fixture
def counted(s3: S3, requests: Requests, request: pytest.FixtureRequest) -> Storage:
    """A folder in a bucket of its own, behind the relay."""
    bucket = f"counted-{zlib.crc32(request.node.name.encode())}"
    s3.make_bucket(bucket)
    return Storage(s3.uri(f"{bucket}/folder", through=requests.address))


def test_a_read_is_one_request_and_so_is_a_small_members_publication(
    counted: Storage, requests: Requests
) -> None:
    content = bytes(range(256))
    counted.write_bytes("a member.tar", content)
    assert counted.read_bytes("a member.tar") == content
    assert counted.read_range("a member.tar", 10, 100) == content[10:110]
    assert counted.read_range("a member.tar", 200, 100) == content[200:], "fewer where the member ends"
    key = f"/{counted.path('a member.tar')}".replace(" ", "%20")
    assert requests.seen == [f"PUT {key}", f"GET {key}", f"GET {key}", f"GET {key}"]
    assert counted.read_range("a member.tar", 256, 10) == b"", "nothing behind its end"


def test_a_missing_member_and_a_store_that_is_away_are_told_apart(counted: Storage, s3: S3) -> None:
    relay = CutOff(s3.address)
    away = Storage(s3.uri(counted.root, through=relay.address))
    away.write_bytes("member", b"content")
    for storage in (counted, away):
        with pytest.raises(FileNotFoundError, match="folder/absent"):
            storage.read_bytes("absent")
        with pytest.raises(FileNotFoundError, match="folder/absent"):
            storage.read_range("absent", 0, 5)
    with relay.cut(), pytest.raises(OSError, match="NETWORK_CONNECTION") as cut:
        away.read_range("member", 0, 5)
    assert not is_missing(cut.value)
    assert not lasts(cut.value)
    assert away.read_range("member", 0, 5) == b"conte"
    relay.close()


def test_a_store_that_does_not_take_the_projects_own_requests_is_read_through_pyarrow(s3: S3) -> None:
    """As where it wants another signature: pyarrow's client knows more ways, and asks twice."""
    relay = RefusesOthers(s3.address)
    s3.make_bucket("refuses-others")
    storage = Storage(s3.uri("refuses-others/folder", through=relay.address))
    storage.write_bytes("member", b"content")
    for _ in range(5):
        assert storage.read_range("member", 0, 3) == b"con"
    assert relay.refused == 3, "then it is not tried again"


@pytest.mark.parametrize(
    ("options", "bucket", "url"),
    [
        ({}, "box", "https://box.s3.eu-west-1.amazonaws.com/a%20b/c%2Bd~e"),
        ({}, "box.org", "https://s3.eu-west-1.amazonaws.com/box.org/a%20b/c%2Bd~e"),
        ({"region": "cn-north-1"}, "box", "https://box.s3.cn-north-1.amazonaws.com.cn/a%20b/c%2Bd~e"),
        ({"endpoint_override": "host:9", "scheme": "http"}, "box", "http://host:9/box/a%20b/c%2Bd~e"),
        ({"endpoint_override": "http://host:9/"}, "box", "http://host:9/box/a%20b/c%2Bd~e"),
        (
            {"endpoint_override": "host", "force_virtual_addressing": True},
            "box",
            "https://box.host/a%20b/c%2Bd~e",
        ),
    ],
)
def test_an_object_is_asked_for_where_pyarrows_client_would(
    options: dict[str, Any], bucket: str, url: str
) -> None:
    fs = S3FileSystem(**({"region": "eu-west-1", "anonymous": True} | options))
    assert S3Reader(fs).url(f"{bucket}/a b/c+d~e") == url


def test_an_answer_that_is_cut_off_is_no_short_read(counted: Storage, s3: S3) -> None:
    """A worker would take fewer bytes than it asked for as the sample's fault."""
    relay = CutsAnswers(s3.address)
    storage = Storage(s3.uri(counted.root, through=relay.address))
    content = bytes(range(256)) * 4000
    storage.write_bytes("member", content)
    relay.cut = 1
    assert storage.read_range("member", 0, len(content)) == content
    assert relay.cut == 0
    relay.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_not_waited_for(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError(number, "disk")

    monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(OSError, match="disk"):
        patiently(fails)
