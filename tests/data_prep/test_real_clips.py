"""The real clips: each accounted for, and what was written shows what an independent decoder shows."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from arvideo_dist.storage import Storage
from tests.data_prep.runs import prepare, spawn
from tests.data_prep.videos import psnr

pytestmark = pytest.mark.slow

HDR = "exoplayer__hdr10-video-with-sdr-container.mp4"
PICTURES = 12  # compared of each clip, evenly over its length
BLACK, WHITE = 16, 235  # luma codes of limited range


@pytest.fixture(scope="module")
def prepared(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        videos = shared_dir / "videos" / "clips"
        assert prepare(patch, "folder", "--videos", videos, "--out", out, "--workers", 2) == 0
    return out


def test_all_of_kinetics_400_val_is_accounted_for_in_bounded_memory(shared_dir: Path, tmp_path: Path) -> None:
    """The publishers' whole list, of which a folder holds three videos, one of them broken."""
    annotations = shared_dir / "annotations" / "kinetics-400_val.csv"
    with open(annotations) as file:
        listed = {
            f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}": row["label"]
            for row in csv.DictReader(file)
        }
    clips = shared_dir / "videos" / "clips"
    chosen = [*sorted(path for path in clips.glob("hmdb51_*"))[:2], clips / "decord__corrupted.mp4"]
    names = [list(listed)[row] for row in (0, 9_000, -1)]
    for name, clip in zip(names, chosen, strict=True):
        (tmp_path / "videos" / listed[name]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip, tmp_path / "videos" / listed[name] / f"{name}{clip.suffix}")
    arguments = ("--annotations", annotations, "--videos", tmp_path / "videos", "--out", tmp_path / "out")
    process = spawn("kinetics400", *arguments, "--split", "val")
    assert process.stderr
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)  # the process and its helpers, the largest of them
    process.communicate()
    assert status == 0, errors
    index = pq.read_table(tmp_path / "out/index-val.parquet").to_pylist()
    assert {row["source"]: row["label_name"] for row in index} == {name: listed[name] for name in names[:2]}
    labels = (shared_dir / "annotations" / "label_map_k400.txt").read_text().splitlines()
    assert all(labels[row["label"]] == row["label_name"] for row in index)
    rejects = pq.read_table(tmp_path / "out/rejects-val.parquet").to_pylist()
    assert len(index) + len(rejects) == len(listed) == 19_906
    assert {row["source"] for row in index + rejects} == set(listed)
    assert [row["source"] for row in rejects if not row["reason"].startswith("missing: ")] == [names[2]]
    peak = usage.ru_maxrss / 2**10
    print(f"largest process: {peak:.0f} MiB")
    assert peak < 512


def rows(out: Path) -> list[dict]:
    return pq.read_table(out / "index-train.parquet").to_pylist()


def test_all_77_are_in_the_index_or_rejected_with_the_reason(prepared: Path, shared_dir: Path) -> None:
    names = {path.name for path in (shared_dir / "videos" / "clips").iterdir()}
    assert len(names) == 77
    rejects = {
        row["source"]: row["reason"] for row in pq.read_table(prepared / "rejects-train.parquet").to_pylist()
    }
    assert list(rejects) == ["decord__corrupted.mp4"]
    assert rejects["decord__corrupted.mp4"].startswith("damaged: ")
    sources = [row["source"] for row in rows(prepared)]
    assert len(sources) == len(set(sources)) == 76
    assert set(sources) | set(rejects) == names
    assert any(" " in name for name in sources)
    assert any("(" in name for name in sources)
    assert any("+" in name for name in sources)


def test_the_set_is_what_it_promises(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(monkeypatch, "verify", prepared, "--decode", "all") == 0
    urls = sorted(str(path) for path in prepared.glob("*.tar"))
    samples = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }
    assert set(samples) == {row["key"] for row in rows(prepared)}
    assert {sample["json"]["source"] for sample in samples.values()} == {
        row["source"] for row in rows(prepared)
    }


