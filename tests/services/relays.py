"""Relays in front of a real server: slow, hanging, cut off, losing answers, refusing writes, hiding what is there,
counting bytes or requests."""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_REQUEST = re.compile(rb"((?:GET|HEAD|PUT|POST|DELETE) \S+) HTTP/1\.1\r\n")


class Relay:
    """Relays TCP connections to `upstream` (`host:port`); what it does with them is its subclasses' matter."""

    def __init__(self, upstream: str) -> None:
        host, port = upstream.split(":")
        self._upstream = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server, suppress(OSError):
            self._serve(client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, from its first to its last byte."""
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        _copy(client, server)


class SlowStore(Relay):
    """Each request takes the next entry of `delays`: seconds that it is kept waiting, or None: it is never
    answered. With none left it goes through at once."""

    def __init__(self, upstream: str) -> None:
        self.delays: deque[float | None] = deque()
        self.hangs = False  # every request from now on
        self.unanswered = 0
        self._never = threading.Event()
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        while request := client.recv(2**16):
            delay = None if self.hangs else self.delays.popleft() if self.delays else 0.0
            if delay is None:
                self.unanswered += 1
                while client.recv(2**16):  # until the client gives up
                    pass
                return
            self._never.wait(delay)
            server.sendall(request)


class CutOff(Relay):
    """While it is cut every connection ends at once."""

    def __init__(self, upstream: str) -> None:
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        self.refused = 0
        super().__init__(upstream)

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

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        if self._cut.is_set():
            self.refused += 1
            return
        self._open |= {client, server}
        back = threading.Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)
        back.join()
        self._open -= {client, server}


class LosesAnswers(Relay):
    """Drops the next `lose` answers together with their connections."""

    def __init__(self, upstream: str) -> None:
        self.lose = 0
        self.lost = 0
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        while answer := server.recv(2**16):
            if self.lose:
                self.lose -= 1
                self.lost += 1
                client.shutdown(socket.SHUT_RDWR)
                return
            client.sendall(answer)
        client.shutdown(socket.SHUT_RDWR)


class RefusesWrites(Relay):
    """While `refuses`, no request with a body gets to the store: a full bucket, or one that may only be read."""

    def __init__(self, upstream: str) -> None:
        self.refuses = False
        self.refused = 0
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        while request := client.recv(2**16):
            if self.refuses and request.startswith((b"PUT ", b"POST ")):
                self.refused += 1
                body = b"<Error><Code>QuotaExceeded</Code><Message>The bucket is full</Message></Error>"
                head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + body)
                return
            server.sendall(request)


class RefusesOthers(Relay):
    """Takes requests of pyarrow's client only."""

    def __init__(self, upstream: str) -> None:
        self.refused = 0
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        while request := client.recv(2**16):
            if _REQUEST.match(request) and b"aws-sdk-cpp" not in request:
                self.refused += 1
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            server.sendall(request)


class CutsAnswers(Relay):
    """Ends the connection within each of the next `cut` answers that are longer than a packet."""

    def __init__(self, upstream: str) -> None:
        self.cut = 0
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        while answer := server.recv(2**16):
            client.sendall(answer)
            if self.cut and len(answer) > 4096:
                self.cut -= 1
                break
        client.shutdown(socket.SHUT_RDWR)


class EmptyListings(Relay):
    """While it is `empty` every listing of a bucket is answered with nothing in it; all else goes through."""

    def __init__(self, upstream: str) -> None:
        self.empty = False
        self.listings = 0
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        while request := client.recv(2**16):
            if self.empty and request.startswith(b"GET ") and b"list-type=2" in request.split(b"\r\n")[0]:
                self.listings += 1
                body = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                client.sendall(head.encode() + body)
            else:
                server.sendall(request)


class Counts(Relay):
    """Counts the bytes that come from the server."""

    def __init__(self, upstream: str) -> None:
        self.received = 0
        self._counting = threading.Lock()
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        while answer := server.recv(2**16):
            with self._counting:
                self.received += len(answer)
            client.sendall(answer)
        client.shutdown(socket.SHUT_RDWR)


class Requests(Relay):
    """Keeps what each request asked for: `GET /bucket/key`, with the query where it has one."""

    def __init__(self, upstream: str) -> None:
        self.seen: list[str] = []
        super().__init__(upstream)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_copy, args=(server, client), daemon=True).start()
        while request := client.recv(2**16):
            if found := _REQUEST.match(request):
                self.seen.append(found[1].decode())
            server.sendall(request)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
