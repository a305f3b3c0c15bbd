"""Whole runs of the command: every input accounted for, plain WebDataset readable, same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from arvideo_dist.data.index import INDEX_SCHEMA, REJECTS_SCHEMA, load_manifest, open_index
from arvideo_dist.storage import Storage
from data_prep import arguments as arguments_module
from data_prep.synthetic import CLASSES
from tests.data_prep.runs import SMALL, digests, prepare
from tests.data_prep.videos import frames_of, make, reference_flags


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with odd names, one broken file, one that is no video and things that are no files."""
    top = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(
        (
            "a b/one.two.mp4",
            "a b/one_two.mp4",
            "[c]/(HQ) 300+ Yards!!!.avi",
            "[c]/ünïcode.webm",
            "[c]/-dash.mkv",
        )
    ):
        codec = ("-c:v", "libvpx") if name.endswith("webm") else ()
        make(top / name, *codec, source=f"testsrc2=s=64x48:r={10 + number}:d=0.6")
    make(top / "plain.mp4", source="testsrc2=s=64x48:r=10:d=0.6").rename(
        top / "a b" / os.fsdecode(b"latin-\xe9.mp4")
    )
    (top / "a b" / "empty.mp4").touch()
    (top / "[c]" / "notes.txt").write_text("x")
    os.mkfifo(top / "[c]" / "pipe.mp4")
    (top / "[c]" / "self.mp4").symlink_to("self.mp4")
    (top / "[c]" / "loop").symlink_to(top)
    return top


def test_every_input_is_in_the_index_or_in_the_rejects(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = prepare(
        monkeypatch,
        *("folder", "--videos", videos, "--out", tmp_path, "--labels-from-folders", "--workers", 2),
    )
    assert code == 0
    index = pq.read_table(tmp_path / "index-train.parquet")
    rejects = pq.read_table(tmp_path / "rejects-train.parquet")
    assert index.schema.equals(INDEX_SCHEMA)
    assert rejects.schema.equals(REJECTS_SCHEMA)
    assert sorted(index["source"].to_pylist()) == [
        "[c]/(HQ) 300+ Yards!!!.avi",
        "[c]/-dash.mkv",
        "[c]/ünïcode.webm",
        "a b/latin-\\xe9.mp4",
        "a b/one.two.mp4",
        "a b/one_two.mp4",
    ]
    assert dict(zip(*rejects.to_pydict().values(), strict=True)) == {
        "[c]/pipe.mp4": "not a file: a fifo",
        "[c]/self.mp4": "unreadable: Too many levels of symbolic links",
        "[c]/loop": "symbolic link loop: it leads back to a folder above it",
        "a b/empty.mp4": "empty: the file holds no bytes",
    }
    assert {row["source"]: row["label_name"] for row in index.to_pylist()}["a b/one.two.mp4"] == "a b"
    manifest = load_manifest(Storage(str(tmp_path)), "train")
    assert (manifest.samples, manifest.rejects, manifest.labels) == (6, 4, ["[c]", "a b"])
    said = capsys.readouterr().out
    assert "10 inputs: 6 samples" in said
    assert "not considered, no video by their name: 1 x .txt" in said


def test_index_rows_point_at_the_videos_in_plain_webdataset_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--num-videos", 30, "--shard-size", 8, *SMALL)
    assert prepare(monkeypatch, "synthetic", "--out", tmp_path, *arguments) == 0
    storage = Storage(str(tmp_path))
    manifest, index = load_manifest(storage, "train"), open_index(storage, "train", tmp_path / "cache")
    assert [shard.samples for shard in manifest.shards] == [8, 8, 8, 6]
    assert len(index) == manifest.samples == 30
    for shard in manifest.shards:
        assert storage.sha256(shard.name) == shard.sha256
        assert storage.size(shard.name) == shard.size
        with tarfile.open(tmp_path / shard.name) as tar:
            assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "root")}
    rows = {row.key: row for row in (index[place] for place in range(len(index)))}
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        row, described = rows[sample["__key__"]], sample["json"]
        assert storage.read_range(row.shard, row.offset, row.size) == sample["mp4"]
        assert hashlib.sha256(sample["mp4"]).hexdigest() == row.sha256
        assert (described["key"], described["label"], described["frames"]) == (row.key, row.label, 8)
        assert row.label_name == CLASSES[row.label] == described["label_name"]
        frames = frames_of(sample["mp4"])
        assert (len(frames), frames[0].shape) == (row.frames, (row.height, row.width, 3))
        assert row.duration == pytest.approx(row.frames / row.fps)
        count += 1
    assert count == 30


