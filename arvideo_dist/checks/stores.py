"""What a machine must reach: the run's storage, the data set, the tracking server."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from arvideo_dist.checks.finding import Finding, Level, of_os_error
from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.data import TrainDataConfig
from arvideo_dist.config.sources import data_sets, validation_source
from arvideo_dist.data.index import DatasetManifest, FileEntry, load_manifest, manifest_name
from arvideo_dist.storage import Storage, shown

_SAMPLE = 8  # shards that a quick look takes, spread over the split
_LOOKS_AT_ONCE = 16
_NAMED = 5  # shards at fault that a message lists
_HTTP_TIMEOUT_S = 10.0


def scratch_folder(config: RunConfig) -> Storage:
    """Where a run's storage is tried: in the run's folder if there is one (its owner may be another), else above
    it, so that a look leaves no folder behind."""
    above = Storage(config.run.storage_path)
    return above.child(config.run.name) if above.exists(config.run.name) else above


def check_storage(config: RunConfig, size: int) -> Finding:
    """Write a file of `size` bytes on the run's storage, read it back, delete it."""
    remedy = (
        f"check run.storage_path {shown(config.run.storage_path)} on this machine: that it is mounted or that the "
        "credentials and endpoint of the store are in its environment, and that it may be written"
    )
    data, name = os.urandom(size), f".preflight-{uuid.uuid4().hex}"
    try:
        folder = scratch_folder(config)
        try:
            began = time.perf_counter()
            folder.write_bytes(name, data)
            written = time.perf_counter()
            back = folder.read_bytes(name)
            read = time.perf_counter()
        finally:
            folder.delete(name)
    except OSError as error:
        return of_os_error("storage", error, remedy)
    except ValueError as error:
        return Finding("storage", Level.ERROR, str(error))
    if back != data:
        return Finding(
            "storage",
            Level.ERROR,
            f"{folder.uri} gave back {len(back)} other bytes than the {size} that were written: do not train on it",
        )
    speed = ""
    if size >= 2**20:
        speed = (
            f", {size / 1e6 / (written - began):.0f} MB/s out, {size / 1e6 / (read - written):.0f} MB/s in"
        )
    return Finding("storage", Level.OK, f"{folder.uri}: {size} bytes written and read back{speed}")


def check_shared(folder: Storage, name: str, who: str) -> Finding:
    """This machine sees the file `name` that `who` wrote."""
    try:
        seen = folder.exists(name)
    except OSError as error:
        return of_os_error("storage shared", error, f"check {folder.uri} on this machine")
    if not seen:
        return Finding(
            "storage shared",
            Level.ERROR,
            f"this machine does not see {folder.uri}/{name}, which {who} wrote: run.storage_path must be the same "
            "shared file system on all nodes, or a URI (s3://...)",
        )
    return Finding("storage shared", Level.OK, f"sees what {who} wrote")


@dataclass(frozen=True)
class Split:
    """A split that the run reads."""

    storage: Storage
    name: str
    purpose: str


def splits(config: RunConfig) -> list[Split]:
    """Raises ValueError if a path is not set or cannot be opened."""
    found = [Split(storage, split, "training") for storage, split in data_sets(config.data)]
    if isinstance(config.data, TrainDataConfig) and (source := validation_source(config.data)) is not None:
        found.append(Split(source.storage, source.split, "validation"))
    return found


def check_data(config: RunConfig, *, share: tuple[int, int] | None = None) -> list[Finding]:
    """Each split's manifest, its index, and shards by their sizes: a sample spread over the split, or with
    `share` (i, n) the i-th of n parts of all of them."""
    try:
        return [_check_split(split, share) for split in splits(config)]
    except OSError as error:
        return [of_os_error("data", error, "check data.path, and that it can be reached from this machine")]
    except ValueError as error:
        return [Finding("data", Level.ERROR, str(error))]


def manifest_digests(config: RunConfig) -> list[str]:
    """sha256 of each manifest's bytes: whether two machines read the same data set. Raises OSError, ValueError."""
    return [
        hashlib.sha256(split.storage.read_bytes(manifest_name(split.name))).hexdigest()
        for split in splits(config)
    ]


def _check_split(split: Split, share: tuple[int, int] | None) -> Finding:
    at = f"{split.storage.uri}, split {split.name}"
    try:
        manifest = load_manifest(split.storage, split.name, patience_s=0.0)
        counted = sum(shard.samples for shard in manifest.shards)
        if not manifest.samples or counted != manifest.samples:
            return Finding(
                "data",
                Level.ERROR,
                f"{at}: the manifest's shards have {counted} samples together, it promises {manifest.samples}: "
                "prepare the split again",
            )
        looked: Sequence[FileEntry] = [manifest.index, *_chosen(manifest, share)]
        missing, wrong = _wrong(split.storage, looked)
    except ValueError as error:
        return Finding("data", Level.ERROR, str(error))
    except OSError as error:
        return of_os_error("data", error, f"check that {at} can be reached from this machine")
    if faults := missing + wrong:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        return Finding(
            "data",
            Level.ERROR,
            f"{at}: {'; '.join(faults[:_NAMED])}{more}. Copy the data set again, or prepare it again; "
            f"`python -m data_prep verify {split.storage.uri} --split {split.name}` reads all of it",
            passing=not wrong,  # what is not there may come back
        )
    return Finding(
        "data",
        Level.OK,
        f"{split.purpose}: {at}: {manifest.samples} samples, {len(looked) - 1} of {len(manifest.shards)} shards "
        "looked at",
    )


