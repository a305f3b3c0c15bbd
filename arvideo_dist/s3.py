"""Objects of an S3 store, whole or a range of their bytes, at one request each.

pyarrow asks for an object's size before each read, and its Python interface cannot be told one that is known. Here
a read is one request, signed by botocore and sent by urllib3. Only plain answers count: of everything else `read`
makes nothing, and its caller reads through pyarrow, whose repetitions, redirections and errors hold.
"""

from __future__ import annotations

import errno
import logging
import os
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs
import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError
from botocore.session import get_session

log = logging.getLogger(__name__)

_SILENCE_S = 3.0  # after which a request is given up, as by pyarrow's client
_REFUSALS = 3  # in a row; then this way does not suit the store and is left


class S3Reader:
    """Reads what the file system `fs` reads, from any thread; may be sent to other processes."""

    def __init__(self, fs: pafs.S3FileSystem) -> None:
        self._fs = fs
        # What goes to another process: the options in force, from the address or by default.
        self._options: dict[str, Any] = fs.__reduce__()[1][0]
        self._is_left = bool(self._options["role_arn"] or self._options["proxy_options"]["host"])
        self._refusals = 0

    def __reduce__(self) -> tuple[type[S3Reader], tuple[pafs.S3FileSystem]]:
        return S3Reader, (self._fs,)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes | None:
        """`size` bytes of the object `path` (`bucket/key`) from byte `offset`, fewer if it ends before; without
        `size` all of it. None if pyarrow has to do it. Raises FileNotFoundError."""
        if self._is_left or size == 0:
            return None
        wanted = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
        try:
            request = self._signed(self.url(path), wanted)
            with _pool(os.getpid(), self._options["tls_ca_file_path"]).request(
                "GET", request.url, headers=dict(request.headers), preload_content=False, decode_content=False
            ) as response:
                if response.status == (200 if size is None else 206):
                    content = response.read()
                    self._refusals = 0
                    return content
                if response.status == 404:
                    response.read()  # an answer that was read to its end leaves the connection for the next one
                    raise FileNotFoundError(errno.ENOENT, f"Path does not exist '{path}'")
                if response.status in (301, 307, 400, 401, 403):
                    self._note_refusal(path, f"status {response.status}")
        except urllib3.exceptions.SSLError as error:
            self._note_refusal(path, str(error))
        except (urllib3.exceptions.HTTPError, BotoCoreError):
            pass
        return None

    def _note_refusal(self, path: str, reason: str) -> None:
        self._refusals += 1
        if self._refusals == _REFUSALS:
            self._is_left = True
            log.warning("reads of bucket %s now take two requests each: %s", path.partition("/")[0], reason)

    def url(self, path: str) -> str:
        """Names the bucket as pyarrow's client does: before the host, but for an endpoint that was given."""
        bucket, _, key = path.partition("/")
        host, scheme, region = (self._options[each] for each in ("endpoint_override", "scheme", "region"))
        in_host = "." not in bucket and (self._options["force_virtual_addressing"] or not host)
        host = host or f"s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
        if "://" in host:
            scheme, _, host = host.partition("://")
        key = quote(key, safe="/~")
        host = host.rstrip("/")
        return f"{scheme}://{bucket}.{host}/{key}" if in_host else f"{scheme}://{host}/{bucket}/{key}"

    def _signed(self, url: str, headers: dict[str, str]) -> AWSRequest:
        request = AWSRequest("GET", url, headers=headers)
        if self._options["anonymous"]:
            return request
        key = self._options["access_key"]
        given = (
            Credentials(key, self._options["secret_key"], self._options["session_token"] or None)
            if key
            else None
        )
        credentials = given or _found_credentials()
        if credentials is not None:
            S3SigV4Auth(credentials, "s3", self._options["region"]).add_auth(request)
        return request


@lru_cache(maxsize=1)
def _found_credentials() -> Any:
    """Those of this machine, which renew themselves; None if there are none."""
    return get_session().get_credentials()


@lru_cache(maxsize=4)
def _pool(process: int, ca_file: str) -> urllib3.PoolManager:
    """Connections of this `process`, kept open: one that was forked has to have its own."""
    timeout = urllib3.Timeout(connect=_SILENCE_S, read=_SILENCE_S)
    return urllib3.PoolManager(maxsize=16, timeout=timeout, retries=False, ca_certs=ca_file or None)
