"""Small real data sets: mp4 files from ffmpeg in WebDataset tars, with index and manifest."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import imageio_ffmpeg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from arvideo_dist.data.index import (
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    DatasetManifest,
    FileEntry,
    ShardEntry,
    index_name,
    manifest_name,
    rejects_name,
    shard_name,
)
from arvideo_dist.storage import Storage
from tests.data.in_workers import draw_ids

hypothesis.settings.register_profile("shared-machine", deadline=None)  # no timed assertions
hypothesis.settings.load_profile("shared-machine")

WIDTH, HEIGHT, FPS = 80, 64, 25
# 5 frames: shorter than any window; 33: one frame more than 16 x 2; the rest longer
FRAMES = (40, 5, 64, 33, 50, 47, 64, 38, 80, 41, 60)


def encode(path: Path, frames: int, variant: int, codec: tuple[str, ...] = ()) -> bytes:
    """One mp4 whose pictures differ from frame to frame and from variant to variant."""
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate={FPS}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source]
    command += ["-vf", f"trim=start={variant},setpts=PTS-STARTPTS,hue=h={37 * variant}"]
    command += ["-frames:v", str(frames), "-pix_fmt", "yuv420p", "-preset", "ultrafast", *codec, str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.read_bytes()


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("videos")
    return [encode(folder / f"{i}.mp4", frames, i) for i, frames in enumerate(FRAMES)]


def _entry(folder: Path, name: str) -> dict:
    data = (folder / name).read_bytes()
    return {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_dataset(
    folder: Path,
    videos: list[bytes],
    frames: list[int] | tuple[int, ...],
    split: str = "train",
    per_shard: int = 4,
) -> Storage:
    """A data set as data_prep's contract describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, shards = [], []
    for number, first in enumerate(range(0, len(videos), per_shard)):
        name = shard_name(split, number)
        chosen = range(first, min(first + per_shard, len(videos)))
        with wds.TarWriter(str(folder / name), mtime=0) as tar:
            for i in chosen:
                meta = json.dumps({"source": f"{i}.mp4"}).encode()
                tar.write({"__key__": f"video{i:03d}", "mp4": videos[i], "json": meta})
        with tarfile.open(folder / name) as tar:
            members = {m.name: m for m in tar.getmembers()}
        for i in chosen:
            member = members[f"video{i:03d}.mp4"]
            rows.append(
                {
                    "key": f"video{i:03d}",
                    "shard": name,
                    "offset": member.offset_data,
                    "size": member.size,
                    "sha256": hashlib.sha256(videos[i]).hexdigest(),
                    "width": WIDTH,
                    "height": HEIGHT,
                    "fps": float(FPS),
                    "frames": frames[i],
                    "duration": frames[i] / FPS,
                    "label": -1,
                    "label_name": None,
                    "source": f"{i}.mp4",
                }
            )
        shards.append(ShardEntry(**_entry(folder, name), samples=len(chosen)))
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / index_name(split))
    pq.write_table(REJECTS_SCHEMA.empty_table(), folder / rejects_name(split))
    manifest = DatasetManifest(
        split=split,
        samples=len(videos),
        rejects=0,
        labels=[],
        settings={},
        fingerprint="0" * 64,
        index=FileEntry(**_entry(folder, index_name(split))),
        rejects_file=FileEntry(**_entry(folder, rejects_name(split))),
        shards=shards,
    )
    (folder / manifest_name(split)).write_text(manifest.model_dump_json())
    return Storage(str(folder))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, videos: list[bytes]) -> Storage:
    """11 sound samples in 3 shards; not to be changed by a test."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), videos, FRAMES)


@pytest.fixture
def fresh_dataset(tmp_path: Path, videos: list[bytes]) -> Storage:
    """The same samples in a folder that the test may damage."""
    return write_dataset(tmp_path / "dataset", videos, FRAMES)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Storage]:
    return write_dataset


@pytest.fixture(scope="session")
def draw() -> Callable:
    return draw_ids
