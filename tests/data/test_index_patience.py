"""Manifest and index behind a store that fails for a moment: no worker is lost, and no look at the store waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist import storage as storage_module
from arvideo_dist.data.index import load_manifest, open_index
from arvideo_dist.storage import Storage
from tests.services.relays import CutOff, Requests
from tests.services.s3 import S3


@pytest.fixture(scope="module")
def in_s3(dataset: Storage, s3: S3) -> str:
    """Path of the data set in a store."""
    s3.make_bucket("index-patience")
    s3.put(dataset, "index-patience/set")
    return "index-patience/set"


@pytest.fixture
def relay(s3: S3) -> Iterator[CutOff]:
    relay = CutOff(s3.address)
    yield relay
    relay.close()


@pytest.mark.parametrize("at", ["read_bytes", "local_copy"])
def test_a_store_that_fails_while_a_worker_reads_the_index_loses_no_worker(
    s3: S3, in_s3: str, relay: CutOff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    remote = Storage(s3.uri(in_s3, through=relay.address))
    with ExitStack() as outage:
        original = getattr(Storage, at)

        def cut_first(self: Storage, *names: Any) -> Any:
            if self is remote and not relay.refused:
                outage.enter_context(relay.cut())
            return original(self, *names)

        monkeypatch.setattr(Storage, at, cut_first)
        # The pause after a try.
        monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: outage.close())
        index = open_index(remote, "train", tmp_path)
    assert relay.refused
    assert len(index) == load_manifest(Storage(s3.uri(in_s3)), "train").samples


def test_the_processes_of_a_node_fetch_the_index_once(s3: S3, in_s3: str, tmp_path: Path) -> None:
    relay = Requests(s3.address)
    remote = Storage(s3.uri(in_s3, through=relay.address))
    together = threading.Barrier(8)

    def open_with_others() -> int:
        manifest = load_manifest(remote, "train")
        together.wait()
        return len(open_index(remote, "train", tmp_path, manifest))

    with ThreadPoolExecutor(8) as processes:
        opened = [processes.submit(open_with_others) for _ in range(8)]
    assert [each.result() for each in opened] == [11] * 8
    assert relay.seen.count(f"GET /{remote.path('index-train.parquet')}") == 1
    relay.close()


def test_a_look_at_a_store_that_is_away_is_answered_after_one_try(
    s3: S3, in_s3: str, relay: CutOff, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_module.time, "sleep", pauses.append)
    with relay.cut(), pytest.raises(OSError, match="NETWORK_CONNECTION"):
        load_manifest(Storage(s3.uri(in_s3, through=relay.address)), "train", patience_s=0.0)
    assert pauses == []


def test_a_missing_manifest_is_an_answer_also_to_the_patient(
    s3: S3, in_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_module.time, "sleep", pauses.append)
    with pytest.raises(ValueError, match="splits found there: train"):
        load_manifest(Storage(s3.uri(in_s3)), "absent")
    assert pauses == []
