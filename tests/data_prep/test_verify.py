"""verify: a sound data set has no problem, and each kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arvideo_dist.storage import Storage
from data_prep.verify import _by_shard, check_video, verify
from tests.data_prep.runs import SMALL, prepare
from tests.data_prep.videos import make


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        assert prepare(patch, "synthetic", "--out", out, "--num-videos", 6, "--shard-size", 3, *SMALL) == 0
    return out


def test_a_sound_set_has_no_problem(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert prepare(monkeypatch, "verify", sound, "--decode", "all", "--report", report) == 0
    assert capsys.readouterr().out == "train: 2 shards, 6 samples, 6 decoded: no problem(s)\n"
    (written,) = json.loads(report.read_text())
    assert (written["samples"], written["decoded"], written["problems"]) == (6, 6, [])
    assert verify(Storage(str(sound)), "train", 2, 1).decoded == 2


_COUNT_THREADS = """
import os, sys
from arvideo_dist.storage import Storage
from data_prep.shards import read_table
storage = Storage(sys.argv[1])
threads = set(os.listdir("/proc/self/task"))
assert read_table(storage, "index-train.parquet").num_rows == 6
print(len(set(os.listdir("/proc/self/task")) - threads))
"""


def test_reading_a_table_leaves_no_thread_that_could_abort_the_ending_interpreter(sound: Path) -> None:
    command = [sys.executable, "-c", _COUNT_THREADS, str(sound)]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == "0\n"


def flip_in_video(out: Path) -> None:
    row = pq.read_table(out / "index-train.parquet").to_pylist()[0]
    with open(out / row["shard"], "r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def cut_shard(out: Path) -> None:
    data = (out / "train-000001.tar").read_bytes()
    (out / "train-000001.tar").write_bytes(data[: len(data) // 2])


def shift_offset(out: Path) -> None:
    table = pq.read_table(out / "index-train.parquet")
    shifted = pa.array([value + 512 for value in table["offset"].to_pylist()], pa.int64())
    place = table.schema.get_field_index("offset")
    pq.write_table(table.set_column(place, table.schema.field(place), shifted), out / "index-train.parquet")


def drop_row(out: Path) -> None:
    table = pq.read_table(out / "index-train.parquet")
    pq.write_table(table.slice(1), out / "index-train.parquet")
    resign(out)


def resign(out: Path) -> None:
    """Make the manifest agree with the index again, as a tool that forgets the shards would."""
    storage = Storage(str(out))
    manifest = json.loads((out / "dataset-train.json").read_text())
    manifest["index"]["sha256"] = storage.sha256("index-train.parquet")
    manifest["index"]["size"] = storage.size("index-train.parquet")
    (out / "dataset-train.json").write_text(json.dumps(manifest))


def edit_settings(out: Path) -> None:
    manifest = json.loads((out / "dataset-train.json").read_text())
    manifest["settings"]["seed"] = 99
    (out / "dataset-train.json").write_text(json.dumps(manifest))


def rename_shard(out: Path) -> None:
    table = pq.read_table(out / "index-train.parquet")
    names = [table["shard"][0].as_py(), "train-000009.tar", *table["shard"].to_pylist()[2:]]
    place = table.schema.get_field_index("shard")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(names)), out / "index-train.parquet"
    )
    resign(out)


def replace_in_json(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Damage to a sample's JSON that leaves it JSON."""

    def damage(out: Path) -> None:
        data = (out / "train-000000.tar").read_bytes()
        assert len(old) == len(new)
        assert old in data
        (out / "train-000000.tar").write_bytes(data.replace(old, new, 1))

    return damage


def no_object(out: Path) -> None:
    """The first sample's JSON becomes a number, padded with blanks to its size."""
    with tarfile.open(out / "train-000000.tar") as tar:
        first = next(iter(tar))
    with open(out / "train-000000.tar", "r+b") as file:
        file.seek(first.offset_data)
        file.write(b"7".ljust(first.size))


