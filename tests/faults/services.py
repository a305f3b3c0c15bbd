"""What a run depends on, made to fail: an object store, a tracking server, nodes, a disk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow.tracking import MlflowClient


class Relay:
    """Relays TCP connections to `upstream` until it is cut; while it is cut every connection ends at once."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        self._cut.set()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        try:
            yield
        finally:
            self._cut.clear()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                if self._cut.is_set():
                    self.refused += 1
                    client.close()
                else:
                    threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            self._open |= {client, server}
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()
            self._open -= {client, server}


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class TrackingServer:
    """A real `mlflow server` on a sqlite file, which may be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("mlflow")), "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(self._port)),
                *("--backend-store-uri", f"sqlite:///{self._folder}/server.db"),
                *("--artifacts-destination", str(self._folder / "artifacts")),
            ],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
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
        threading.Thread(target=self._drain, args=(self._process,), daemon=True).start()
        MlflowClient(tracking_uri=self.uri).search_experiments()

    @staticmethod
    def _drain(process: subprocess.Popen[str]) -> None:
        """Nobody reads what it says, and a full pipe would hold it up."""
        assert process.stdout is not None
        with suppress(ValueError):
            for _ in process.stdout:
                pass

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[None]:
    """A file system of its own at `folder`; OSError where this process may not mount."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
