"""Storage, data set and tracking server: what is said when one of them is not as a run needs it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from arvideo_dist.checks.finding import Finding, Level, retried
from arvideo_dist.checks.stores import (
    check_data,
    check_mlflow,
    check_shared,
    check_storage,
    manifest_digests,
)
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data.index import manifest_name
from arvideo_dist.storage import Storage
from tests.data.conftest import FRAMES, write_dataset
from tests.services.mlflow_server import await_port, new_database
from tests.services.s3 import S3


def _config(storage: str = "runs", **data: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"run": {"name": "run", "storage_path": storage}, "data": {"val_split": None, **data}}
    )


def _error(finding: Finding) -> str:
    assert finding.level is Level.ERROR, finding
    return finding.message


# Storage


def test_storage_that_gives_back_what_was_written_is_left_as_it_was(tmp_path: Path) -> None:
    found = check_storage(_config(str(tmp_path)), 2**20)
    assert found.level is Level.OK
    assert "1048576 bytes written and read back" in found.message
    assert list(tmp_path.iterdir()) == []


def test_storage_path_through_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = check_storage(_config(f"{tmp_path}/file/runs"), 100)
    assert _error(found).startswith("Not a directory: check run.storage_path")
    assert not found.passing, "no time mends it"


def test_read_only_storage_is_named_as_such(tmp_path: Path) -> None:
    tmpfs = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(tmpfs, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        found = check_storage(_config(str(tmp_path)), 100)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "Read-only file system" in _error(found)
    assert "that it may be written" in found.message


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    s3.make_bucket("stores")
    return "stores"


def test_object_storage_is_written_read_and_cleared(s3: S3, bucket: str) -> None:
    config = _config(s3.uri(f"{bucket}/folder"))
    assert check_storage(config, 100).level is Level.OK
    assert Storage(config.run.storage_path).names() == []


def test_missing_bucket_is_an_error_at_once(s3: S3) -> None:
    found = check_storage(_config(s3.uri("absent/folder")), 100)
    assert "NO_SUCH_BUCKET" in _error(found) or "does not exist" in found.message
    assert not found.passing


def test_store_that_does_not_answer_may_come_back() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    found = check_storage(_config(S3(f"127.0.0.1:{closed}").uri("stores/folder")), 100)
    assert "check run.storage_path" in _error(found)
    assert found.passing


def test_storage_that_another_machine_does_not_see_is_not_shared(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    folder.write_bytes("mark", b"")
    assert check_shared(folder, "mark", "the driver").level is Level.OK
    message = _error(check_shared(Storage(str(tmp_path / "other")), "mark", "the driver"))
    assert "which the driver wrote: run.storage_path must be the same shared file system" in message


# Data set


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A split of ten shards."""
    write_dataset(tmp_path / "data", [b"x"] * 10, [FRAMES[0]] * 10, per_shard=1)
    return tmp_path / "data"


def test_whole_data_set_passes_by_a_sample_and_by_shares(data: Path) -> None:
    config = _config(path=str(data))
    (quick,) = check_data(config)
    assert quick.level is Level.OK
    assert "10 samples, 8 of 10 shards looked at" in quick.message
    shares = [check_data(config, share=(part, 3))[0].message for part in range(3)]
    assert [int(m.split(" samples, ")[1].split()[0]) for m in shares] == [4, 3, 3]


@pytest.mark.parametrize("share", [None, (0, 1)])
def test_missing_shard_is_named_with_the_remedy(data: Path, share: tuple[int, int] | None) -> None:
    (data / "train-000000.tar").unlink()
    (found,) = check_data(_config(path=str(data)), share=share)
    assert "train-000000.tar is missing. Copy the data set again" in _error(found)
    assert f"python -m data_prep verify {data} --split train" in found.message


def test_every_shard_is_in_one_workers_share(data: Path) -> None:
    (data / "train-000004.tar").unlink()
    levels = [check_data(_config(path=str(data)), share=(part, 3))[0].level for part in range(3)]
    assert levels == [Level.OK, Level.ERROR, Level.OK]


def test_shard_of_another_size_than_the_manifests_is_named(data: Path) -> None:
    shard = data / "train-000009.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 512)
    (found,) = check_data(_config(path=str(data)))
    assert f"train-000009.tar has {size - 512} bytes, the manifest says {size}" in _error(found)
    assert not found.passing


