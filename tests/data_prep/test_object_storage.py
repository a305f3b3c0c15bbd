"""Output to S3, served by moto: the same bytes as on disk, and never something that looks whole but is not."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import boto3
import pytest

from arvideo_dist.data.index import load_manifest, open_index
from arvideo_dist.storage import Storage
from data_prep import verify as verify_module
from tests.data_prep.runs import SMALL, digests, prepare
from tests.services.relays import CutOff
from tests.services.s3 import S3


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh bucket's folder."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=f"http://{s3.address}", region_name="us-east-1")
    client.create_bucket(Bucket="videos")
    for found in client.list_objects_v2(Bucket="videos").get("Contents", []):
        client.delete_object(Bucket="videos", Key=found["Key"])
    return f"s3://videos/sets/toy?endpoint_override={s3.address}&scheme=http&region=us-east-1"


def test_the_same_bytes_as_on_disk(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("synthetic", "--num-videos", 10, "--shard-size", 4, *SMALL)
    assert prepare(monkeypatch, *arguments, "--out", tmp_path / "disk") == 0
    assert prepare(monkeypatch, *arguments, "--out", bucket) == 0
    storage = Storage(bucket)
    stored = {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in storage.names()}
    assert stored == digests(tmp_path / "disk")
    index = open_index(storage, "train", tmp_path / "cache")
    row = index[9]
    video = storage.read_range(row.shard, row.offset, row.size)
    assert hashlib.sha256(video).hexdigest() == row.sha256
    assert prepare(monkeypatch, "verify", bucket, "--decode", "all") == 0
    assert prepare(monkeypatch, *arguments, "--out", bucket) == 0, "nothing left to do"


def test_an_upload_that_fails_leaves_nothing_whole_and_is_continued(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("synthetic", "--num-videos", 10, "--shard-size", 4, *SMALL)
    put_file, calls = Storage.put_file, []

    def failing(self: Storage, local: Path, name: str) -> None:
        calls.append(name)
        if len(calls) == 2:
            with self.streaming(name) as stream:
                stream.write(b"half a shard")
                raise OSError("When uploading: AWS Error ACCESS_DENIED: Access Denied")
        put_file(self, local, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_file", failing)
        assert prepare(patch, *arguments, "--out", bucket, "--workers", 1) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: When uploading")
    assert "run the same command again" in message
    storage = Storage(bucket)
    assert calls[1] not in storage.names()
    with pytest.raises(ValueError, match="no data set at"):
        load_manifest(storage, "train")
    assert prepare(monkeypatch, *arguments, "--out", bucket) == 0
    assert prepare(monkeypatch, *arguments, "--out", tmp_path / "disk") == 0
    assert {
        name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in storage.names()
    } == digests(tmp_path / "disk")


def test_staged_videos_of_a_killed_run_are_removed_and_those_of_a_running_one_are_not(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f"data-prep-{os.getpid()}-mine", "data-prep-notes"]
    for name in (*kept, f"data-prep-{ended.pid}-killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "video.mp4").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert prepare(monkeypatch, "synthetic", "--num-videos", 2, *SMALL, "--out", bucket) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


AWAY_S = 10.0  # several times what the store's client repeats a request by itself


def away(relay: CutOff) -> None:
    with relay.cut():
        threading.Event().wait(AWAY_S)


def test_a_store_that_is_away_for_a_while_costs_no_run(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = CutOff(s3.address)
    relayed = bucket.replace(s3.address, relay.address)
    arguments = ("synthetic", "--num-videos", 6, "--shard-size", 2, "--workers", 1, *SMALL)
    assert prepare(monkeypatch, *arguments, "--out", tmp_path / "disk") == 0
    outage = threading.Thread(target=away, args=(relay,))
    put_file, check_sample = Storage.put_file, verify_module._check_sample

    def put(self: Storage, local: Path, name: str) -> None:
        if outage.ident is None:
            put_file(self, local, name)
            outage.start()
        put_file(self, local, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_file", put)
        assert prepare(patch, *arguments, "--out", relayed) == 0
    outage.join()
    assert relay.refused
    storage = Storage(bucket)
    stored = {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in storage.names()}
    assert stored == digests(tmp_path / "disk")

    refused, outage = relay.refused, threading.Thread(target=away, args=(relay,))

    def check(*given: Any) -> list[str]:
        if outage.ident is None:
            outage.start()
        return check_sample(*given)

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "_check_sample", check)
        assert prepare(patch, "verify", relayed, "--workers", 1) == 0
    outage.join()
    assert relay.refused > refused


def test_a_bucket_that_is_not_there_is_one_clear_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = bucket.replace("s3://videos/", "s3://absent/")
    assert prepare(monkeypatch, "synthetic", "--num-videos", 2, *SMALL, "--out", absent) == 1
    said = capsys.readouterr().err
    assert "absent" in said
    assert "Traceback" not in said