def test_bytes_do_not_depend_on_workers_or_interruptions(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str, workers: int) -> None:
        arguments = ("--out", tmp_path / out, "--shard-size", 2, "--workers", workers)
        assert prepare(monkeypatch, "folder", "--videos", videos, *arguments) == 0

    run("one", 1)
    run("three", 3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    # An interrupted run: some slices have records, one shard is there without its record, nothing is published.
    from data_prep import prepare as prepare_module

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", stop)
        arguments = ("--out", tmp_path / "again", "--shard-size", 2, "--workers", 2)
        assert prepare(patch, "folder", "--videos", videos, *arguments) == 130
    assert not (tmp_path / "again" / "dataset-train.json").exists()
    lost = next((tmp_path / "again").glob("*.tar")).stem.removeprefix("train-")
    (tmp_path / "again" / "progress-train" / f"slice-{lost}.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("*.tar")}
    run("again", 1)
    assert digests(tmp_path / "again") == digests(tmp_path / "one")
    made_again = [name for name, at in times.items() if (tmp_path / "again" / name).stat().st_mtime_ns != at]
    assert made_again == [f"train-{lost}.tar"]


def test_a_finished_split_is_left_alone_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("synthetic", "--out", tmp_path, "--num-videos", 3, *SMALL)
    assert prepare(monkeypatch, *base) == 0
    before = digests(tmp_path)
    assert prepare(monkeypatch, *base) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "nothing to do: this split was already complete"
    assert prepare(monkeypatch, *base, "--crf", 30) == 2
    message = capsys.readouterr().err
    assert "transcode.crf: 20 -> 30" in message
    assert "Traceback" not in message
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("folder", "--videos", "/nowhere"), "--videos /nowhere: no such folder"),
        (("synthetic", "--num-videos", "0"), "--num-videos 0: at least 1 is needed"),
        (("synthetic", "--num-videos", "2", "--width", "33"), "both must be even"),
        (
            ("synthetic", "--num-videos", "2", "--crf", "99"),
            "--crf 99: Input should be less than or equal to 51",
        ),
        (
            ("synthetic", "--num-videos", "2", "--preset", "fasst"),
            "--preset fasst: Input should be 'ultrafast'",
        ),
        (
            ("synthetic", "--num-videos", "2", "--cpu-limit", "0"),
            "--cpu-limit 0: at least 1 second is needed",
        ),
        (("synthetic", "--num-videos", "2", "--memory-limit", "0.1"), "at least 0.5 GiB is needed"),
        (("synthetic", "--num-videos", "2", "--split", "a/b"), "--split 'a/b'"),
        (("synthetic", "--num-videos", "2", "--workers", "0"), "--workers 0: at least 1 is needed"),
        (("synthetic", "--num-videos", "two"), "argument --num-videos: invalid int value: 'two'"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "data_prep", *arguments, "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_a_run_writes_is_never_its_own_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "videos" / "good.mp4")
    arguments = ("folder", "--videos", tmp_path / "videos", "--out", tmp_path / "videos" / "shards")
    assert prepare(monkeypatch, *arguments) == 2
    assert "is inside --videos" in capsys.readouterr().err
    assert not (tmp_path / "videos" / "shards").exists()


def test_two_runs_cannot_write_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    with open(tmp_path / ".lock-train", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare(monkeypatch, "synthetic", "--out", tmp_path, "--num-videos", 2, *SMALL) == 2
    assert prepare(monkeypatch, "synthetic", "--out", tmp_path, "--num-videos", 2, *SMALL) == 0
    assert json.loads((tmp_path / "dataset-train.json").read_text())["samples"] == 2


def test_retried_rejects_come_into_further_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    names = [f"video {number}.mp4" for number in range(5)]
    for name in names[:2]:
        make(videos / name)
    (videos / names[2]).touch()
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{name} {number}\n" for number, name in enumerate(names)))
    base = ("list", "--annotations", listing, "--videos", videos, "--out", out, "--shard-size", 2)
    assert prepare(monkeypatch, *base, "--retry-rejects") == 2
    assert "has no finished split" in capsys.readouterr().err
    assert prepare(monkeypatch, *base) == 0
    first = digests(out)
    make(videos / names[2])
    make(videos / names[3])
    assert prepare(monkeypatch, *base) == 0, "without being told to, nothing is retried"
    assert digests(out) == first
    # The retry is interrupted when it is about to publish; the next run, asked or not, ends it.
    from data_prep import prepare as prepare_module

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", stop)
        assert prepare(patch, *base, "--retry-rejects") == 130
    assert load_manifest(Storage(str(out)), "train").samples == 2
    make(videos / names[4])  # turns up too late: what the retry consists of was fixed when it began
    assert prepare(monkeypatch, *base) == 0
    manifest = load_manifest(Storage(str(out)), "train")
    assert (manifest.samples, manifest.rejects) == (4, 1)
    after = digests(out)
    shards = [shard.name for shard in manifest.shards]
    assert {name: after[name] for name in first if name.endswith(".tar")}.items() <= first.items()
    assert len(shards) > len([name for name in first if name.endswith(".tar")])
    index = pq.read_table(out / "index-train.parquet")
    assert {row["source"]: row["label"] for row in index.to_pylist()} == dict(
        zip(names[:4], range(4), strict=True)
    )
    rejects = pq.read_table(out / "rejects-train.parquet").to_pylist()
    assert rejects == [{"source": names[4], "reason": "missing: it was not there when the retry began"}]
    assert prepare(monkeypatch, "verify", out, "--decode", "all") == 0
    assert prepare(monkeypatch, *base, "--retry-rejects") == 0
    manifest = load_manifest(Storage(str(out)), "train")
    assert (manifest.samples, manifest.rejects) == (5, 0)
    assert prepare(monkeypatch, "verify", out) == 0


def test_compliant_videos_are_copied_and_others_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    make(videos / "other.mp4", source="testsrc2=s=64x64:r=25:d=3")
    assert prepare(monkeypatch, "folder", "--videos", videos, "--out", tmp_path / "first") == 0
    row = pq.read_table(tmp_path / "first" / "index-train.parquet").to_pylist()[0]
    fitting = Storage(str(tmp_path / "first")).read_range(row["shard"], row["offset"], row["size"])
    (videos / "fitting.mp4").write_bytes(fitting)
    damaged = bytearray(fitting)
    for place in range(len(damaged) // 3, len(damaged) - 100, 400):
        damaged[place] ^= 0xFF
    (videos / "damaged.mp4").write_bytes(damaged)
    out = tmp_path / "second"
    assert prepare(monkeypatch, "folder", "--videos", videos, "--out", out, "--copy-if-compliant") == 0
    rows = {row["source"]: row for row in pq.read_table(out / "index-train.parquet").to_pylist()}
    assert sorted(rows) == ["fitting.mp4", "other.mp4"]
    first, second = (frames_of(data) for data in (fitting, _video(out, rows["fitting.mp4"])))
    assert all(map(np.array_equal, first, second))
    assert len(first) == len(second) == 75
    assert rows["other.mp4"]["sha256"] == row["sha256"]
    (reject,) = pq.read_table(out / "rejects-train.parquet").to_pylist()
    assert reject["reason"].startswith("damaged")


def _video(out: Path, row: dict[str, object]) -> bytes:
    return Storage(str(out)).read_range(str(row["shard"]), int(str(row["offset"])), int(str(row["size"])))


@pytest.mark.parametrize(
    ("profile", "size", "references"),
    [("droppable", (342, 256), 3), ("droppable-320", (426, 320), 3), ("gop16", (342, 256), 20)],
)
def test_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, size: tuple[int, int], references: int
) -> None:
    make(tmp_path / "videos" / "in.mp4", source="testsrc2=s=640x480:r=20:d=1")
    out = tmp_path / "out"
    assert (
        prepare(monkeypatch, "folder", "--videos", tmp_path / "videos", "--out", out, "--profile", profile)
        == 0
    )
    (row,) = pq.read_table(out / "index-train.parquet").to_pylist()
    assert (row["width"], row["height"]) == size
    flags, _ = reference_flags(_video(out, row))
    assert sum(flags) == references


def test_a_video_that_meets_its_limit_is_tried_twice_and_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "videos" / "good.mp4")
    monkeypatch.setattr(arguments_module, "_LEAST_MEMORY_GIB", 0.0)
    arguments = ("folder", "--videos", tmp_path / "videos", "--out", tmp_path / "out", "--memory-limit", 0.01)
    assert prepare(monkeypatch, *arguments) == 1, "no sample at all is a failure"
    (reject,) = pq.read_table(tmp_path / "out" / "rejects-train.parquet").to_pylist()
    assert reject["reason"].startswith("limit: ")
    assert reject["reason"].endswith("(tried 2 times)")


def test_ava_boxes_stand_in_the_samples(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "videos" / "1j20qq1JyX4.mkv", source="testsrc2=s=160x120:r=30:d=3")
    annotations = shared_dir / "annotations"
    arguments = (
        *("ava", "--annotations", annotations / "ava_v2.2_excerpt.csv", "--videos", tmp_path / "videos"),
        *("--label-map", annotations / "label_map_ava.txt", "--video-start", 900, "--out", tmp_path / "out"),
    )
    assert prepare(monkeypatch, *arguments) == 0
    (url,) = (tmp_path / "out").glob("*.tar")
    (sample,) = webdataset.WebDataset(str(url), shardshuffle=False).decode()
    described = sample["json"]
    assert [(box["frame"], box["action"], box["person"]) for box in described["boxes"]] == [
        (60, 12, 1),
        (60, 79, 1),
        (60, 12, 0),
        (60, 17, 0),
    ]
    assert (described["boxes_outside"], described["file"]) == (0, "1j20qq1JyX4.mkv")
    assert (tmp_path / "out" / "labels-train.txt").read_text().splitlines()[12] == "stand"


def test_the_label_map_stands_beside_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(monkeypatch, "synthetic", "--out", tmp_path, "--num-videos", 2, *SMALL) == 0
    assert (tmp_path / "labels-train.txt").read_text().splitlines() == list(CLASSES)
