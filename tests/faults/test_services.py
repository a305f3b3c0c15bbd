"""What a run depends on fails for a while: the disk, the object store, the tracking server, a shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from tests.faults.runs import FAULT_AT, LAYOUTS, STEPS, Layout, write_run
from tests.services.disk import small_disk
from tests.services.mlflow_server import MlflowServer
from tests.services.relays import CutOff
from tests.services.s3 import S3

MINUTE = 60.0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_disk(folder: Path, survived: Callable[..., None], layout: Layout) -> None:
    """Room for the two checkpoints that are kept and the one that is written; then somebody else fills it."""
    name = f"full-disk-{layout}"
    # Saves are far apart and tried again soon, so that some fail before the disk is emptied.
    run = write_run(folder, str(folder / "data"), name, layout, run={"max_failed_saves": 50})
    checkpoints = Path(run.storage) / name / FOLDER
    with ExitStack() as mounted:
        try:
            mounted.enter_context(small_disk(checkpoints, size_mib=160))
        except OSError as error:
            pytest.skip(f"this process may not mount a small disk: {error}")
        command = run.start()
        command.read_until(FAULT_AT)
        filler = fill(checkpoints)
        assert "No space left" in command.read_until(r"checkpoint.*failed")
        whole = complete_checkpoints(run.folder)
        assert whole, "the checkpoints before it are still there"
        Checkpoint(run.folder, whole[-1]).verify()
        filler.unlink()
        assert command.finish() == 0, command.output
        survived(run, "disk full during saves")


def fill(folder: Path) -> Path:
    """The file that took all room of its disk."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))
    return filler


@pytest.mark.slow
def test_full_disk_as_workers_start_again(folder: Path, survived: Callable[..., None]) -> None:
    """All that a run keeps is on it, Ray Train's own bookkeeping and the lease among it."""
    layout = LAYOUTS[0]
    name = "full-disk-and-killed-rank"
    run = write_run(folder, str(folder / "data"), name, layout, run={"max_failed_saves": 50})
    with ExitStack() as mounted:
        try:
            mounted.enter_context(small_disk(Path(run.storage) / name, size_mib=200))
        except OSError as error:
            pytest.skip(f"this process may not mount a small disk: {error}")
        command = run.start()
        command.read_until(FAULT_AT)
        filler = fill(Path(run.storage) / name)
        command.worker(1).kill()
        command.read_until("start.json: not written to .*No space left")
        filler.unlink()
        assert command.finish() == 0, command.output
        survived(run, "SIGKILL of rank 1 while the disk is full")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_object_store_that_fails_for_a_minute(
    folder: Path,
    survived: Callable[..., None],
    s3: S3,
    layout: Layout,
) -> None:
    """Data and run are both in it."""
    relay, bucket = CutOff(s3.address), f"faults-{layout}"
    s3.make_bucket(bucket)
    s3.put(Storage(str(folder / "data")), f"{bucket}/data")
    data, runs = (s3.uri(f"{bucket}/{name}", through=relay.address) for name in ("data", "runs"))
    run = write_run(folder, data, f"store-{layout}", layout, storage=runs)
    command = run.start()
    command.read_until(FAULT_AT)
    with relay.cut():
        time.sleep(MINUTE)
    assert command.finish() == 0, command.output
    assert relay.refused, "somebody asked meanwhile"
    survived(run, "object store away for a minute")
    relay.close()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    yield server
    with suppress(ProcessLookupError):  # a test that failed may have left it killed
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tracking_server_that_is_away_for_a_minute(
    folder: Path, survived: Callable[..., None], tracking: MlflowServer, layout: Layout
) -> None:
    run = write_run(folder, str(folder / "data"), f"mlflow-{layout}", layout, tracking=tracking.uri)
    command = run.start()
    command.read_until(FAULT_AT)
    tracking.kill()
    back_at = time.monotonic() + MINUTE
    command.read_until("MLflow is away")
    for _ in range(2):  # steps end, and one of them began, while the server is away
        command.read_until(rf"step \d+/{STEPS}  loss")
    time.sleep(max(0.0, back_at - time.monotonic()))
    tracking.start()
    assert command.finish() == 0, command.output
    survived(run, "MLflow away for a minute")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shard_that_vanishes_and_comes_back(
    folder: Path, survived: Callable[..., None], layout: Layout
) -> None:
    data = folder / f"data-{layout}"
    data.mkdir()
    for file in (folder / "data").iterdir():
        if file.is_file():
            (data / file.name).hardlink_to(file)
    run = write_run(folder, str(data), f"shard-{layout}", layout)
    command = run.start()
    command.read_until(FAULT_AT)
    shards = list(data.glob("train-*.tar"))
    assert shards
    for shard in shards:
        shard.rename(shard.with_suffix(".away"))
    time.sleep(20)
    for shard in shards:
        shard.with_suffix(".away").rename(shard)
    assert command.finish() == 0, command.output
    survived(run, "shards gone for 20 s")
