"""Folders as people have them: what systems and tools leave there is no video, and no name breaks anything."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from arvideo_dist.data.index import load_manifest
from arvideo_dist.storage import Storage
from data_prep import datasets, folder
from data_prep.errors import UserError
from data_prep.items import Inputs
from tests.data_prep.runs import prepare
from tests.data_prep.test_datasets import touch
from tests.data_prep.videos import make

JUNK = ("__MACOSX", ".ipynb_checkpoints", ".Trash-1000", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN")


def test_what_systems_and_tools_leave_makes_no_class_and_no_sample(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "run/._a.mp4", "walk/b.mp4", "walk/.b.mp4.swp.mp4")
    touch(tmp_path, *(f"{name}/c.mp4" for name in JUNK), *(f"run/{name}/d.mp4" for name in JUNK))
    inputs = folder.read(str(tmp_path), labels_from_folders=True)
    assert inputs.labels == ["run", "walk"]
    assert [(item.source, item.label) for item in inputs.items] == [("run/a.mp4", 0), ("walk/b.mp4", 1)]
    (remark,) = inputs.remarks
    assert remark.startswith(
        "left aside, of systems and tools: 2 x #recycle/, 2 x $RECYCLE.BIN/, 2 x .Trash-1000/"
    )
    assert "2 x hidden files" in remark


def test_annotated_sources_do_not_look_into_them_either(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "run/abc_000001_000011.mp4",
        "__MACOSX/run/abc_000001_000011.mp4",
        "@eaDir/def_000001_000011.mp4",
    )
    (tmp_path / "rows.csv").write_text("youtube_id,time_start,time_end\nabc,1,11\ndef,1,11\n")
    inputs = datasets.kinetics("kinetics400", str(tmp_path / "rows.csv"), str(tmp_path), None)
    assert [(item.file, item.choices) for item in inputs.items] == [
        ("run/abc_000001_000011.mp4", ()),
        (None, ()),
    ]
    assert inputs.remarks[0] == "1 of 2 listed videos found; 1 video files there"
    assert inputs.remarks[1] == "left aside, of systems and tools: 1 x @eaDir/, 1 x __MACOSX/"


def test_line_breaks_and_control_characters_in_names_break_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("run\nfast/a\tb.mp4", "run\u2028slow/c.mp4", "walk/d\r.mp4", os.fsdecode(b"x\x85\xff/e.mp4"))
    for name in names:
        make(tmp_path / "videos" / "plain.mp4", source="testsrc2=s=64x48:r=10:d=0.4")
        (tmp_path / "videos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / "plain.mp4").rename(tmp_path / "videos" / name)
    arguments = (
        "folder",
        "--videos",
        tmp_path / "videos",
        "--labels-from-folders",
        "--out",
        tmp_path / "out",
    )
    assert prepare(monkeypatch, *arguments) == 0
    labels = ["run\\nfast", "run\\u2028slow", "walk", "x\\x85\\xff"]
    assert load_manifest(Storage(str(tmp_path / "out")), "train").labels == labels
    assert (tmp_path / "out" / "labels-train.txt").read_text().splitlines() == labels
    index = pq.read_table(tmp_path / "out" / "index-train.parquet").to_pylist()
    assert {row["source"]: labels[row["label"]] for row in index} == {
        "run\\nfast/a\\tb.mp4": "run\\nfast",
        "run\\u2028slow/c.mp4": "run\\u2028slow",
        "walk/d\\r.mp4": "walk",
        "x\\x85\\xff/e.mp4": "x\\x85\\xff",
    }


def test_names_that_read_alike_are_never_one(tmp_path: Path) -> None:
    touch(tmp_path, "run/a\n.mp4", "run/a\\n.mp4")
    first, second = folder.read(str(tmp_path), labels_from_folders=True).items
    assert first.source == second.source == "run/a\\n.mp4"
    assert [item.reason for item in (first, second)] == [None, "duplicate: listed more than once"]
    touch(tmp_path, "walk\n/b.mp4", "walk\\n/c.mp4")
    with pytest.raises(UserError, match=r"two folders in it have names that read 'walk\\\\n': rename one"):
        folder.read(str(tmp_path), labels_from_folders=True)


def test_no_source_gives_a_label_that_breaks_a_line() -> None:
    with pytest.raises(UserError, match=r"the label 'run\\nfast' holds a line break"):
        Inputs([], ["run\nfast"], {})


@pytest.fixture
def corrupt(tmp_path: Path) -> bytes:
    whole = make(tmp_path / "whole.mp4", source="testsrc2=s=64x48:r=10:d=1").read_bytes()
    return whole[: len(whole) // 2]


def kinetics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict], list[dict]]:
    """Index rows and rejects of the one clip `abc` of the label `run`, from the videos in `videos`."""
    (tmp_path / "rows.csv").write_text("label,youtube_id,time_start,time_end\nrun,abc,1,11\n")
    arguments = (
        "--annotations",
        tmp_path / "rows.csv",
        "--videos",
        tmp_path / "videos",
        "--out",
        tmp_path / "out",
    )
    prepare(monkeypatch, "kinetics400", *arguments)
    names = (tmp_path / "out" / f"{kind}-train.parquet" for kind in ("index", "rejects"))
    index, rejects = (pq.read_table(name).to_pylist() for name in names)
    return index, rejects


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("run/abc_000001_000011.mp4", "replacement_for_corrupted_k400/abc_000001_000011.mp4"),
        ("a/abc_000001_000011.mp4", "b/abc_000001_000011.mp4"),
        ("run/abc_000001_000011.mp4", "run/abc_000001_000011.webm"),
    ],
)
def test_a_sound_file_is_preferred_to_a_corrupt_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrupt: bytes, bad: str, good: str
) -> None:
    touch(tmp_path / "videos", bad)
    (tmp_path / "videos" / bad).write_bytes(corrupt)
    codec = ("-c:v", "libvpx") if good.endswith("webm") else ()
    make(tmp_path / "videos" / good, *codec, source="testsrc2=s=64x48:r=10:d=1")
    (row,), rejects = kinetics(tmp_path, monkeypatch)
    assert (row["source"], row["frames"], rejects) == ("abc_000001_000011", 10, [])


def test_files_of_one_name_that_differ_or_are_all_corrupt_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrupt: bytes
) -> None:
    names = [f"{place}/abc_000001_000011.mp4" for place in ("a", "b")]
    for number, name in enumerate(names):
        make(tmp_path / "videos" / name, source=f"testsrc2=s=64x48:r={10 + number}:d=1")
    _, (reject,) = kinetics(tmp_path, monkeypatch)
    assert reject["reason"] == f"ambiguous: videos that differ: {names[0]}, {names[1]}"
    for name in names:
        (tmp_path / "videos" / name).write_bytes(corrupt)
    (tmp_path / "out").rename(tmp_path / "first")
    _, (reject,) = kinetics(tmp_path, monkeypatch)
    assert reject["reason"].endswith(f"(none of these is sound: {names[0]}, {names[1]})")


def test_copies_of_one_file_are_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("a", "b"):
        make(tmp_path / "videos" / place / "abc_000001_000011.mp4", source="testsrc2=s=64x48:r=10:d=1")
    (row,), rejects = kinetics(tmp_path, monkeypatch)
    assert (row["frames"], rejects) == (10, [])
