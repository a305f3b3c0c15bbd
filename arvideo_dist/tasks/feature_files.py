"""Files of features: written in pieces, read as one vector a video.

    features.parquet        a row a view: key, view, label, label_name, features (flat); what made them as metadata
    features.safetensors    tensor `features` [N, V, D] or [N, V, L, D]; NaN: a view that could not be read
    features.json           beside it: what made them, and keys, labels and label names of the N videos

Keys stand beside the tensor because the header of a safetensors file may have 100 MB.

Letters: N videos, V views of each, L tokens of a view, D width, R rows of a piece.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arvideo_dist.data.index import DatasetIndex
from arvideo_dist.data.views import Views
from arvideo_dist.storage import Storage

PARQUET, SAFETENSORS, KEYS = "features.parquet", "features.safetensors", "features.json"
_ABOUT = "arvideo_dist.features"
_ROWS_AT_ONCE_BYTES = 2**25


class FeatureRows(NamedTuple):
    """Some views in the order of videos and views."""

    videos_r: NDArray[np.int64]
    views_r: NDArray[np.int64]
    values_rx: NDArray[np.float32]  # flat


def write_parquet(
    path: Path, rows: Iterable[FeatureRows], index: DatasetIndex, about: dict[str, Any]
) -> None:
    """A row group for each of `rows`."""
    numbers = math.prod(about["shape"])
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("view", pa.int32()),
            ("label", pa.int32()),  # null if there is none
            ("label_name", pa.string()),
            ("features", pa.list_(pa.float32(), numbers)),
        ],
        metadata={_ABOUT: json.dumps(about)},
    )
    columns = index.table.select(["key", "label", "label_name"])
    with pq.ParquetWriter(path, schema, use_dictionary=["label_name"]) as writer:
        for group in rows:
            first, last = int(group.videos_r[0]), int(group.videos_r[-1])
            # Of a slice: taken from all chunks of a large index, each group would copy the whole of it.
            videos = columns.slice(first, last - first + 1).take(pa.array(group.videos_r - first))
            labels = videos["label"].to_numpy()
            features = pa.FixedSizeListArray.from_arrays(pa.array(group.values_rx.ravel()), numbers)
            table = pa.table(
                {
                    "key": videos["key"],
                    "view": pa.array(group.views_r.astype(np.int32)),
                    "label": pa.array(labels, mask=labels < 0),
                    "label_name": videos["label_name"],
                    "features": features,
                },
                schema=schema,
            )
            writer.write_table(table, row_group_size=len(group.videos_r))


def write_safetensors(
    path: Path, rows: Iterable[FeatureRows], index: DatasetIndex, about: dict[str, Any]
) -> None:
    """Written as they come: the format is a header of JSON behind its length in 8 bytes, then the numbers."""
    views = len(Views.parse(about["views"]))
    shape = [len(index), views, *about["shape"]]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({"__metadata__": {_ABOUT: json.dumps(about)}, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    unread = np.full(math.prod(about["shape"]), np.nan, dtype=np.float32).tobytes()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        place = 0
        for group in rows:
            for at, values in zip(
                (group.videos_r * views + group.views_r).tolist(), group.values_rx, strict=True
            ):
                for _ in range(place, at):
                    file.write(unread)
                file.write(values.tobytes())
                place = at + 1
        for _ in range(place, len(index) * views):
            file.write(unread)


def write_keys(path: Path, index: DatasetIndex, about: dict[str, Any]) -> None:
    """What a tensor does not say of its videos."""
    labels = [None if label < 0 else label for label in index.table["label"].to_pylist()]
    names = index.table["label_name"].to_pylist()
    content = {"about": about, "keys": index.table["key"].to_pylist(), "labels": labels, "label_names": names}
    path.write_text(json.dumps(content))


Fill = Callable[[Path, Iterable[FeatureRows], DatasetIndex, dict[str, Any]], None]
FORMATS: dict[str, tuple[str, Fill]] = {
    "parquet": (PARQUET, write_parquet),
    "safetensors": (SAFETENSORS, write_safetensors),
}


@dataclass(frozen=True)
class VideoFeatures:
    """One vector a video: the mean over its views that were read and, of whole tokens, over these.

    A video without any view is left out.
    """

    about: dict[str, Any]  # what made them (`Embedding.about`)
    keys: list[str]
    labels: list[int | None]
    label_names: list[str | None]
    values_nd: NDArray[np.float32]


def read_features(address: str) -> VideoFeatures:
    """Of a file of features, or of the folder of a run that made one. Raises ValueError if it is none."""
    folder, name = _located(address)
    with tempfile.TemporaryDirectory() as scratch:
        local = folder.local_copy(name, Path(scratch))
        if name.endswith(".safetensors"):
            return _read_safetensors(local, json.loads(folder.read_bytes(KEYS)))
        return _read_parquet(local, f"{folder.uri}/{name}")


def _located(address: str) -> tuple[Storage, str]:
    path, mark, query = address.partition("?")  # of an address in object storage
    above, _, name = path.rstrip("/").rpartition("/")
    if name.endswith((".parquet", ".safetensors")):
        folder, names = Storage(f"{above or '.'}{mark}{query}"), [name]
    else:
        folder, names = Storage(address), [PARQUET, SAFETENSORS]
    for found in names:
        if folder.exists(found):
            if found.endswith(".safetensors") and not folder.exists(KEYS):
                raise ValueError(
                    f"{folder.uri}/{found} has no {KEYS} beside it, which holds the videos' keys"
                )
            return folder, found
    raise ValueError(
        f"no features at {folder.uri}: neither {' nor '.join(names)} is there; make some with python -m "
        "arvideo_dist.embed SOURCE --data PATH"
        if len(names) > 1
        else f"no such file: {folder.uri}/{name}"
    )


def _read_parquet(path: Path, uri: str) -> VideoFeatures:
    with pq.ParquetFile(path) as file:
        told = (file.schema_arrow.metadata or {}).get(_ABOUT.encode())
        if told is None:
            raise ValueError(f"{uri} is no file of features made by python -m arvideo_dist.embed")
        about = json.loads(told)
        found = VideoFeatures(about, [], [], [], np.zeros((0, about["shape"][-1]), dtype=np.float32))
        vectors = list[NDArray[np.float32]]()
        # The views of a video stand one after the other.
        for (key, label, name), views in itertools.groupby(_rows(file, about), key=lambda row: row[:3]):
            found.keys.append(key)
            found.labels.append(label)
            found.label_names.append(name)
            mean = np.mean([row[3] for row in views], axis=0, dtype=np.float64)
            vectors.append(np.asarray(mean, dtype=np.float32))
    return replace(found, values_nd=np.stack(vectors)) if vectors else found


def _rows(file: pq.ParquetFile, about: dict[str, Any]) -> Iterator[tuple[Any, Any, Any, NDArray[np.float32]]]:
    """Key, label, label name and vector [D] of each view."""
    at_once = max(1, _ROWS_AT_ONCE_BYTES // (4 * math.prod(about["shape"])))
    for batch in file.iter_batches(at_once, columns=["key", "label", "label_name", "features"]):
        values = batch["features"].flatten().to_numpy().reshape(len(batch), -1, about["shape"][-1])
        columns = (batch[name].to_pylist() for name in ("key", "label", "label_name"))
        yield from zip(*columns, values.mean(axis=1), strict=True)


def _read_safetensors(path: Path, beside: dict[str, Any]) -> VideoFeatures:
    from safetensors import safe_open

    about, vectors, read = beside["about"], list[Any](), list[int]()
    with safe_open(path, framework="np") as file:
        features = file.get_slice("features")
        for video in range(len(beside["keys"])):
            views = features[video]
            if views.ndim == 3:
                views = views.mean(axis=1)
            used = ~np.isnan(views).any(axis=1)
            if used.any():
                vectors.append(views[used].mean(axis=0, dtype=np.float64))
                read.append(video)
    columns = [[beside[name][video] for video in read] for name in ("keys", "labels", "label_names")]
    values_nd = np.stack(vectors) if vectors else np.zeros((0, about["shape"][-1]))
    return VideoFeatures(about, columns[0], columns[1], columns[2], values_nd.astype(np.float32))