def other_columns(out: Path) -> None:
    table = pq.read_table(out / "index-train.parquet")
    pq.write_table(table.drop_columns(["shard"]), out / "index-train.parquet")
    resign(out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_in_video, ["checksum differs from the index's", "size or checksum differ from the manifest's"]),
        (cut_shard, ["train-000001.tar: not a whole tar", "is not in the shard"]),
        (lambda out: (out / "train-000000.tar").unlink(), ["train-000000.tar: missing"]),
        (shift_offset, ["index-train.parquet: size or checksum differ"]),
        (lambda out: (shift_offset(out), resign(out)), ["the index says"]),
        (drop_row, ["other columns or rows", "is not in the index", "2 index rows, 3 samples"]),
        (edit_settings, ["the fingerprint is not that of its settings"]),
        (
            lambda out: shutil.copy(out / "train-000000.tar", out / "train-000007.tar"),
            ["does not name this shard"],
        ),
        (rename_shard, ["1 row(s) are in train-000009.tar, which the manifest does not name"]),
        (replace_in_json(b'"frames"', b'"grames"'), ["its JSON has no frames"]),
        (replace_in_json(b'"frames": 8', b'"frames": 9'), ["frames differs between JSON and index"]),
        (no_object, ["its JSON is not an object"]),
        (other_columns, ["other columns or rows", "is not in the index"]),
        (lambda out: (out / "rejects-train.parquet").unlink(), ["rejects-train.parquet: missing"]),
    ],
)
def test_damage_is_found_and_named(
    sound: Path, tmp_path: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(sound, out)
    damage(out)
    problems = "\n".join(verify(Storage(str(out)), "train", None, 1).problems)
    for expected in words:
        assert expected in problems


def test_a_b_picture_that_is_a_reference_is_found(tmp_path: Path) -> None:
    pyramid = make(
        tmp_path / "pyramid.mp4",
        "-bf",
        "7",
        "-x264-params",
        "b-pyramid=normal:b-adapt=0",
        source="testsrc2=s=64x64:d=1",
    )
    row = {"frames": 25, "width": 64, "height": 64}
    assert "B-pictures are references" in "\n".join(check_video(pyramid.read_bytes(), row, droppable=True))
    assert check_video(pyramid.read_bytes(), row, droppable=False) == []
    (problem,) = check_video(pyramid.read_bytes(), row | {"frames": 26}, droppable=False)
    assert problem == "25 pictures decode, the index says 26"


def test_a_long_video_is_decoded_without_keeping_its_pictures(tmp_path: Path) -> None:
    long = make(tmp_path / "long.mp4", source="testsrc2=s=320x240:r=25:d=8").read_bytes()
    tracemalloc.start()
    try:
        assert check_video(long, {"frames": 200, "width": 320, "height": 240}, droppable=False) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 320 * 240 * 3 // 2


def test_rows_are_grouped_by_their_shards_whatever_their_order() -> None:
    names = ["b", "a", "a", "b", "c", "a"]
    table = pa.concat_tables(pa.table({"shard": part, "place": part}) for part in (names[:3], names[3:]))
    table = table.set_column(1, "place", pa.chunked_array([range(6)]))
    places = {
        name: [place for run in runs for place in run["place"].to_pylist()]
        for name, runs in _by_shard(table).items()
    }
    assert places == {"b": [0, 3], "a": [1, 2, 5], "c": [4]}


def test_stats_prints_figures_and_writes_pictures(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(sound, out)
    assert prepare(monkeypatch, "stats", out) == 0
    said = capsys.readouterr().out
    assert "6 samples, 0 rejects" in said
    assert "6 of 12 labels occur, 1 to 1 videos each" in said
    for name in ("stats-train.png", "contact-train.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_an_empty_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(monkeypatch, "verify", tmp_path) == 2
    assert prepare(monkeypatch, "stats", tmp_path) == 2
    assert prepare(monkeypatch, "verify", tmp_path, "--split", "val") == 2
