"""One door to files, local or in object storage (`/path`, `s3://`, `gs://`), on pyarrow's filesystems.

Publishing: locally a file is written aside, synced and renamed, so a name never shows part of its content.
In object storage a pyarrow stream that is left by an exception publishes what it had; so members are sent
from finished bytes or files in one call, after which either the new content stands or what was there before, and
a *set* of members counts only through a small JSON written last that lists their sizes and digests.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

if TYPE_CHECKING:
    from arvideo_dist.s3 import S3Reader

Result = TypeVar("Result")

_CHUNK_BYTES = 8 * 2**20
_PATIENCE_S = 180.0
_LONGEST_PAUSE_S = 15.0
# What time does not mend: rights, a path through a file, a full disk, and the object stores' words for the same.
_LASTING = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.EEXIST,
}
_LASTING_WORDS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_CLIENT_OPTIONS = {
    # Google's client repeats a request for 15 minutes.
    "gs": "retry_limit_seconds=30",
    "gcs": "retry_limit_seconds=30",
    # Amazon's else publishes a small member by three requests instead of one.
    "s3": "allow_delayed_open=true",
}

_USER = re.compile(r"://[^/?@:\s]*(?::[^?\s]*)?@")
_SECRET_OPTION = re.compile(
    r"([?&](?:sig|[\w-]*(?:secret|token|password|key)[\w-]*)=)[^&\s'\"]*", re.IGNORECASE
)


class Storage:
    """A folder, local or remote, whose members are named by relative paths with forward slashes."""

    def __init__(self, uri: str) -> None:
        """`uri`: a local path (`~` allowed) or a URI that pyarrow knows, such as `s3://bucket/folder`.

        `address` opens the same folder again; `uri` is for people, without credentials that may stand in it.
        Raises ValueError for a scheme that pyarrow does not know, and OSError for a store that cannot be reached:
        S3 is asked for the region of a bucket whose URI does not name it.
        """
        self._s3: S3Reader | None = None
        if "://" in uri:
            try:
                self.fs, self.root = pafs.FileSystem.from_uri(_with_options(uri))
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and not lasts(error):
                    raise OSError(f"cannot open storage {shown(uri)!r}: {shown(error)}") from None
                raise ValueError(f"cannot open storage {shown(uri)!r}: {shown(error)}") from None
            if isinstance(self.fs, pafs.S3FileSystem):
                # botocore's import is for those who use it.
                from arvideo_dist.s3 import S3Reader

                # One made from a URI asks a silent server for 100 s, a copy (also what arrives in another
                # process) for 10 s: three attempts of 3 s.
                self.fs = copy.copy(self.fs)
                self._s3 = S3Reader(self.fs)
            base, mark, query = uri.partition("?")
            self.address = f"{base.rstrip('/')}{mark}{query}"
            self.root = self.root.rstrip("/")
        else:
            self.root = str(Path(uri).expanduser().resolve())
            self.fs, self.address = pafs.LocalFileSystem(), self.root
        self.uri = shown(self.address)
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def path(self, name: str = "") -> str:
        """The path of member `name` as this storage's pyarrow filesystem wants it."""
        return f"{self.root}/{name}" if name else self.root

    def child(self, name: str) -> Storage:
        """The folder `name` below this one."""
        base, mark, query = self.address.partition("?")
        return Storage(f"{base}/{name}{mark}{query}")

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        """Bytes of member `name`; raises FileNotFoundError."""
        info = self.fs.get_file_info(self.path(name))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}/{name}")
        return int(info.size)

    def names(self, folder: str = "") -> list[str]:
        """Sorted base names of what stands directly in `folder`; empty if it does not exist."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file that stands directly in `folder`, by its base name, as one listing tells them."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        found = self.fs.get_file_info(selector)
        return {info.base_name: int(info.size) for info in found if info.type == pafs.FileType.File}

    def read_bytes(self, name: str) -> bytes:
        """All of member `name`; raises FileNotFoundError. One request to an S3 store."""
        if self._s3 is not None and (content := self._s3.read(self.path(name))) is not None:
            return content
        with self.fs.open_input_stream(self.path(name), compression=None) as stream:
            return stream.read()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of member `name` from byte `offset`; fewer if the member ends before. Raises
        FileNotFoundError. One request to an S3 store."""
        if self._s3 is not None and (content := self._s3.read(self.path(name), offset, size)) is not None:
            return content
        with self.fs.open_input_file(self.path(name)) as file:
            left = max(0, file.size() - offset)  # object stores refuse to read past the end
            return file.read_at(min(size, left), offset) if left else b""

    def sha256(self, name: str) -> str:
        """Hex digest of member `name`, read in pieces."""
        digest = hashlib.sha256()
        with self.fs.open_input_stream(self.path(name), compression=None) as stream:
            while piece := stream.read(_CHUNK_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Publish `data` as member `name`."""
        if self.is_local:
            with self.writing(name) as aside:
                aside.write_bytes(data)
        else:
            self._upload(name, pa.py_buffer(data))

    def append(self, name: str, content: bytes) -> None:
        """Add `content` to the end of local file `name`: all of it or, if that raises OSError, nothing."""
        assert self.is_local, "object storage cannot append"
        self._before_change()
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, "only a part was written", str(path))
            except OSError:
                file.truncate(before)
                raise

    def put_file(self, local: Path, name: str) -> None:
        """Publish a copy of the finished file `local` as member `name`."""
        if self.is_local:
            with self.writing(name) as aside:
                shutil.copyfile(local, aside)
        else:
            empty = not local.stat().st_size  # which cannot be mapped
            self._upload(name, pa.py_buffer(b"") if empty else pa.memory_map(str(local)).read_buffer())

    def local_copy(self, name: str, scratch: Path) -> Path:
        """A local file with the content of member `name`: itself if local, else downloaded to `scratch`."""
        if self.is_local:
            return Path(self.path(name))
        target = scratch / Path(name).name
        with (
            self.fs.open_input_stream(self.path(name), compression=None) as source,
            open(target, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        return target

    def delete(self, name: str) -> None:
        """Remove member or folder `name`; nothing happens if it does not exist."""
        self._before_change()
        kind = self.fs.get_file_info(self.path(name)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.path(name))

    def clear_partial(self, *prefixes: str) -> None:
        """Remove what killed writers left of local members whose names begin with one of `prefixes`.

        Only for who is sure that nobody is writing them now.
        """
        for name in self.names() if self.is_local else []:
            if name.endswith(".partial") and name.startswith(tuple(f".{prefix}" for prefix in prefixes)):
                self.delete(name)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to; on a clean exit its content is synced and appears as member `name`.

        Nothing is published if the caller left no file there.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory() as scratch:
                aside = Path(scratch) / "member"
                yield aside
                if aside.exists():
                    self.put_file(aside, name)
            return
        target = Path(self.path(name))
        self._before_change()
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            yield aside
            if aside.exists():
                sync(aside)
                self._before_change()
                os.replace(aside, target)
                sync(target.parent)
        finally:
            aside.unlink(missing_ok=True)

    def _before_change(self) -> None:
        """Called before anything is written, published or removed; a subclass may refuse by raising."""

    @contextlib.contextmanager
    def streaming(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to in pieces; on a clean exit its content appears as member `name`, synced if local.

        `name` must be new: in object storage a failure removes the member, whose content may be cut off.
        """
        if self.is_local:
            with self.writing(name) as aside, open(aside, "wb") as file:
                yield file
            return
        self._before_change()
        try:
            with self.fs.open_output_stream(self.path(name), compression=None) as stream:
                yield stream
        except BaseException:
            with contextlib.suppress(OSError):
                Storage.delete(self, name)  # once, also if the storage is patient: the upload may follow
            raise

    def _upload(self, name: str, content: pa.Buffer) -> None:
        """In one call, so that nothing but the store's own refusal ends it, which leaves the old member."""
        self._before_change()
        with self.fs.open_output_stream(self.path(name), compression=None) as stream:
            stream.write(content)


def is_missing(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError)


def is_full(error: OSError) -> bool:
    """Whether a disk is full or may only be read: a person makes room, no waiting does."""
    return error.errno in _FULL


def is_missing_or_full(error: OSError) -> bool:
    return is_missing(error) or is_full(error)


def lasts(error: OSError) -> bool:
    """Whether time alone does not mend `error`."""
    words = any(word in str(error) for word in _LASTING_WORDS)
    return error.errno in _LASTING or is_missing(error) or words


def patiently(
    action: Callable[[], Result],
    patience_s: float = _PATIENCE_S,
    is_answer: Callable[[OSError], bool] = is_missing_or_full,
) -> Result:
    """The result of `action`, tried again with growing pauses while the storage fails; what fails still after
    `patience_s` seconds is raised.

    Only for actions that may be done twice. An error that `is_answer`, such as a missing member or a full disk, is
    raised at once.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except OSError as error:
            if is_answer(error) or time.monotonic() - began + pause > patience_s:
                raise
            print(f"tried again in {pause:g} s: {error}", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def shown(text: object) -> str:
    """`text`, a URI or an error that may name some, for people and logs: without the credentials in it.

    What follows a user's name and colon is secret up to the last `@`, as keys may hold slashes; so are options such
    as a signature or a client's secret.
    """
    return _SECRET_OPTION.sub(r"\1***", _USER.sub("://***@", str(text)))


def without_credentials(value: Any) -> Any:
    """`value`, of JSON's types, with every string in it as `shown`."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {key: without_credentials(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_credentials(each) for each in value]
    return value


class PatientStorage(Storage):
    """A storage that may fail for a while: what reads and publishes whole members is done `patiently`."""

    def exists(self, name: str = "") -> bool:
        return self._patiently(partial(super().exists, name))

    def size(self, name: str) -> int:
        return self._patiently(partial(super().size, name))

    def names(self, folder: str = "") -> list[str]:
        return self._patiently(partial(super().names, folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        return self._patiently(partial(super().sizes, folder))

    def read_bytes(self, name: str) -> bytes:
        return self._patiently(partial(super().read_bytes, name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self._patiently(partial(super().read_range, name, offset, size))

    def sha256(self, name: str) -> str:
        return self._patiently(partial(super().sha256, name))

    def write_bytes(self, name: str, data: bytes) -> None:
        self._patiently(partial(super().write_bytes, name, data))

    def put_file(self, local: Path, name: str) -> None:
        self._patiently(partial(super().put_file, local, name))

    def delete(self, name: str) -> None:
        self._patiently(partial(super().delete, name))

    @staticmethod
    def _patiently(action: Callable[[], Result]) -> Result:
        return patiently(action, is_answer=lasts)


def _with_options(uri: str) -> str:
    """`uri` with this project's option for its client, if it does not have it."""
    option = _CLIENT_OPTIONS.get(uri.partition("://")[0])
    if option is None or f"{option.partition('=')[0]}=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}{option}"


def sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
