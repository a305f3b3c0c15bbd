"""MLflow that hangs, dies, loses answers or refuses: each point reaches it once, in order; nothing waits for it."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.storage import Storage
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import LeaseLostError
from arvideo_dist.train.tracking import outbox
from arvideo_dist.train.tracking import runs as tracking
from arvideo_dist.train.tracking.outbox import FOLDER, REFUSED, QueuedTracker, say_unsent
from arvideo_dist.train.tracking.runs import RUN_FILE, Tracker, close_run, open_run
from tests import warm
from tests.services.mlflow_server import MlflowServer, free_port, new_database
from tests.services.relays import LosesAnswers

WAIT_S = 60.0


class TellingTracker(QueuedTracker):
    """Its lines can be waited for."""

    def __init__(self, *args: Any) -> None:
        self.lines: Queue[str] = Queue()
        super().__init__(*args)

    def _say(self, line: str) -> None:
        self.lines.put(line)

    def await_line(self, words: str) -> str:
        while words not in (line := self.lines.get(timeout=WAIT_S)):
            pass
        return line


class FailingStorage(Storage):
    """Takes nothing while it is told to fail."""

    fails = False

    def _before_change(self) -> None:
        if self.fails:
            raise OSError("No space left on device")


@pytest.fixture(autouse=True)
def _short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def run(tmp_path: Path) -> FailingStorage:
    return FailingStorage(str(tmp_path / "run"))


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return new_database(tmp_path / "mlflow.db")


def _new_run(uri: str) -> str:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    number = experiment.experiment_id if experiment else client.create_experiment("tests")
    return str(client.create_run(number).info.run_id)


def _queued(uri: str, run_id: str, run: Storage, check: Callable[[], None] = lambda: None) -> TellingTracker:
    return TellingTracker(Tracker(uri, run_id, check), run)


def _log(tracker: QueuedTracker, *steps: int) -> None:
    for step in steps:
        tracker.log(step, {"loss/train": 1 / step, "learning_rate": step / 10})


def _assert_each_once(uri: str, run_id: str, last: int) -> None:
    """Points 1 to `last` of both metrics, each with its value, their times not before one another."""
    client = MlflowClient(tracking_uri=uri)
    for key, value in (("loss/train", lambda step: 1 / step), ("learning_rate", lambda step: step / 10)):
        points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.step)
        assert [(p.step, p.value) for p in points] == [(step, value(step)) for step in range(1, last + 1)]
        times = [point.timestamp for point in points]
        assert times == sorted(times)


def _content(uri: str, run_id: str, name: str, folder: Path) -> bytes:
    return Path(MlflowClient(tracking_uri=uri).download_artifacts(run_id, name, str(folder))).read_bytes()


def test_nothing_is_lost_or_doubled_by_a_server_that_hangs_and_one_that_is_killed(
    server: MlflowServer, run: FailingStorage, tmp_path: Path
) -> None:
    """What a hanging server has taken without an answer it writes once it goes on: every repetition of it, too."""
    run_id = _new_run(server.uri)
    tracker = _queued(server.uri, run_id, run)
    _log(tracker, 1, 2, 3)
    server.hang()
    _log(tracker, 4, 5, 6)
    tracker.log_bytes("pictures/step-00000006.png", b"\x89PNG six")
    tracker.await_line("MLflow is away")
    _log(tracker, 7)
    tracker.flush()
    assert run.names(FOLDER), "a kill now would lose nothing"
    server.go_on()
    tracker.await_line("MLflow is back:")

    server.kill()
    _log(tracker, 8, 9)
    tracker.tag("arvideo.note", "eight")
    for content in (b"old", b"older", b"new"):
        tracker.log_bytes("bad_samples.parquet", content)
    tracker.await_line("MLflow is away")
    _log(tracker, 10)
    server.start()
    assert int(tracker.await_line("MLflow is back:").split()[3]) >= 5
    tracker.finish()

    _assert_each_once(server.uri, run_id, last=10)
    assert _content(server.uri, run_id, "pictures/step-00000006.png", tmp_path) == b"\x89PNG six"
    assert _content(server.uri, run_id, "bad_samples.parquet", tmp_path) == b"new"
    found = MlflowClient(tracking_uri=server.uri).get_run(run_id)
    assert found.data.tags["arvideo.note"] == "eight"
    assert found.info.status == "RUNNING"
    assert run.names(FOLDER) == []


def _log_and_die(uri: str, run_id: str, folder: str) -> None:
    tracker = _queued(uri, run_id, Storage(folder))
    _log(tracker, 1, 2, 3)
    tracker.log_bytes("pictures/step-00000003.png", b"three")
    tracker.flush()  # a checkpoint of step 3 becomes visible
    _log(tracker, 4, 5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_kept_is_sent_by_the_next_before_its_replay(
    server: MlflowServer, run: FailingStorage, tmp_path: Path
) -> None:
    run_id = _new_run(server.uri)
    server.hang()
    process = mp.get_context("spawn").Process(target=_log_and_die, args=(server.uri, run_id, run.uri))
    with warm.for_multiprocessing():
        process.start()
    process.join(WAIT_S)
    server.go_on()
    assert process.exitcode == -signal.SIGKILL
    assert len(run.names(FOLDER)) >= 1

    tracker = _queued(server.uri, run_id, run)
    _log(tracker, 4, 5, 6)  # from the checkpoint of step 3
    tracker.finish(WAIT_S)
    _assert_each_once(server.uri, run_id, last=6)
    assert _content(server.uri, run_id, "pictures/step-00000003.png", tmp_path) == b"three"
    assert run.names(FOLDER) == []


def test_points_whose_answer_was_lost_are_not_written_twice(
    server: MlflowServer, run: FailingStorage
) -> None:
    run_id = _new_run(server.uri)
    relay = LosesAnswers(f"127.0.0.1:{server.port}")
    tracker = _queued(f"http://{relay.address}", run_id, run)
    _log(tracker, 1, 2)
    relay.lose = 3
    _log(tracker, 3, 4, 5)
    tracker.await_line("MLflow is back:")
    relay.lose = 2
    _log(tracker, 6)
    tracker.finish(WAIT_S)
    relay.close()
    assert relay.lost == 5
    _assert_each_once(server.uri, run_id, last=6)


def test_a_point_that_is_sent_again_with_its_time_is_the_same_point(sqlite: str) -> None:
    """What the repetition of a request rests on, also when MLflow takes the first one late."""
    run_id = _new_run(sqlite)
    for _ in range(2):
        Tracker(sqlite, run_id, lambda: None)._client.log_batch(
            run_id,
            metrics=[tracking.Metric("loss", 0.5, 1000, 1), tracking.Metric("nan", float("nan"), 1, 1)],
        )
    client = MlflowClient(tracking_uri=sqlite)
    assert [len(client.get_metric_history(run_id, key)) for key in ("loss", "nan")] == [1, 1]


def test_what_is_left_at_the_end_is_kept_told_and_sent_by_the_next_start(
    sqlite: str, run: FailingStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = _new_run(sqlite)
    nowhere = f"http://127.0.0.1:{free_port()}"
    with _queued(nowhere, run_id, run) as tracker:
        _log(tracker, 1, 2)
        tracker.log(2, {"bad": float("nan"), "worse": float("inf")})
        tracker.log_bytes("file", bytes(range(256)))
        tracker.finish(drain_s=0.1)
    say_unsent(run)
    assert "MLflow does not have 5 entries of this run yet" in capsys.readouterr().out
    with _queued(sqlite, run_id, run):
        pass
    _assert_each_once(sqlite, run_id, last=2)
    client = MlflowClient(tracking_uri=sqlite)
    assert [len(client.get_metric_history(run_id, key)) for key in ("bad", "worse")] == [1, 1]
    assert _content(sqlite, run_id, "file", Path(run.root)) == bytes(range(256))
    say_unsent(run)
    assert capsys.readouterr().out == ""


def test_what_mlflow_refuses_is_set_aside_and_told_and_blocks_nothing(
    sqlite: str, run: FailingStorage
) -> None:
    run_id = _new_run(sqlite)
    with _queued(sqlite, run_id, run) as tracker:
        _log(tracker, 1)
        tracker.log(2, {"no\nname": 1.0})
        _log(tracker, 2)
        assert "refused" in tracker.await_line("refused an entry")
    _assert_each_once(sqlite, run_id, last=2)
    (member,) = run.names(REFUSED)
    assert b"no\\nname" in run.read_bytes(f"{REFUSED}/{member}")


def test_a_run_that_was_deleted_in_mlflow_waits_until_it_is_restored(
    sqlite: str, run: FailingStorage
) -> None:
    """All its entries are refused then, so none of them is at fault."""
    run_id, client = _new_run(sqlite), MlflowClient(tracking_uri=sqlite)
    client.delete_run(run_id)
    with _queued(sqlite, run_id, run) as tracker:
        _log(tracker, 1, 2)
        tracker.await_line("MLflow is away")
        client.restore_run(run_id)
        tracker.await_line("MLflow is back:")
    _assert_each_once(sqlite, run_id, last=2)


def test_points_do_not_wait_for_artifacts_that_cannot_be_stored(sqlite: str, run: FailingStorage) -> None:
    run_id = _new_run(sqlite)
    location = Path(MlflowClient(tracking_uri=sqlite).get_run(run_id).info.artifact_uri)
    location.parent.mkdir(parents=True, exist_ok=True)
    location.write_text("in the way of the folder")
    with _queued(sqlite, run_id, run) as tracker:
        tracker.log_bytes("file", b"content")
        tracker.await_line("MLflow is away")
        _log(tracker, 1, 2)
        location.unlink()
        tracker.await_line("MLflow is back:")
    _assert_each_once(sqlite, run_id, last=2)
    assert _content(sqlite, run_id, "file", Path(run.root)) == b"content"


def test_points_reach_mlflow_while_the_runs_folder_takes_nothing_and_a_flush_says_so(
    sqlite: str, run: FailingStorage
) -> None:
    run_id = _new_run(sqlite)
    run.fails = True
    with _queued(f"http://127.0.0.1:{free_port()}", run_id, run) as away:
        _log(away, 1)
        away.await_line("cannot be written either")
        with pytest.raises(OSError, match="No space left"):  # so the checkpoint does not become visible
            away.flush()
        run.fails = False
        away.finish(drain_s=0.1)
    run.fails = True
    with _queued(sqlite, run_id, run) as tracker:
        _log(tracker, 2)
        tracker.finish(WAIT_S)
    _assert_each_once(sqlite, run_id, last=2)


def test_who_has_lost_the_lease_sends_and_keeps_nothing(sqlite: str, run: FailingStorage) -> None:
    def refuse() -> None:
        raise LeaseLostError("taken over")

    run_id = _new_run(sqlite)
    with _queued(sqlite, run_id, run, refuse) as tracker:
        _log(tracker, 1)
    assert MlflowClient(tracking_uri=sqlite).get_metric_history(run_id, "loss/train") == []


def test_who_leaves_keeps_all_before_it_waits_briefly_and_the_end_of_the_block_waits_no_more(
    run: FailingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[float, bool]] = []  # for how long, and whether all was on storage by then

    def await_sent(self: QueuedTracker, seconds: float) -> None:
        members = [
            run.read_bytes(f"{FOLDER}/{name}") for name in run.names(FOLDER) if name.endswith(".jsonl")
        ]
        waits.append((seconds, all(f'"step":{step},'.encode() in b"".join(members) for step in (1, 2))))

    monkeypatch.setattr(QueuedTracker, "_await_sent", await_sent)
    with _queued(f"http://127.0.0.1:{free_port()}", "run", run) as tracker:
        _log(tracker, 1, 2)
        tracker.leave()
    assert waits == [(outbox._LEAVING_S, True)]
    assert outbox._LEAVING_S <= 5


def test_who_waits_for_mlflow_at_the_end_does_not_hang(
    run: FailingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[bool] = []
    monkeypatch.setattr(activity, "tick", lambda: ticks.append(True))
    with _queued(f"http://127.0.0.1:{free_port()}", "run", run) as tracker:
        _log(tracker, 1)
        tracker.finish(2.5)
    assert len(ticks) >= 3  # at the begin and after each second


def test_storage_that_fails_under_the_lease_is_named_and_not_mlflow(sqlite: str, run: FailingStorage) -> None:
    fails = True

    def check() -> None:
        if fails:
            raise OSError("AWS Error NETWORK_CONNECTION during ListObjectsV2")

    run_id = _new_run(sqlite)
    with _queued(sqlite, run_id, run, check) as tracker:
        _log(tracker, 1, 2)
        told = tracker.lines.get(timeout=WAIT_S)
        assert told.startswith(f"the run's storage {run.uri} fails: AWS Error NETWORK_CONNECTION")
        fails = False
        tracker.await_line("the run's storage is back:")
    assert tracker.lines.empty()
    _assert_each_once(sqlite, run_id, last=2)


def test_storage_that_takes_no_refused_entry_is_named_and_the_entry_kept_later(
    sqlite: str, run: FailingStorage
) -> None:
    run.fails = True
    run_id = _new_run(sqlite)
    with _queued(sqlite, run_id, run) as tracker:
        tracker.log(1, {"no\nname": 1.0})
        assert "No space left on device" in tracker.await_line("the run's storage")
        run.fails = False
        tracker.await_line("refused an entry")
    assert len(run.names(REFUSED)) == 1


def _config(uri: str, folder: Path) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"run": {"name": "run", "storage_path": str(folder)}, "tracking": {"uri": uri}}
    )


def test_a_run_that_goes_on_starts_and_ends_without_mlflow_and_a_new_one_does_not(
    sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_CLOSING_S", 0.0)
    away = _config(f"http://127.0.0.1:{free_port()}", tmp_path)
    run = Storage(str(tmp_path)).child("run")
    with pytest.raises(OSError, match=r"Check tracking\.uri"):
        open_run(away, {}, run)
    assert not run.exists(RUN_FILE)
    run_id = open_run(_config(sqlite, tmp_path), {}, run)
    assert open_run(away, {}, run) == run_id
    assert "is away" in capsys.readouterr().out
    close_run(away, run_id, "FINISHED")
    assert f"did not take the status FINISHED of its run {run_id}" in capsys.readouterr().out


def test_a_start_that_fails_halfway_leaves_no_run_in_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").write_text("a file where artifacts should go")
    config = PretrainConfig.model_validate({"run": {"name": "run", "storage_path": str(tmp_path)}})
    run = Storage(str(tmp_path)).child("run")
    with pytest.raises(ValueError, match=r"Check tracking\.uri"):
        open_run(config, {}, run)
    (tmp_path / "mlartifacts").unlink()
    run_id = open_run(config, {}, run)
    client = MlflowClient(tracking_uri=tracking.tracking_uri(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    assert [found.info.run_id for found in client.search_runs([experiment.experiment_id])] == [run_id]
