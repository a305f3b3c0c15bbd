"""A real MLflow server on sqlite that can hang, be killed and come back, and a relay that loses answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class MlflowServer:
    """`mlflow server` with database and artifacts in `folder`, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns once it answers."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"),
                *("--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", "*"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        seen, awaited = [], {"Application startup complete", "Uvicorn running on"}
        for line in self._process.stdout:
            seen.append(line)
            awaited = {words for words in awaited if words not in line}
            if not awaited:
                break
        assert self._process.poll() is None, "".join(seen)
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


class LossyRelay:
    """Relays connections to `port`, but the next `lose` answers, which it drops together with the connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.lose = 0
        self.lost = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = "http://{}:{}".format(*self._server.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            with suppress(OSError):
                while answer := server.recv(2**16):
                    if self.lose:
                        self.lose -= 1
                        self.lost += 1
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(answer)
                client.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
