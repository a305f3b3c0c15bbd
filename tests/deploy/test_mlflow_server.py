"""The tracking server, started for real with the arguments of k8s/30-mlflow.yaml."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manifest_checks import load_manifests, named
from mlflow.tracking import MlflowClient

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.storage import Storage
from arvideo_dist.train.tracking.runs import Tracker, close_run, open_run, tracking_uri
from tests.services.mlflow_server import await_port, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that runs the Deployment's command on a folder of this test."""
    container = named(load_manifests(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["mlflow", "server"]
    volume, port = tmp_path_factory.mktemp("mlflow"), free_port()
    changed = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
    assert changed.keys() <= set(container["args"])
    arguments = [changed.get(a, a.replace("/mlflow/", f"{volume}/")) for a in container["args"]]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("mlflow")), "server", *arguments],
        cwd=volume,
        env=os.environ | {variable["name"]: variable["value"] for variable in container["env"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        await_port(process)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the server is a tree of processes, its folder is thrown away
        process.communicate()
    assert (volume / "mlflow.db").stat().st_size > 0


def _status(port: int, path: str, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize(
    "host", ["mlflow:5000", "mlflow.arvideo.svc.cluster.local:5000", "localhost:5000", "127.0.0.1:5000"]
)
def test_clients_of_the_cluster_and_of_port_forward_are_answered(server: int, host: str) -> None:
    assert _status(server, "/api/2.0/mlflow/experiments/get?experiment_id=0", host) == 200


def test_foreign_host_is_refused(server: int) -> None:
    assert _status(server, "/api/2.0/mlflow/experiments/get?experiment_id=0", "evil.example:5000") == 403


def test_probes_pass_though_the_kubelet_names_the_pod_by_its_address(server: int) -> None:
    assert _status(server, "/health", "10.1.2.3:5000") == 200


def test_run_is_tracked_through_the_server_and_replayed_steps_are_written_once(
    server: int, tmp_path: Path
) -> None:
    config = PretrainConfig.model_validate(
        {
            "run": {"name": "tracked", "storage_path": str(tmp_path)},
            "tracking": {"uri": f"http://127.0.0.1:{server}"},
        }
    )
    client, folder = MlflowClient(tracking_uri(config)), Storage(str(tmp_path)).child("tracked")
    run_id = open_run(config, {"encoder_tokens": 300}, folder)
    first = Tracker(tracking_uri(config), run_id, before_write=lambda: None)
    for step in (1, 2, 3):
        first.log(step, {"loss/train": 1 / step, "learning_rate": step})
    first.log_bytes("pictures/step-00000003.png", b"a picture")
    close_run(config, run_id, "FAILED")

    assert open_run(config, {}, folder) == run_id, "a restart continues the same MLflow run"
    again = Tracker(tracking_uri(config), run_id, before_write=lambda: None)
    for step in (2, 3, 4):
        again.log(step, {"loss/train": 1 / step, "learning_rate": step})
    close_run(config, run_id, "FINISHED")

    for metric, value in (("loss/train", lambda step: 1 / step), ("learning_rate", float)):
        points = sorted((p.step, p.value) for p in client.get_metric_history(run_id, metric))
        assert points == [(step, value(step)) for step in (1, 2, 3, 4)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "2048"
    assert {a.path for a in client.list_artifacts(run_id)} == {"config.yaml", "derived.json", "pictures"}


def test_run_whose_mlflow_run_is_gone_is_refused_with_the_remedy(server: int, tmp_path: Path) -> None:
    config = PretrainConfig.model_validate(
        {
            "run": {"name": "lost", "storage_path": str(tmp_path)},
            "tracking": {"uri": f"http://127.0.0.1:{server}"},
        }
    )
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "run.json").write_text('{"mlflow_run_id": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(ValueError, match=r"(?s)not found.*use another run\.name to begin a new one"):
        open_run(config, {}, Storage(str(tmp_path)).child("lost"))
