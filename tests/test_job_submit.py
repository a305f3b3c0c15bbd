"""`ray job submit` to a running cluster, as users do it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from tests import warm
from tests.conftest import ROOT
from tests.train.runs import history, runs_folder, write_config

BIN = Path(sys.executable).parent


def _ray(*arguments: str) -> list[str]:
    """The `ray` command; what it starts is as warm as it is itself."""
    return [warm.python(), str(BIN / "ray"), *arguments]


def _free_ports(number: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs_folder(tmp_path_factory.mktemp("submit"))
    write_config(folder / "tiny.yaml", train={"steps": 4}, run={"name": "from-environment"})
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a cluster with token authentication, whose own environment names the
    configuration, the data and the storage, as a deployment does."""
    gcs, dashboard, agent_http, agent_grpc, ray_client = _free_ports(5)
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    path = os.pathsep.join([str(Path(warm.python()).parent), str(BIN), os.environ["PATH"]])
    deployment = {
        "ARVIDEO_CONFIG": str(folder / "tiny.yaml"),
        "ARVIDEO__DATA__PATH": str(folder / "data"),
        "ARVIDEO__RUN__STORAGE_PATH": str(folder / "runs"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at its end there is nothing left to wait for
        "PATH": path,
    }
    head = subprocess.Popen(
        [
            *_ray("start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats"),
            *("--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", ray_client),
            *("--dashboard-agent-listen-port", agent_http, "--dashboard-agent-grpc-port", agent_grpc),
        ],
        env={**os.environ, **deployment, **secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert head.stdout is not None
    try:
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail(f"ray start ended: {''.join(said)}")
        yield {
            **os.environ,
            **secret,
            "PATH": path,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
    finally:
        head.send_signal(signal.SIGTERM)  # with --block it ends all that it started
        head.communicate(timeout=120)


def _submit(client: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        _ray("job", "submit", *arguments),
        env=client,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_job_with_the_working_directory_and_a_configuration_file_runs(
    client: dict[str, str], folder: Path
) -> None:
    output = _submit(
        client, "--working-dir", ".", "--", "python", "-m", "arvideo_dist.pretrain",
        "--config", str(folder / "tiny.yaml"), "--run.name", "submitted",
    )  # fmt: skip
    assert "step 4/4" in output
    assert [step for step, _ in history(folder / "runs", "submitted", "loss/train")] == [1, 2, 3, 4]


def test_plain_job_takes_configuration_data_and_storage_from_the_environment(
    client: dict[str, str], folder: Path
) -> None:
    output = _submit(client, "--", "python", "-m", "arvideo_dist.pretrain")
    assert "run from-environment" in output
    assert [step for step, _ in history(folder / "runs", "from-environment", "loss/train")] == [1, 2, 3, 4]
    submitted = history(folder / "runs", "submitted", "loss/train")
    assert history(folder / "runs", "from-environment", "loss/train") == submitted


@pytest.mark.slow
def test_job_stop_leaves_a_checkpoint_of_the_step_that_was_running(
    client: dict[str, str], folder: Path
) -> None:
    submitted = [
        "--no-wait",
        "--submission-id",
        "to-be-stopped",
        "--",
        "python",
        "-m",
        "arvideo_dist.pretrain",
    ]
    _submit(client, *submitted, "--run.name", "stopped", "--train.steps", "4000", "--data.val_split", "null")
    logs = subprocess.Popen(
        _ray("job", "logs", "--follow", "to-be-stopped"),
        env=client,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert logs.stdout is not None
    lines = []
    for line in logs.stdout:
        lines.append(line)
        if "step 2/4000" in line:
            subprocess.run(_ray("job", "stop", "to-be-stopped"), env=client, check=True)
    assert logs.wait() == 0, "".join(lines)
    run = Storage(str(folder / "runs/stopped"))
    checkpoint = complete_checkpoints(run)[-1]
    assert any(f"saved up to step {int(checkpoint.removeprefix('step-'))};" in line for line in lines), lines
    (lease,) = run.names("lease")
    assert json.loads(run.read_bytes(f"lease/{lease}"))["released"]