def shown(path: Path, row: dict, wanted: list[int]) -> dict[int, np.ndarray]:
    """The source's pictures that are on show at the times of the written pictures `wanted`: upright, at the
    written size, as 4:2:0 planes of BT.601 limited range; decoded and converted by PyAV."""
    fps = Fraction(row["fps"]).limit_denominator(1001)
    result: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        # AVI stores no times of presentation: where PyAV's are out of order, only the pictures' order is true.
        timed = container.format.name != "avi" or _ascending(frame.pts for frame in container.decode(video=0))
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"
        first, count, last = None, 0, None
        for frame in container.decode(stream):
            time = frame.pts * stream.time_base
            first = time if first is None else first
            tick = int((time - first) * fps + Fraction(1, 2)) if timed else count
            if last is not None:
                for number in wanted:
                    if last[0] <= number < tick:
                        result[number] = converted(last[1], row)
            last, count = (tick, frame), count + 1
        for number in wanted:
            if last and number >= last[0]:
                result[number] = converted(last[1], row)
    return result


def _ascending(times: Iterable[int]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def converted(frame: av.VideoFrame, row: dict) -> np.ndarray:
    turns = round(frame.rotation) // 90
    width, height = (row["height"], row["width"]) if turns % 2 else (row["width"], row["height"])
    limited = frame.reformat(
        width=width,
        height=height,
        format="yuv420p",
        dst_colorspace="ITU601",
        dst_color_range="MPEG",
        interpolation="BICUBIC",
    )
    planes = limited.to_ndarray()
    if not turns:
        return planes
    luma = np.rot90(planes[:height], turns)
    u, v = (plane.reshape(height // 2, width // 2) for plane in np.split(planes[height:].reshape(-1), 2))
    chroma = [np.rot90(plane, turns).reshape(-1) for plane in (u, v)]
    return np.concatenate([luma.reshape(-1), *chroma]).reshape(row["height"] * 3 // 2, row["width"])


def test_written_pictures_show_the_source_at_the_same_times(prepared: Path, shared_dir: Path) -> None:
    storage, values = Storage(str(prepared)), {}
    for row in rows(prepared):
        if row["source"] == HDR:
            continue  # tone-mapped: the next test
        wanted = sorted({int(place) for place in np.linspace(0, row["frames"] - 1, PICTURES)})
        with av.open(io.BytesIO(storage.read_range(row["shard"], row["offset"], row["size"]))) as container:
            written = {
                number: frame.to_ndarray()
                for number, frame in enumerate(container.decode(video=0))
                if number in wanted
            }
        expected = shown(shared_dir / "videos" / "clips" / row["source"], row, wanted)
        # Codes below black and above white, which some sources have, are kept as they are written and cut off by
        # PyAV's conversion: a screen shows them alike.
        values[row["source"]] = psnr(
            *(
                np.stack([each[number] for number in wanted]).clip(BLACK, WHITE)
                for each in (written, expected)
            )
        )
    assert len(values) == 75
    low = {name: round(value, 1) for name, value in values.items() if value < 33}
    print(f"PSNR: lowest {min(values.values()):.1f}, median {np.median(list(values.values())):.1f} dB")
    assert not low
    assert np.median(list(values.values())) >= 36


def test_high_dynamic_range_is_tone_mapped(prepared: Path, shared_dir: Path) -> None:
    """Hable's curve on BT.2020 PQ light, worked out in numpy from ITU-R BT.2100, BT.2020 and BT.1886."""
    (row,) = [row for row in rows(prepared) if row["source"] == HDR]
    data = Storage(str(prepared)).read_range(row["shard"], row["offset"], row["size"])
    with av.open(io.BytesIO(data)) as container:
        written = next(container.decode(video=0)).to_ndarray()[: row["height"]]
    with av.open(str(shared_dir / "videos" / "clips" / HDR)) as container:
        frame = next(container.decode(video=0))
        size = {"width": row["width"], "height": row["height"]}
        signal = frame.reformat(**size, format="rgb48le", interpolation="BICUBIC").to_ndarray() / 65535
    signal = signal.transpose(2, 0, 1)
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = np.clip(signal, 0, 1) ** (1 / m2)
    light = 100 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)  # 1 = 100 nits
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    light = np.einsum("ij,jhw->ihw", to_709, light)

    def hable(x: np.ndarray) -> np.ndarray:
        return (x * (0.15 * x + 0.05) + 0.004) / (x * (0.15 * x + 0.5) + 0.06) - 0.02 / 0.3

    peak = np.maximum(light.max(0), 1e-6)
    mapped = np.clip(light * hable(peak) / hable(np.array(10.0)) / peak, 0, 1)
    encoded = mapped ** (1 / 2.4)  # for a display of BT.1886
    expected = 16 + 219 * np.einsum("i,ihw->hw", [0.299, 0.587, 0.114], encoded)
    assert psnr(written, np.rint(expected).clip(0, 255).astype(np.uint8)) > 30
