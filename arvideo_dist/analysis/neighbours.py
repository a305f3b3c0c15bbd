"""The videos nearest to one by the cosine of their features: found, and shown as a contact sheet and an animation.

Letters: N videos, D width, V views, T frames, S pixels of a side.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageFont

from arvideo_dist.data.index import DatasetManifest, load_manifest
from arvideo_dist.data.loader import ClipSamples, ClipSource, LoaderOptions
from arvideo_dist.data.views import Views
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.draws import label_of
from arvideo_dist.tasks.feature_files import VideoFeatures
from arvideo_dist.tasks.picture import Page, shown_frames

ONE_VIEW = Views(1, 1)  # of each video that is shown: its middle
CELL = 112  # most pixels of a frame's side on a sheet
_ROWS_AT_ONCE = 2**16
_LONGEST_NAME = 32
_SPELLED_ALIKE = 0.3  # of difflib's ratio


@dataclass(frozen=True)
class Shown:
    """A row of the sheet."""

    title: str
    key: str
    label: str
    frames_tssc: NDArray[np.uint8] | None  # None: it cannot be decoded

    @property
    def name(self) -> str:
        lines = (self.title, self.key, self.label)
        return "\n".join(
            line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 3]}..." for line in lines
        )


def row_of(features: VideoFeatures, key: str) -> int:
    """The video of `key`. ValueError names the keys that are spelled nearest."""
    if key in features.keys:
        return features.keys.index(key)
    alike = difflib.get_close_matches(key, features.keys, n=3, cutoff=_SPELLED_ALIKE)
    near = f"; spelled alike: {', '.join(alike)}" if alike else ""
    raise ValueError(f"no video with features has the key {key!r}, and there is no such file{near}")


def nearest(
    values_nd: NDArray[np.float32], query_d: NDArray[np.float32], count: int, leave_out: int | None = None
) -> list[tuple[int, float]]:
    """The `count` videos of the largest cosine with `query_d`, and that cosine; of equal ones the first goes first.

    `leave_out`: a video that is none of them, the query itself. The cosine with a vector of zeros is 0.
    """
    query = query_d.astype(np.float64)
    query /= np.linalg.norm(query) or 1.0
    cosines_n = np.empty(len(values_nd))
    for first in range(0, len(values_nd), _ROWS_AT_ONCE):
        rows = values_nd[first : first + _ROWS_AT_ONCE].astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        cosines_n[first : first + len(rows)] = rows @ query / np.where(lengths > 0, lengths, 1.0)
    order = [row for row in np.argsort(-cosines_n, kind="stable").tolist() if row != leave_out]
    return [(row, float(cosines_n[row])) for row in order[:count]]


def label_at(features: VideoFeatures, row: int) -> str:
    """Of a video, for a person."""
    name, number = features.label_names[row], features.labels[row]
    return name or ("" if number is None else str(number))


def table(features: VideoFeatures, found: Sequence[tuple[int, float]]) -> str:
    """Rank, similarity, key and label of what was found, for the terminal."""
    width = max([3, *(len(features.keys[row]) for row, _ in found)])
    lines = [f"rank  similarity  {'key':{width}}  label"]
    for rank, (row, cosine) in enumerate(found, 1):
        lines.append(
            f"{rank:4}  {cosine:10.4f}  {features.keys[row]:{width}}  {label_at(features, row)}".rstrip()
        )
    return "\n".join(lines)


def data_set(about: dict[str, str], path: str | None) -> tuple[Storage, DatasetManifest]:
    """Where the embedded videos are, by default where they were; ValueError if they are not there."""
    storage = Storage(path or about["path"])
    try:
        manifest = load_manifest(storage, about["split"])
    except ValueError as error:
        raise ValueError(
            f"{error} These features are of videos there: give --data if they have moved"
        ) from error
    if manifest.index.sha256 != about["index_sha256"]:
        raise ValueError(
            f"split {about['split']!r} at {storage.uri} is not the data set that has these features (its index is "
            "another one): give --data with the one that was embedded, or embed this one"
        )
    return storage, manifest


class Clips:
    """Decodes videos of the data set that was embedded: the middle of each, in the centre crop."""

    def __init__(self, features: VideoFeatures, storage: Storage) -> None:
        data, model = features.about["data"], features.about["model"]
        source = ClipSource(storage, data["split"], data["stride"], sampling=data["sampling"], views=ONE_VIEW)
        self._samples = ClipSamples(
            [source],
            clip_frames=model["frames"],
            image_size=min(CELL, model["image_size"]),
            draw=label_of,
            seed=0,
            shuffle=False,
            options=LoaderOptions(),
        )
        keys = self._samples.indexes[0].table["key"].to_pylist()
        self._places = {key: place for place, key in enumerate(keys)}

    def __call__(self, key: str) -> tuple[NDArray[np.uint8] | None, str]:
        """Frames [T, S, S, 3] of a video; None and the reason if it cannot be decoded."""
        batch = self._samples[[self._places[key]]]
        if batch.bad:
            return None, batch.bad[0].reason
        return frames_of(batch.clips[0]), ""


def shown(features: VideoFeatures, found: Sequence[tuple[int, float]], clips: Clips) -> Iterator[Shown]:
    """Rows of the sheet for what was found; a video that cannot be decoded is named on stderr."""
    for rank, (row, cosine) in enumerate(found, 1):
        yield shown_as(f"{rank}  {cosine:.3f}", features, row, clips)


def shown_as(title: str, features: VideoFeatures, row: int, clips: Clips) -> Shown:
    """One of them."""
    key = features.keys[row]
    frames, reason = clips(key)
    if frames is None:
        print(f"not shown: {key}: {reason}", file=sys.stderr)
    return Shown(title, key, label_at(features, row), frames)


def frames_of(clip_cthw: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [T, S, S, 3] of a clip [3, T, S, S]."""
    frames: NDArray[np.uint8] = clip_cthw.permute(1, 2, 3, 0).contiguous().numpy()
    return frames


