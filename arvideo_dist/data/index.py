"""A data set on storage: WebDataset shards, one Parquet index a split, and the manifest that makes it exist.

`data_prep` writes these files and the loader reads them; this module is the one definition both use.

    <split>-000000.tar ...     samples `<key>.mp4` + `<key>.json`, plain WebDataset
    index-<split>.parquet      a row for each sample (INDEX_SCHEMA)
    rejects-<split>.parquet    a row for each refused input (REJECTS_SCHEMA)
    dataset-<split>.json       DatasetManifest, written last: without it the split does not exist
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arvideo_dist.storage import Storage, lasts, patiently, sync

FORMAT_VERSION = 1

_PATIENCE_S = 180.0  # with a store that fails: a worker's loss costs steps

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique in the split; also the members' base name in the tar
        ("shard", pa.string()),  # the tar's file name
        ("offset", pa.int64()),  # first byte of the video member's content in the tar
        ("size", pa.int64()),  # bytes of the video member
        ("sha256", pa.string()),  # hex digest of the video member
        ("width", pa.int32()),  # pixels, as stored in the shard
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("frames", pa.int32()),
        ("duration", pa.float64()),  # seconds
        ("label", pa.int32()),  # -1 if there is none
        ("label_name", pa.string()),  # null if there is none
        ("source", pa.string()),  # the input file, relative to the input folder, or what made the clip
    ]
)

REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"index-{split}.parquet"


def rejects_name(split: str) -> str:
    return f"rejects-{split}.parquet"


def manifest_name(split: str) -> str:
    return f"dataset-{split}.json"


class FileEntry(BaseModel):
    """One published file of the split."""

    model_config = ConfigDict(extra="forbid")
    name: str
    size: int = Field(description="bytes")
    sha256: str


class ShardEntry(FileEntry):
    samples: int


class DatasetManifest(BaseModel):
    """`dataset-<split>.json`: what the split consists of and the settings that made it."""

    model_config = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    split: str
    samples: int
    rejects: int
    labels: list[str] = Field(description="label names by label index; empty if the set has no labels")
    settings: dict[str, Any] = Field(description="every setting that decides the shards' bytes")
    fingerprint: str = Field(description="sha256 of the settings, encoder version and thread count included")
    index: FileEntry
    rejects_file: FileEntry
    shards: list[ShardEntry]


@dataclass(frozen=True)
class SampleRow:
    """One row of the index: where a sample's video stands and what it is."""

    key: str
    shard: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    fps: float
    frames: int
    duration: float
    label: int
    label_name: str | None
    source: str


def load_manifest(storage: Storage, split: str, patience_s: float = _PATIENCE_S) -> DatasetManifest:
    """Read the manifest of `split`. Raises ValueError if it is missing or not written by data_prep.

    A storage that fails is asked again for `patience_s` seconds.
    """
    return patiently(partial(_read_manifest, storage, split), patience_s, is_answer=lasts)


def _read_manifest(storage: Storage, split: str) -> DatasetManifest:
    name = manifest_name(split)
    try:
        content = storage.read_bytes(name)
    except FileNotFoundError:
        found = [n for n in storage.names() if n.startswith("dataset-") and n.endswith(".json")]
        splits = ", ".join(n[len("dataset-") : -len(".json")] for n in found) or "none"
        raise ValueError(
            f"no data set at {storage.uri}: {name} is missing (splits found there: {splits}). "
            "Make one with `python -m data_prep`, or point data.path at one."
        ) from None
    try:
        manifest = DatasetManifest.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{storage.uri}/{name} is not a data set manifest: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{storage.uri}/{name} has format version {manifest.format_version}, "
            f"this release reads {FORMAT_VERSION}: prepare the data set again"
        )
    return manifest


class DatasetIndex:
    """The rows of one split, memory-mapped: all processes of a node share one copy in the page cache."""

    def __init__(self, arrow_file: Path) -> None:
        self._arrow_file = arrow_file
        self._map = pa.memory_map(str(arrow_file))
        self.table = pa.ipc.open_file(self._map).read_all()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> SampleRow:
        return SampleRow(**{name: self.table[name][row].as_py() for name in INDEX_SCHEMA.names})

    def shards_at(self, rows: NDArray[np.int64]) -> list[str]:
        """The shards of `rows`."""
        return self.table["shard"].take(pa.array(rows)).to_pylist()

    def __reduce__(self) -> tuple[type[DatasetIndex], tuple[Path]]:
        return DatasetIndex, (self._arrow_file,)  # loader workers map the same file instead of copying rows


def index_cache() -> Path:
    """The folder of this node in which `open_index` keeps its Arrow files."""
    return Path(tempfile.gettempdir()) / f"arvideo-index-{os.getuid()}"


def open_index(
    storage: Storage, split: str, cache: Path | None = None, manifest: DatasetManifest | None = None
) -> DatasetIndex:
    """Open the index of `split`, verified against its `manifest` (read here if it is not given).

    The Parquet file is turned once a node into an uncompressed Arrow file under `cache` (default: the
    system's temporary folder), named by its digest, and mapped from there. Raises ValueError if the
    split is missing or its index is not the one that the manifest names.
    """
    manifest = manifest or load_manifest(storage, split)
    cache = cache or index_cache()
    target = cache / f"{manifest.index.sha256}.arrow"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        make = partial(_make_arrow_once, storage, split, manifest.index, target)
        patiently(make, _PATIENCE_S, is_answer=lasts)
    return DatasetIndex(target)


def _make_arrow_once(storage: Storage, split: str, index: FileEntry, target: Path) -> None:
    """One of the node's processes makes it, which takes memory and the store's time, while the others wait."""
    with target.with_suffix(".lock").open("w") as lock:  # the kernel's: it ends with its holder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _make_arrow(storage, split, index, target)


def _make_arrow(storage: Storage, split: str, index: FileEntry, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        parquet = storage.local_copy(index.name, Path(scratch))
        if Storage(str(parquet.parent)).sha256(parquet.name) != index.sha256:
            raise ValueError(
                f"{storage.uri}/{index.name} does not match {manifest_name(split)}: "
                "the data set is damaged or half replaced; run `python -m data_prep` for it again"
            )
        arrow = Path(scratch) / "index.arrow"
        # A piece at a time: an index of 10^8 rows takes 20 GB, one of a million rows 300 MB at once.
        with pq.ParquetFile(parquet) as file, pa.ipc.new_file(str(arrow), INDEX_SCHEMA) as writer:
            for batch in file.iter_batches(batch_size=2**17):
                writer.write_table(pa.Table.from_batches([batch]).cast(INDEX_SCHEMA))
        sync(arrow)
        arrow.replace(target)
