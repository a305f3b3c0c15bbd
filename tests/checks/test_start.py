"""The quick form at every start of a run: what stops a new run, and what does not stop one that goes on."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from arvideo_dist.checks import finding, machine, start
from arvideo_dist.checks.finding import Finding, Level
from arvideo_dist.checks.start import check_driver, check_run, check_workers_start
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.tracking.runs import RUN_FILE
from tests.data.conftest import FRAMES, write_dataset
from tests.services.disk import small_disk
from tests.train.distributed import run_ranks
from tests.train.runs import TINY


def _config(folder: Path, **sections: dict[str, Any]) -> PretrainConfig:
    merged = {**TINY, "run": {"name": "run", "storage_path": str(folder / "runs")}}
    merged["data"] = {"path": str(folder / "data"), "val_split": None, "workers": 1}
    return PretrainConfig.model_validate({**merged, **sections})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_dataset(tmp_path / "data", [b"x"] * 4, [FRAMES[0]] * 4, per_shard=1)
    monkeypatch.setattr(finding.time, "sleep", lambda seconds: None)
    return tmp_path


def _nowhere() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_driver_with_everything_in_place_says_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_driver(_config(folder))
    assert capsys.readouterr().out == ""


def test_missing_shard_stops_a_run_before_anything_is_written(folder: Path) -> None:
    (folder / "data" / "train-000002.tar").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)the run cannot start; mend:\n  data: .*train-000002.tar is missing"
    ):
        check_driver(_config(folder))
    assert not (folder / "runs").exists()


def test_storage_that_cannot_be_written_stops_a_run(folder: Path) -> None:
    (folder / "runs").write_text("a file where the storage should be")
    with pytest.raises(
        ValueError, match=r"mend:\n  storage: (File exists|Not a directory): check run.storage_path"
    ):
        check_driver(_config(folder))


def test_new_run_wants_its_tracking_server_and_one_that_goes_on_does_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(folder, tracking={"uri": _nowhere()})
    with pytest.raises(OSError, match=r"mlflow: http://127.0.0.1:\d+ cannot be reached"):
        check_driver(config)
    assert "tried again in" in capsys.readouterr().out
    Storage(config.run.storage_path).child("run").write_bytes(RUN_FILE, b"{}")
    check_driver(config)
    assert "warning: mlflow: http://127.0.0.1:" in capsys.readouterr().out


def _start_ranks(config: PretrainConfig, guard: Guard, small_shm_on: int | None) -> str:
    """What stops this rank, or nothing."""
    finding.time.sleep = lambda seconds: None
    if dist.get_rank() == small_shm_on:
        usage = start.check_machine.__globals__["shutil"].disk_usage("/")._replace(free=0)
        start.check_machine.__globals__["shutil"].disk_usage = lambda folder: usage
    try:
        check_workers_start(config, derive(config, None), guard, dist.new_group(backend="gloo"))
    except RunStoppedError as error:
        return str(error)
    return ""


def _guard(config: PretrainConfig, *, with_checkpoint: bool) -> Guard:
    run = Storage(config.run.storage_path).child("run")
    if with_checkpoint:
        run.write_bytes(f"{FOLDER}/step-00000001/{MANIFEST}", b"{}")
    return acquire(run, lease_s=600).guard


def test_ranks_in_order_start(folder: Path) -> None:
    config = _config(folder)
    assert run_ranks(2, _start_ranks, config, _guard(config, with_checkpoint=False), None) == ["", ""]


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_fault_of_one_machine_stops_all_ranks_with_its_name(folder: Path, with_checkpoint: bool) -> None:
    config = _config(folder)
    first, second = run_ranks(2, _start_ranks, config, _guard(config, with_checkpoint=with_checkpoint), 1)
    assert first == second, "all ranks stop, with the same words"
    assert f"/dev/shm (rank 1 on {socket.gethostname()}): 0 MiB" in first
    assert "rank 0" not in first


def test_a_disk_without_room_is_said_before_ray_starts_and_stops_a_new_run_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as mounted:
        try:
            mounted.enter_context(small_disk(folder / "runs", 4))
        except OSError as error:
            pytest.skip(f"needs the right to mount: {error}")
        config = _config(folder, optim={"warmup_epochs": 0}, train={**TINY["train"], "global_batch": 4})
        derived = derive(config, 4)
        with pytest.raises(ValueError, match=r"(?s)mend:\n  disk: .*: 4 MiB free, .* checkpoints: delete"):
            check_run(config, derived)
        Storage(config.run.storage_path).child("run").write_bytes(f"{FOLDER}/step-00000001/{MANIFEST}", b"{}")
        check_run(config, derived)
    said = capsys.readouterr().out
    assert said.count("wanted for the run's checkpoints: delete old runs, lower run.keep_last") == 1
    assert said.startswith("warning: disk: ")


def test_a_machine_too_small_for_all_workers_is_said_before_ray_starts_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    config = _config(folder, optim={"warmup_epochs": 0}, train={**TINY["train"], "global_batch": 4})
    with pytest.raises(
        ValueError, match=r"(?s)cannot start; mend:\n  memory: 1 MiB free, 2 workers take up to"
    ):
        check_run(config, derive(config, 4))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    check_run(config, derive(config, 4))  # its workers look at their machines


def test_what_all_ranks_have_found_is_one_line() -> None:
    full = [Finding("storage", Level.ERROR, "full").at(f"rank {rank} on host") for rank in range(8)]
    other = Finding("device", Level.ERROR, "no GPU").at("rank 3 on host")
    assert start._listed("not ready", [*full, other]).splitlines() == [
        "not ready; mend:",
        "  storage (rank 0 on host and 7 more): full",
        "  device (rank 3 on host): no GPU",
    ]


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_storage_that_a_node_does_not_see_stops_every_run(folder: Path, with_checkpoint: bool) -> None:
    """Else what it looks for there, such as a checkpoint, would count as lost."""
    config = _config(folder)
    elsewhere = Guard(str(folder / "elsewhere"), _guard(config, with_checkpoint=False).name)
    if with_checkpoint:
        Storage(elsewhere.run_uri).write_bytes(f"{FOLDER}/step-00000001/{MANIFEST}", b"{}")
    stopped = run_ranks(2, _start_ranks, config, elsewhere, None)
    assert "storage shared (rank 0 on" in stopped[0]
    assert "which the driver wrote: run.storage_path must be the same" in stopped[1]


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_storage_that_fails_stops_a_new_run_only(folder: Path, with_checkpoint: bool) -> None:
    config = _config(folder)
    guard = _guard(config, with_checkpoint=with_checkpoint)
    (folder / "file").write_text("where the storage should be")
    fails = _config(folder, run={"name": "run", "storage_path": str(folder / "file")})
    stopped = run_ranks(2, _start_ranks, fails, guard, None)
    if with_checkpoint:
        assert stopped == ["", ""]
    else:
        assert re.search(r"storage \(rank 0 on .* and 1 more\)", stopped[0])


@pytest.mark.parametrize(("begun", "error"), [(False, ValueError), (True, OSError)])
def test_what_may_pass_by_itself_asks_a_run_that_has_begun_for_the_same_command_alone(
    folder: Path, begun: bool, error: type[Exception]
) -> None:
    config = _config(folder)
    if begun:
        _guard(config, with_checkpoint=True)
    (folder / "data" / "train-000002.tar").unlink()
    with pytest.raises(error, match=r"the run cannot start; mend:\n  data: .*train-000002.tar is missing"):
        check_driver(config)