def sheet(rows: Sequence[Shown]) -> NDArray[np.uint8]:
    """A row a video, the query first: its name, and frames from its first to its last. uint8 [H, W, 3]."""
    page, frames = sheet_page(rows)
    for number, row in enumerate(rows):
        if row.frames_tssc is not None:
            for column, frame in enumerate(frames):
                page.frame(number, column, row.frames_tssc[frame])
    return page.pixels()


def sheet_page(rows: Sequence[Shown]) -> tuple[Page, list[int]]:
    """The sheet without its frames, and which frames of a clip it has room for."""
    clip = next((row.frames_tssc for row in rows if row.frames_tssc is not None), None)
    if clip is None:
        raise ValueError("none of the videos can be decoded")
    font, names = ImageFont.load_default(), [row.name for row in rows]
    widest = max(font.getlength(line) for name in names for line in name.split("\n"))
    frames = shown_frames(len(clip))
    return Page(names, len(frames), clip.shape[1:3], margin=math.ceil(widest) + 12), frames


def pages(rows: Sequence[Shown]) -> Iterator[NDArray[np.uint8]]:
    """All videos side by side, page t showing frame t of each: uint8 [H, W, 3]."""
    shown = [(row.title, row.frames_tssc) for row in rows if row.frames_tssc is not None]
    if not shown:
        raise ValueError("none of the videos can be decoded")
    columns = math.ceil(math.sqrt(len(shown)))
    frames, height, width, _ = shown[0][1].shape
    for t in range(frames):
        page = Page([""] * math.ceil(len(shown) / columns), columns, (height, width), margin=2)
        for number, (title, clip) in enumerate(shown):
            page.frame(*divmod(number, columns), clip[t])
            page.text(*divmod(number, columns), (0.08 * height, width / 2), title)
        yield page.pixels()
