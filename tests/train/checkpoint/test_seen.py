"""A store that shows less of a run than was seen there is waited for: nothing is written, nothing begins anew."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
import torch.distributed as dist
from mlflow.tracking import MlflowClient

from arvideo_dist import command
from arvideo_dist.checks import stores
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data.index import manifest_name
from arvideo_dist.launch import driver as launch
from arvideo_dist.launch import nodes
from arvideo_dist.launch.preemption import Signals
from arvideo_dist.pretrain import main
from arvideo_dist.storage import Storage, lasts
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint import reader as checkpoint_module
from arvideo_dist.train.checkpoint import seen
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, newest_step
from arvideo_dist.train.checkpoint.reader import open_newest_whole
from arvideo_dist.train.checkpoint.seen import CHECKPOINT_TAG, look_from_all_ranks
from arvideo_dist.train.run.lease import Guard, acquire
from arvideo_dist.train.run.stop import RunInterruptedError, RunStoppedError, Stopped, StoreAwayError
from arvideo_dist.train.tracking import runs as tracking
from tests.launch.test_launch import _NoWatch
from tests.services.mounts import Mount, leave_for_another_host, mounted
from tests.services.relays import EmptyListings
from tests.services.s3 import S3
from tests.train.distributed import run_ranks


class Store:
    """A run's folder whose store can be made to look empty."""

    def __init__(self, run: Storage, hide: Callable[[], None], show: Callable[[], None]) -> None:
        self.run, self.hide, self.show = run, hide, show

    def add_checkpoint(self, step: int) -> None:
        self.run.write_bytes(f"{FOLDER}/step-{step:08d}/{MANIFEST}", b"{}")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with contextlib.ExitStack() as stack:
        try:
            mount = stack.enter_context(mounted(tmp_path / "a"))
        except OSError as error:
            pytest.skip(f"this process may not mount: {error}")
        yield mount


@pytest.fixture(scope="module")
def bucket(s3: S3) -> str:
    s3.make_bucket("seen")
    return "seen"


