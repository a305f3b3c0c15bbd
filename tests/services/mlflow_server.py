"""A real MLflow server on sqlite that can hang, be killed and come back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from filelock import FileLock

from tests import warm


def new_database(file: Path) -> str:
    """The address of an empty database at `file`; MLflow makes the first of a session, which takes it 4 s."""
    made = warm.shared_folder() / "mlflow.db"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            new = made.with_suffix(".new")
            code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{new}').search_experiments()"
            subprocess.run([warm.python(), "-c", code], check=True)
            new.rename(made)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, file)
    return f"sqlite:///{file}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_port(process: subprocess.Popen[str]) -> None:
    """Read what an MLflow server prints until its port is open; AssertionError with it if the server ends."""
    assert process.stdout is not None
    # Which of the two comes last depends on how uvicorn is started; the port is open after both.
    seen, awaited = [], {"Application startup complete", "Uvicorn running on"}
    for line in process.stdout:
        seen.append(line)
        awaited = {words for words in awaited if words not in line}
        if not awaited:
            break
    assert process.poll() is None, "".join(seen)


class MlflowServer:
    """`mlflow server` with database and artifacts in `folder`, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.database = new_database(folder / "mlflow.db")
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns once it answers."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", self.database, "--workers", "1"),
                *("--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", "*"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        await_port(self._process)
        threading.Thread(target=self._process.stdout.read, daemon=True).start()  # so that it never blocks
        search = f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
        urllib.request.urlopen(search, timeout=60).close()  # the first answer takes longest

    def hang(self) -> None:
        """From now on connections are accepted and requests are taken, but not answered."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again, also what came meanwhile."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # it is a tree of processes
        self._process.wait()
