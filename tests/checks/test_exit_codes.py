"""A store that cannot be reached asks for the same command again (75), whatever the kind of failure; what needs a
person does not (2)."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.fs as pafs
import pytest

from arvideo_dist import command
from arvideo_dist.checks import start
from arvideo_dist.checks.finding import Finding
from arvideo_dist.checks.stores import check_mlflow, check_storage
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.pretrain import main
from arvideo_dist.storage import Storage
from tests.data.conftest import FRAMES, write_dataset
from tests.services.s3 import S3
from tests.train.runs import TINY

AGAIN, A_PERSON = 75, 2


class Answers:
    """A server that gives every request the same answer, or none (None)."""

    def __init__(self, status: int | None, body: bytes = b"", certificate: Path | None = None) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self._answer = None
        if status is not None:
            head = f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self._answer = head.encode() + body
        self._tls = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with client:
                asked = client.recv(2**16)
                method = asked.partition(b" ")[0]
                if self._answer is None:
                    while client.recv(2**16):  # until the client gives up
                        pass
                    return
                client.sendall(
                    self._answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
                    if method == b"HEAD"
                    else self._answer
                )
        except OSError:  # a client that has given up, or does not trust the certificate
            return

    def close(self) -> None:
        self._server.close()


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def _closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "{}:{}".format(*probe.getsockname())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nobody has signed."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    subprocess.run([*command, "-keyout", str(file), "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@pytest.fixture(scope="module")
def found(
    s3: S3, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Finding]]:
    """What the check of the run's storage finds, by kind of failure; all at once, since they wait."""
    unavailable = Answers(503, _error("ServiceUnavailable"))
    internal = Answers(500, _error("InternalError"))
    denied = Answers(403, _error("AccessDenied"))
    silent, tls = Answers(None), Answers(200, b"", certificate)
    file = tmp_path_factory.mktemp("stores") / "a file"
    file.touch()
    stores = {
        "connection refused": s3.uri("runs", through=_closed_port()),
        "unknown host": s3.uri("runs", through="no-such-host.invalid:9000"),
        "no answer": s3.uri("runs", through=silent.address),
        "untrusted certificate": s3.uri("runs", through=tls.address).replace("scheme=http", "scheme=https"),
        "no TLS there": s3.uri("runs", through=denied.address).replace("scheme=http", "scheme=https"),
        "503": s3.uri("runs", through=unavailable.address),
        "500": s3.uri("runs", through=internal.address),
        "403": s3.uri("runs", through=denied.address),
        "no such bucket": s3.uri("no-such-bucket"),
        "a file in its place": str(file),
    }
    with ThreadPoolExecutor(len(stores)) as threads:
        findings = threads.map(lambda uri: check_storage(_config(uri), 64), stores.values())
        yield dict(zip(stores, findings, strict=True))
    for server in (unavailable, internal, denied, silent, tls):
        server.close()


def _config(storage_path: str, **sections: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {**TINY, "run": {"name": "new", "storage_path": storage_path}, **sections}
    )


def _code(findings: list[Finding], run: Storage, monkeypatch: pytest.MonkeyPatch) -> int:
    """That `pretrain` ends with where its start finds this."""

    def check(config: PretrainConfig) -> None:
        start._stop_at_errors(findings, run)

    return _exit_code(monkeypatch, check)


def _exit_code(monkeypatch: pytest.MonkeyPatch, check: Callable[[PretrainConfig], None]) -> int:
    monkeypatch.setattr(command, "check_driver", check)
    monkeypatch.setattr(command, "already_finished", lambda config: None)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("connection refused", AGAIN),
        ("unknown host", AGAIN),
        ("no answer", AGAIN),
        ("untrusted certificate", AGAIN),
        ("no TLS there", AGAIN),
        ("503", AGAIN),
        ("500", AGAIN),
        ("403", A_PERSON),
        ("no such bucket", A_PERSON),
        ("a file in its place", A_PERSON),
    ],
)
def test_the_exit_code_of_a_new_run_goes_by_whether_a_person_is_needed(
    found: dict[str, Finding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    new = Storage(str(tmp_path / "new"))
    assert _code([found[kind]], new, monkeypatch) == code, found[kind].message
    assert "check run.storage_path" in found[kind].message


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN]
)
def test_a_mount_that_fails_asks_for_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with mock.patch.object(Storage, "exists", side_effect=OSError(number, "mount")):
        finding = check_storage(_config(str(tmp_path)), 64)
    assert _code([finding], Storage(str(tmp_path / "new")), monkeypatch) == AGAIN


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_forbidden_disk_asks_for_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with mock.patch.object(Storage, "write_bytes", side_effect=OSError(number, "disk")):
        finding = check_storage(_config(str(tmp_path)), 64)
    assert _code([finding], Storage(str(tmp_path / "new")), monkeypatch) == A_PERSON


def test_a_bucket_whose_region_cannot_be_asked_for_is_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a URI that names no region, S3 is asked when the storage is opened."""
    write_dataset(tmp_path / "data", [b"x"], FRAMES[:1])
    lost = OSError("When resolving region for bucket 'runs': AWS Error NETWORK_CONNECTION: curlCode: 6")
    opened = pafs.FileSystem.from_uri

    def from_uri(uri: str) -> Any:
        if uri.startswith("s3://"):
            raise lost
        return opened(uri)

    monkeypatch.setattr(start, "retried", lambda check, say: check())
    with mock.patch.object(pafs, "FileSystem", mock.Mock(from_uri=from_uri)):
        for arguments in (
            ["--run.storage_path", "s3://runs/here", "--data.path", str(tmp_path / "data")],
            ["--run.storage_path", str(tmp_path), "--data.path", "s3://data/k400"],
        ):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == AGAIN
            assert "NETWORK_CONNECTION" in capsys.readouterr().err


def test_a_tracking_server_that_cannot_be_reached_is_one_that_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unavailable, forbidden = Answers(503), Answers(403)
    new = Storage(str(tmp_path / "new"))
    for address, code in (
        (_closed_port(), AGAIN),
        ("no-such-host.invalid:5000", AGAIN),
        (unavailable.address, AGAIN),
        (forbidden.address, A_PERSON),
    ):
        assert _code([check_mlflow(f"http://{address}")], new, monkeypatch) == code, address
    unavailable.close()
    forbidden.close()
