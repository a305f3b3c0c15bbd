"""A real S3 server (moto's), which takes any credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from arvideo_dist.storage import Storage


@dataclass(frozen=True)
class S3:
    """The server at `address` (`host:port`)."""

    address: str

    def make_bucket(self, name: str) -> None:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=name)

    def uri(self, path: str, through: str | None = None) -> str:
        """Of a bucket or a folder in one, perhaps `through` a relay. With credentials in it: a fork server does not
        pass on what is added to the environment."""
        address = through or self.address
        return f"s3://test:test@{path}?endpoint_override={address}&scheme=http&region=us-east-1"

    def put(self, local: Storage, path: str) -> Storage:
        """Copy what is in the folder `local` to `path`."""
        remote = Storage(self.uri(path))
        for name in local.names():
            remote.put_file(Path(local.path(name)), name)
        return remote


@contextmanager
def s3_server() -> Iterator[S3]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        yield S3("{}:{}".format(*server.get_host_and_port()))
    finally:
        server.stop()
