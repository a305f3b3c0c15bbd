"""A store that is slow or hangs: a relay in front of a real server."""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress


class SlowStore:
    """Relays TCP connections to `upstream`. Each request takes the next entry of `delays`: seconds that it is
    kept waiting, or None: it is never answered. With none left it goes through at once."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.delays: deque[float | None] = deque()
        self.hangs = False  # every request from now on
        self.unanswered = 0
        self._never = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._requests, args=(client,), daemon=True).start()

    def _requests(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server, suppress(OSError):
            threading.Thread(target=_relay, args=(server, client), daemon=True).start()
            while request := client.recv(2**16):
                delay = None if self.hangs else self.delays.popleft() if self.delays else 0.0
                if delay is None:
                    self.unanswered += 1
                    while client.recv(2**16):  # until the client gives up
                        pass
                    return
                self._never.wait(delay)
                server.sendall(request)


def _relay(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