def _chosen(manifest: DatasetManifest, share: tuple[int, int] | None) -> Sequence[FileEntry]:
    if share is not None:
        part, parts = share
        return manifest.shards[part::parts]
    last = len(manifest.shards) - 1
    numbers = sorted({round(last * i / (_SAMPLE - 1)) for i in range(_SAMPLE)})
    return [manifest.shards[number] for number in numbers]


def _wrong(storage: Storage, entries: Sequence[FileEntry]) -> tuple[list[str], list[str]]:
    """What is missing, and what has another size than the manifest says."""

    def size(entry: FileEntry) -> int | None:
        try:
            return storage.size(entry.name)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:
        sizes = list(zip(entries, threads.map(size, entries), strict=True))
    missing = [f"{entry.name} is missing" for entry, found in sizes if found is None]
    wrong = [
        f"{entry.name} has {found} bytes, the manifest says {entry.size}"
        for entry, found in sizes
        if found is not None and found != entry.size
    ]
    return missing, wrong


def check_mlflow(uri: str) -> Finding:
    """The tracking server or database answers this machine."""
    if uri.startswith(("http://", "https://")):
        return _check_server(uri)
    if uri.startswith("sqlite:///"):
        return _check_sqlite(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        return Finding(
            "mlflow",
            Level.ERROR,
            f"{shown(uri)}: {shown(error)}: check tracking.uri",
            passing=True,
            away=True,
        )
    return Finding("mlflow", Level.OK, f"{shown(uri)} answers")


def _check_server(uri: str) -> Finding:
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    def error(message: str, *, away: bool = False) -> Finding:
        return Finding("mlflow", Level.ERROR, f"{shown(uri)} {message}", passing=away, away=away)

    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            max_retries=0,
            timeout=_HTTP_TIMEOUT_S,
            raise_on_status=False,
            json={"max_results": 1},
        )
    except MlflowException as failure:  # wraps what requests raised
        cause = failure.__cause__ or failure.__context__
        # An answer that does not come arrives as a ConnectionError that says so.
        if isinstance(cause, requests.exceptions.Timeout) or "timed out" in str(cause):
            message = (
                f"does not answer within {_HTTP_TIMEOUT_S:g} s: check tracking.uri, and the server's load"
            )
            return error(message, away=True)
        if isinstance(cause, requests.exceptions.ConnectionError):
            return error(
                "cannot be reached: check tracking.uri, that the server runs (in Kubernetes: kubectl -n arvideo "
                "get pods -l app.kubernetes.io/name=mlflow) and that network policies let this machine through",
                away=True,
            )
        return error(f"cannot be asked ({shown(failure)}): check tracking.uri")
    host = urlsplit(uri).netloc.rpartition("@")[2]
    if answer.status_code == 403 and "host header" in answer.text.lower():
        return error(
            f"refuses the Host header {host!r} (403): start it with --allowed-hosts that names {host} "
            "(k8s/30-mlflow.yaml), or set tracking.uri to a name that it accepts"
        )
    if answer.status_code in (401, 403):
        return error(
            f"refuses access ({answer.status_code}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            f"MLFLOW_TRACKING_TOKEN, on driver and workers; if it is started with --allowed-hosts, name {host}"
        )
    if answer.status_code != 200:
        return error(
            f"answers {answer.status_code} to experiments/search: check tracking.uri, and the server's log",
            away=answer.status_code >= 500 or answer.status_code in (408, 429),
        )
    return Finding("mlflow", Level.OK, f"{shown(uri)} answers")


def _check_sqlite(uri: str) -> Finding:
    """The database can be read, and written but for a lock; a new one's folder exists."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.exists():
        return Finding("mlflow", Level.OK, f"{uri}: made at the first start")
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_HTTP_TIMEOUT_S)
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            database.rollback()
        finally:
            database.close()
    except sqlite3.OperationalError as error:  # locked, not writable, no such folder
        message = f"{uri}: {error}: check tracking.uri and the file's rights"
        return Finding("mlflow", Level.ERROR, message, passing=True, away="locked" in str(error))
    except sqlite3.DatabaseError as error:
        return Finding(
            "mlflow", Level.ERROR, f"{uri}: {error}: move the file away, or set tracking.uri to another"
        )
    return Finding("mlflow", Level.OK, f"{uri} can be written")