def test_index_of_another_size_is_named(data: Path) -> None:
    with open(data / "index-train.parquet", "ab") as file:
        file.write(b"more")
    (found,) = check_data(_config(path=str(data)))
    assert "index-train.parquet has" in _error(found)


def _change_manifest(data: Path, **fields: Any) -> None:
    file = data / manifest_name("train")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_cut_manifest_is_refused(data: Path) -> None:
    file = data / manifest_name("train")
    os.truncate(file, file.stat().st_size // 2)
    (found,) = check_data(_config(path=str(data)))
    assert "dataset-train.json is not a data set manifest" in _error(found)


def test_manifest_of_another_version_is_refused(data: Path) -> None:
    _change_manifest(data, format_version=99)
    (found,) = check_data(_config(path=str(data)))
    assert "has format version 99, this release reads 1: prepare the data set again" in _error(found)


def test_manifest_that_contradicts_itself_is_refused(data: Path) -> None:
    _change_manifest(data, samples=11)
    (found,) = check_data(_config(path=str(data)))
    assert "shards have 10 samples together, it promises 11: prepare the split again" in _error(found)


def test_missing_split_and_unset_path_say_where_to_set_them(data: Path) -> None:
    (found,) = check_data(_config(path=str(data), split="test"))
    assert "dataset-test.json is missing (splits found there: train)" in _error(found)
    (found,) = check_data(_config())
    assert "data.path is not set" in _error(found)


def test_another_data_set_at_the_same_path_has_another_digest(data: Path) -> None:
    config = _config(path=str(data))
    before = manifest_digests(config)
    _change_manifest(data, fingerprint="0" * 64)
    assert manifest_digests(config) != before


# Tracking server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server that names only the host `mlflow` in --allowed-hosts, and this test's."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("mlflow")), "server", "--workers=1", "--host=127.0.0.1"),
            *(f"--port={port}", f"--allowed-hosts=mlflow:*,127.0.0.1:{port}"),
            *(
                f"--backend-store-uri={new_database(folder / 'mlflow.db')}",
                f"--artifacts-destination={folder}/files",
            ),
        ],
        cwd=folder,
        # Else it starts seven processes for work that nobody gives it.
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        await_port(process)
        # It may take seconds to be ready for it.
        first = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        first.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0")
        assert first.getresponse().status == 200
        first.close()
        yield port
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


def test_server_that_accepts_this_host_passes(server: int) -> None:
    assert check_mlflow(f"http://127.0.0.1:{server}").level is Level.OK


def test_server_that_does_not_allow_the_host_is_named_with_the_option(server: int) -> None:
    found = check_mlflow(f"http://localhost:{server}")
    assert f"refuses the Host header 'localhost:{server}' (403)" in _error(found)
    assert f"--allowed-hosts that names localhost:{server}" in found.message
    assert not found.passing


def test_server_that_is_not_there_may_come_back() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = check_mlflow(f"http://127.0.0.1:{port}")
    assert "cannot be reached: check tracking.uri" in _error(found)
    assert found.passing


def test_address_of_something_else_is_told_from_a_server(s3: S3) -> None:
    found = check_mlflow(f"http://{s3.address}")
    assert "to experiments/search: check tracking.uri" in _error(found)


def test_database_is_there_or_will_be_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert "made at the first start" in check_mlflow(uri).message
    MlflowClient(tracking_uri=uri).search_experiments()
    assert check_mlflow(uri).message == f"{uri} can be written"
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    assert "file is not a database: move the file away" in _error(check_mlflow(uri))


# Faults that pass


def test_only_what_may_pass_is_tried_again() -> None:
    said: list[str] = []
    away = Finding("storage", Level.ERROR, "no answer", passing=True)
    answers = iter([[away], [away], [Finding("storage", Level.OK, "there")]])
    assert retried(lambda: next(answers), said.append, (0.0, 0.0))[0].level is Level.OK
    assert said == ["storage: no answer; tried again in 0 s"] * 2
    lasting = [Finding("storage", Level.ERROR, "read-only")]
    assert retried(lambda: lasting, lambda line: pytest.fail(line)) == lasting
    assert retried(lambda: [away], said.append, ()) == [away]