@pytest.fixture(params=["mount", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """On a disk that can be unmounted, and in a bucket whose listings can be empty."""
    if request.param == "mount":
        mount: Mount = request.getfixturevalue("mount")
        yield Store(Storage(str(mount.at / "runs/run")), mount.unmount, mount.mount)
        return
    s3: S3 = request.getfixturevalue("s3")
    relay = EmptyListings(s3.address)
    uri = s3.uri(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run", through=relay.address)

    def set_empty(empty: bool) -> None:
        relay.empty = empty

    yield Store(Storage(uri), lambda: set_empty(True), lambda: set_empty(False))
    relay.close()


def _files(store: Store) -> list[str]:
    """What can be seen of the run, and of a disk all that stands in the place of the run's storage."""
    if not store.run.is_local:
        return store.run.names() + store.run.names(FOLDER)
    return sorted(str(path) for path in Path(store.run.root).parent.parent.rglob("*"))


def test_who_holds_the_run_writes_nothing_where_its_own_lease_is_not_to_be_seen(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither checkpoints, nor the lease's next heartbeat: a driver does not make its lease anew."""
    with acquire(store.run, lease_s=600) as lease:
        guarded = lease.guard.storage()
        guarded.write_bytes("result.json", b"first")
        part = tmp_path / "part"
        part.write_bytes(b"part")
        store.hide()
        for change in (
            lambda: guarded.write_bytes("result.json", b"second"),
            lambda: guarded.put_file(part, "folder/part"),
            lambda: guarded.delete("result.json"),
            lambda: _stream(guarded, "folder/streamed"),
            lambda: lease._write(),
        ):
            with pytest.raises(OSError, match=r"does not hold this driver's own .*Is it mounted") as refused:
                change()
            assert not lasts(refused.value), "time mends it"
        assert _files(store) == []
        store.show()
        assert store.run.read_bytes("result.json") == b"first"
        assert not store.run.exists("folder")
        lease._write()
        lease.guard.check()
    assert capsys.readouterr().err == ""


def _stream(run: Storage, name: str) -> None:
    with run.streaming(name) as file:
        file.write(b"x")


def test_an_older_listing_of_a_network_disk_is_no_store_that_is_away(tmp_path: Path) -> None:
    with acquire(Storage(str(tmp_path)), lease_s=600) as lease:
        stale = ["00000000-00000000000000000000000000000000.json"]
        with mock.patch.object(lease.guard._run, "names", return_value=stale):
            lease.guard.check()
        lease.guard._run.delete(f"lease/{lease.guard.name}")
        with pytest.raises(OSError, match="does not hold this driver's own"):
            lease.guard.check()


def test_the_lease_tells_the_next_driver_of_the_newest_checkpoint(store: Store) -> None:
    """Also of one that only the heartbeat saw, and a driver that sees less lowers nothing."""
    with acquire(store.run, 600, newest_step) as lease:
        store.add_checkpoint(16)
        lease._write()
    with acquire(store.run, 600, lambda run: 0) as lease:
        assert lease.saw(8) == 16
    store.run.delete(FOLDER)
    with pytest.raises(OSError, match=r"shows no checkpoint on .*, but step-00000016 was seen there"):
        _wait_once(store.run)
    store.add_checkpoint(8)
    with pytest.raises(
        OSError, match=r"shows no checkpoint newer than step-00000008 on .*, but step-00000016"
    ):
        _wait_once(store.run)
    store.add_checkpoint(24)
    _wait_once(store.run)


def _wait_once(run: Storage, seen_by_mlflow: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "AWAY_S", 0.0)
        seen.wait_until_seen_again(run, lambda: seen_by_mlflow)


def test_a_driver_that_starts_waits_until_the_store_shows_what_mlflow_saw_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add_checkpoint(24)
    store.hide()
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        assert _files(store) == []
        pauses.append(seconds)
        if len(pauses) == 2:
            store.show()

    monkeypatch.setattr(seen.time, "sleep", pause)
    seen.wait_until_seen_again(store.run, lambda: 24)
    assert pauses == [seen.PAUSE_S] * 2
    assert capsys.readouterr().out.count("the run waits for its storage, for up to 60 minutes: ") == 1


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_waiting_for_the_store_at_the_start_ends_when_the_run_is_asked_to_stop(
    tmp_path: Path, number: signal.Signals, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen.time, "sleep", lambda seconds: os.kill(os.getpid(), number))
    with pytest.raises(RunInterruptedError, match=f"{name} before any worker was started"), Signals():
        seen.wait_until_seen_again(Storage(str(tmp_path)), lambda: 24)


# MLflow knows of the run's checkpoint.


def _config(folder: Path, **run: Any) -> PretrainConfig:
    Storage(str(folder / "data")).write_bytes(manifest_name("train"), b"{}")
    return PretrainConfig.model_validate(
        {
            "run": {"name": "seen", "storage_path": str(folder / "runs"), "max_restarts": 1, **run},
            "data": {"path": str(folder / "data"), "val_split": None},
            "model": {"encoder": "demo"},
            "train": {"micro_batch": 1},
            "cluster": {"workers": 1},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, str]:
    """A run of which MLflow knows that it had a checkpoint of step 24, and the MLflow run's id."""
    config = _config(tmp_path_factory.mktemp("tracked"))
    run_id = tracking.open_run(config, {}, launch.run_folder(config))
    client = MlflowClient(tracking_uri=config.tracking.uri)
    client.set_tag(run_id, CHECKPOINT_TAG, "24")
    return config, run_id


def _known(config: PretrainConfig) -> int:
    return tracking.newest_checkpoint(config, launch.run_folder(config), CHECKPOINT_TAG)


def test_mlflow_tells_of_the_checkpoints_of_the_run_of_that_name_in_that_folder(
    tracked: tuple[PretrainConfig, str], tmp_path: Path
) -> None:
    config, run_id = tracked
    assert _known(config) == 24
    assert tracking.newest_checkpoint_of(config.tracking.uri, run_id, CHECKPOINT_TAG) == 24
    for field, value in (("name", "see"), ("storage_path", str(tmp_path))):
        other = config.run.model_copy(update={field: value})
        assert _known(config.model_copy(update={"run": other})) == 0
    elsewhere = config.tracking.model_copy(update={"experiment": "other"})
    assert _known(config.model_copy(update={"tracking": elsewhere})) == 0


def test_an_mlflow_that_does_not_tell_is_not_made_nor_waited_for(
    tracked: tuple[PretrainConfig, str], tmp_path: Path
) -> None:
    config, run_id = tracked
    for uri in (f"sqlite:///{tmp_path}/none.db", "http://127.0.0.1:9"):
        away = config.tracking.model_copy(update={"uri": uri})
        assert _known(config.model_copy(update={"tracking": away})) == 0
        assert tracking.newest_checkpoint_of(uri, run_id, CHECKPOINT_TAG) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_same_bucket_is_known_with_other_options_in_its_address() -> None:
    one, other = "s3://***@b/run?endpoint_override=x", "s3://b/run?region=y"
    assert tracking._place(one) == tracking._place(other) == "b/run"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `pretrain` came to, behind the checks of its data."""
    reached: list[str] = []
    monkeypatch.setattr(command, "check_driver", lambda config: None)
    monkeypatch.setattr(command, "derive_checked", lambda config: derive(config, 100))
    monkeypatch.setattr(command, "check_resume", lambda config: None)

    def note(*_: object) -> None:
        reached.append("launch")
        raise RunStoppedError("enough")

    monkeypatch.setattr(command, "launch", note)
    return reached


def _pretrain(config: PretrainConfig) -> int:
    options = {
        "data.path": config.data.path,
        "data.val_split": "null",
        "run.name": config.run.name,
        "run.storage_path": config.run.storage_path,
        "tracking.uri": config.tracking.uri,
        "model.encoder": config.model.encoder,
        "train.micro_batch": str(config.train.micro_batch),
        "cluster.workers": str(config.cluster.workers),
    }
    with pytest.raises(SystemExit) as ended:
        main([part for name, value in options.items() for part in (f"--{name}", value)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_new_driver_with_an_empty_folder_exits_75_with_both_remedies_and_writes_nothing(
    tracked: tuple[PretrainConfig, str],
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, _ = tracked
    monkeypatch.setattr(seen, "AWAY_S", 0.0)
    folder, hidden = Path(config.run.storage_path), Path(config.run.storage_path).with_name("hidden")
    folder.rename(hidden)
    try:
        folder.mkdir()  # the mount point
        assert _pretrain(config) == 75
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()
        hidden.rename(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "shows no checkpoint on " in line
    assert "but step-00000024 was seen there: the store is taken to be away" in line
    assert "Mount it" in line
    assert "choose another run.name, or delete the rest of the run's folder and its run in MLflow" in line
    assert line.endswith("the same command continues once it is back")
    assert started == []


def test_a_run_whose_mlflow_run_was_deleted_begins_anew(
    tracked: tuple[PretrainConfig, str], started: list[str]
) -> None:
    config = tracked[0].model_copy(update={"run": tracked[0].run.model_copy(update={"name": "deleted"})})
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run_id = tracking.open_run(config, {}, launch.run_folder(config))
    client.set_tag(run_id, CHECKPOINT_TAG, "24")
    assert _known(config) == 24
    client.delete_run(run_id)
    launch.run_folder(config).delete("")
    assert _pretrain(config) == 1
    assert started == ["launch"]


# Workers.


@dataclass
class _Cases:
    """What the ranks look at: a run with step 16 on a mount, one whose step 24 is damaged, an empty folder."""

    mount: Mount
    mounted: Guard
    taken_over: Guard
    damaged: Guard
    empty: str


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What two ranks found; all in one pair of processes, since starting one costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        try:
            mount = stack.enter_context(mounted(folder / "a"))
        except OSError as error:
            pytest.skip(f"this process may not mount: {error}")
        on_mount, other, damaged = (
            Storage(str(at)) for at in (mount.at / "run", folder / "other", folder / "c")
        )
        on_mount.write_bytes(f"{FOLDER}/step-00000016/{MANIFEST}", b"{}")
        guards = [stack.enter_context(acquire(run, 600)).guard for run in (on_mount, other, damaged)]
        older = Guard(other.address, guards[1].name.replace("00000001-", "00000000-"))
        _write_checkpoints(damaged)
        yield run_ranks(2, _find, _Cases(mount, guards[0], older, guards[2], str(folder / "empty")))


def _write_checkpoints(run: Storage) -> None:
    """Of step 16 and of step 24, whose state is damaged; of no parameter."""
    state = json.dumps({"position": 16}).encode()
    entry = {"name": STATE, "size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    manifest = {"shapes": {}, "fragments": [], "parts": [], "state": entry}
    for step, content in ((16, state), (24, b"{}")):
        run.write_bytes(f"{FOLDER}/step-{step:08d}/{STATE}", content)
        run.write_bytes(f"{FOLDER}/step-{step:08d}/{MANIFEST}", json.dumps(manifest).encode())


def _find(cases: _Cases) -> dict[str, Any]:
    seen._WORKERS_PATIENCE_S = 0.0
    control = dist.new_group(backend="gloo")
    damaged = Storage(cases.damaged.run_address)
    gone = Guard(cases.damaged.run_address, cases.damaged.name.replace("00000001-", "00000002-"))
    found = {
        "looks": [_looked(cases.mounted, step, control) for step in (0, 8, 16, 24)],
        "taken over": _looked(cases.taken_over, 16, control),
        "as seen": _opened(damaged, control, 24),
        "older": _opened(damaged, control, 32),
        "none": _opened(Storage(cases.empty), control, 8),
        "gone": _opened(gone.storage(), control, 24),
    }
    if dist.get_rank() == 1:
        leave_for_another_host()
        cases.mount.unmount()
    return {
        **found,
        "other host": _looked(cases.mounted, 16, control),
        "shows": newest_step(cases.mounted._run),
    }


def _looked(guard: Guard, at_least: int, control: dist.ProcessGroup) -> str:
    """What stops this rank."""
    try:
        look_from_all_ranks(guard, at_least, control)
    except RunStoppedError as error:
        return f"{type(error).__name__} {error}"
    return ""


def _opened(run: Storage, control: dist.ProcessGroup, at_least: int) -> str:
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        mock.patch.object(checkpoint_module, "patiently", lambda action: action()),
    ):
        try:
            found = str(open_newest_whole(run, control, seen=at_least))
        except (StoreAwayError, OSError) as error:
            found = f"{type(error).__name__} {error}"
    return f"{found}\n{said.getvalue()}"


def test_workers_that_find_less_than_was_seen_do_not_train(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["looks"][:3] == ["", "", ""]
        away = r"StoreAwayError rank 0: .* newer than step-00000016 on .*but step-00000024 was seen there"
        assert re.match(away, rank["looks"][3])
        assert rank["looks"][3].endswith("(and 1 more ranks)")
        assert re.match("RunStoppedError .*was taken over by", rank["taken over"])


def test_one_host_without_the_mount_keeps_all_from_training(ranks: list[dict[str, Any]]) -> None:
    here, there = ranks
    assert here["other host"] == there["other host"], "all leave, with the same words"
    away = r"StoreAwayError rank 1: .*/run/lease on .* does not hold this driver's own"
    assert re.match(away, here["other host"])
    assert "more ranks" not in here["other host"]
    assert (here["shows"], there["shows"]) == (16, 0)


def test_no_older_checkpoint_is_used_in_place_of_one_that_is_not_shown_but_of_one_that_is_damaged(
    ranks: list[dict[str, Any]],
) -> None:
    for number, rank in enumerate(ranks):
        name, said = rank["as seen"].split("\n", 1)
        assert name.endswith("step-00000016")
        assert ("step-00000024: state.json is damaged" in said) == (number == 0)
        older = "StoreAwayError .*newer than step-00000024 on .*but step-00000032 was seen there"
        assert re.match(older, rank["older"])
        none = "StoreAwayError .*shows no checkpoint on .*but step-00000008 was seen there"
        assert re.match(none, rank["none"])


def test_what_a_machine_misses_along_with_the_lease_is_no_damage(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert re.match("OSError .* does not hold this driver's own 00000002-", rank["gone"])


# The driver, whose workers are made up.


class Driver:
    """Sets of workers that end as they are told to, one after the other."""

    def __init__(self, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.run = config, launch.run_folder(config)
        self.sets: list[Callable[[], Any]] = []
        self.paused: list[float] = []
        self.at_pause: Callable[[], None] = lambda: None
        monkeypatch.setattr(launch, "connect", lambda config: None)
        monkeypatch.setattr(launch, "HangWatch", _NoWatch)
        monkeypatch.setattr(ray, "cluster_resources", dict)
        monkeypatch.setattr(nodes, "free_places", lambda bundle: {"node": 16})
        monkeypatch.setattr(launch, "_fit_once", lambda *_: self.sets.pop(0)())
        monkeypatch.setattr(launch, "wait_to_restart", self._wait)

    def _wait(self, lease: Any, seconds: float) -> None:
        self.paused.append(seconds)
        self.at_pause()

    def fit(self, uri: str = "sqlite:///none.db", run_id: str = "id") -> None:
        with acquire(self.run, 600, newest_step) as self.lease:
            launch._fit(self.config, derive(self.config, None), uri, run_id, self.lease)


def _lost() -> None:
    raise ray.train.WorkerGroupError("lost", worker_failures={1: RuntimeError("lost")})


def test_a_driver_whose_store_looks_empty_as_workers_are_lost_starts_none_until_it_is_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run_folder", lambda config: store.run)
    driver = Driver(_config(tmp_path), monkeypatch)

    def lose_with_the_store() -> None:
        store.add_checkpoint(24)
        driver.lease._write()  # its heartbeat saw that
        store.hide()
        _lost()

    def come_back() -> None:
        if len(driver.paused) <= 2:
            assert _files(store) == []
        if len(driver.paused) == 2:
            store.show()

    driver.sets, driver.at_pause = [lose_with_the_store, lambda: None], come_back
    driver.fit()
    assert driver.sets == []
    assert driver.paused == [seen.PAUSE_S, seen.PAUSE_S, 0.0]
    said = capsys.readouterr().out
    assert said.count("new workers wait for storage, for up to 60 minutes: ") == 1
    assert said.count("restart 1 of 1 since checkpoint step-00000024") == 1


def test_a_driver_that_finds_only_older_checkpoints_than_its_workers_told_mlflow_of_waits_too(
    tracked: tuple[PretrainConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is there, and so is the checkpoint of step 16; the workers had told MLflow of step 24."""
    driver = Driver(_config(tmp_path), monkeypatch)
    store = Store(driver.run, lambda: None, lambda: None)
    store.add_checkpoint(16)
    driver.sets, driver.at_pause = [lambda: None], lambda: store.add_checkpoint(24)
    driver.fit(tracked[0].tracking.uri, tracked[1])
    assert driver.paused == [seen.PAUSE_S]


def test_workers_that_left_a_store_that_is_away_from_their_host_are_started_again_and_cost_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For an hour; then the run ends, and the same command continues it."""
    driver = Driver(_config(tmp_path), monkeypatch)
    driver.run.write_bytes(f"{FOLDER}/step-00000024/{MANIFEST}", b"{}")

    def leave() -> None:
        raise Stopped.because(StoreAwayError("rank 1: no checkpoint")).error()

    driver.sets = [leave] * 5 + [_lost, lambda: None]
    driver.fit()
    assert driver.paused == [seen.PAUSE_S] * 5 + [0.0]
    said = capsys.readouterr().out
    assert said.count("new workers wait for storage, for up to 60 minutes: rank 1: no checkpoint") == 5
    assert said.count("restart 1 of 1 since checkpoint step-00000024") == 1
    monkeypatch.setattr(seen, "AWAY_S", -1.0)
    driver.sets = [leave]
    with pytest.raises(RunStoppedError, match="rank 1: no checkpoint") as stopped:
        driver.fit()
    assert stopped.value.passing


def test_a_probe_of_the_storage_leaves_nothing_in_an_empty_mount_point(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    config = PretrainConfig.model_validate({"run": {"name": "run", "storage_path": str(tmp_path / "runs")}})
    stores.check_storage(config, 10)
    assert list((tmp_path / "runs").iterdir()) == []
