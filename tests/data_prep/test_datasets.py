"""Annotations as their publishers distribute them: every row is an input, labels are right, nothing is guessed."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from data_prep import boxes, datasets, folder, labels, lists
from data_prep.errors import Rejected, UserError
from data_prep.items import Inputs, Item
from data_prep.probe import VideoInfo


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def by_source(inputs: Inputs) -> dict[str, Item]:
    return {item.source: item for item in inputs.items}


def test_kinetics_400_val_whole(shared_dir: Path, tmp_path: Path) -> None:
    annotations = shared_dir / "annotations" / "kinetics-400_val.csv"
    videos = touch(
        tmp_path,
        "abseiling/0wR5jVB-WPk_000417_000427.mp4",  # a folder for each label
        "--nQbRBEz2s_000104_000114.mkv",  # flat, another container
        "abseiling/3caPS4FHFF8_000036_000046.mp4",
        "other/3caPS4FHFF8_000036_000046.webm",  # the label's folder decides
        "x/2cPLjY5AWXU_000001_000011.mp4",
        "y/2cPLjY5AWXU_000001_000011.mp4",  # nothing decides
    )
    inputs = datasets.kinetics("kinetics400", str(annotations), str(videos), None)
    assert len(inputs.items) == 19_906
    assert inputs.labels == (shared_dir / "annotations" / "label_map_k400.txt").read_text().splitlines()
    items = by_source(inputs)
    with open(annotations) as file:
        for row in csv.DictReader(file):
            name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            assert inputs.labels[items[name].label] == items[name].label_name == row["label"]
    found = {item.source: item.file for item in inputs.items if item.reason is None}
    assert found == {
        "0wR5jVB-WPk_000417_000427": "abseiling/0wR5jVB-WPk_000417_000427.mp4",
        "--nQbRBEz2s_000104_000114": "--nQbRBEz2s_000104_000114.mkv",
        "3caPS4FHFF8_000036_000046": "abseiling/3caPS4FHFF8_000036_000046.mp4",
        "2cPLjY5AWXU_000001_000011": "x/2cPLjY5AWXU_000001_000011.mp4",
    }
    # Which of two without a better claim is taken is decided when they are read.
    (both,) = items["2cPLjY5AWXU_000001_000011"].choices
    assert [name for _, name in both] == [f"{folder}/2cPLjY5AWXU_000001_000011.mp4" for folder in "xy"]
    assert sum(item.reason == "missing: no video of this name" for item in inputs.items) == 19_902


def test_kinetics_test_has_no_labels(shared_dir: Path, tmp_path: Path) -> None:
    annotations = shared_dir / "annotations" / "kinetics-400_test.csv"
    inputs = datasets.kinetics("kinetics400", str(annotations), str(tmp_path), None)
    assert (len(inputs.items), inputs.labels) == (38_685, [])
    assert {item.label for item in inputs.items} == {-1}


@pytest.mark.parametrize(
    ("source", "file", "rows"),
    [
        ("kinetics400", "kinetics400_val_with_is_cc.csv", 2),
        ("kinetics600", "kinetics-600_val_head200.csv", 199),
        ("kinetics700", "kinetics700_val_head.csv", 10),
    ],
)
def test_other_kinetics_files(shared_dir: Path, tmp_path: Path, source: str, file: str, rows: int) -> None:
    inputs = datasets.kinetics(source, str(shared_dir / "annotations" / file), str(tmp_path), None)
    assert len(inputs.items) == rows
    assert all(inputs.labels[item.label] == item.label_name for item in inputs.items)
    assert any("give --label-map" in remark for remark in inputs.remarks)


def test_a_row_that_comes_twice_is_one_input_and_one_duplicate(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", "abc_000001_000011.mp4")
    annotations = tmp_path / "twice.csv"
    annotations.write_text("youtube_id,time_start,time_end\nabc,1,11\nabc,1,11\n")
    first, second = datasets.kinetics("kinetics400", str(annotations), str(videos), None).items
    assert (first.reason, second.reason) == (None, "duplicate: listed more than once")


def test_ssv2(shared_dir: Path, tmp_path: Path) -> None:
    annotations = shared_dir / "annotations"
    videos = touch(tmp_path, "74225.webm", "sub/116154.mp4")
    label_map = str(annotations / "label_map_sthv2.txt")
    inputs = datasets.ssv2(str(annotations / "ssv2_validation.json"), str(videos), label_map, None)
    items = by_source(inputs)
    assert items["74225"].label_name == "Spinning something that quickly stops spinning"
    assert inputs.labels[items["36585"].label] == "Something falling like a feather or paper"
    assert items["74225"].extra == {"caption": "spinning cube that quickly stops spinning"}
    assert (items["74225"].file, items["116154"].file) == ("74225.webm", "sub/116154.mp4")
    assert items["117478"].reason == "missing: no video of this name"


def test_ssv2_test_answers_and_the_publishers_label_numbers(shared_dir: Path, tmp_path: Path) -> None:
    annotations = shared_dir / "annotations"
    test = str(annotations / "ssv2_test.json")
    plain = datasets.ssv2(test, str(tmp_path), None, None)
    assert {item.label for item in plain.items} == {-1}
    label_map = str(annotations / "label_map_sthv2.txt")
    answered = by_source(
        datasets.ssv2(test, str(tmp_path), label_map, str(annotations / "ssv2_test-answers.csv"))
    )
    assert answered["1420"].label_name == "Throwing something"
    numbered = labels.read_label_map(str(annotations / "ssv2_labels.json"))
    stated = json.loads((annotations / "ssv2_labels.json").read_text())
    assert {name: index for index, name in enumerate(numbered) if name} == {
        name: int(index) for name, index in stated.items()
    }
    with pytest.raises(UserError, match="labels are not in it"):
        datasets.ssv2(
            str(annotations / "ssv2_train.json"), str(tmp_path), str(annotations / "ssv2_labels.json"), None
        )


@pytest.mark.parametrize(
    ("fold", "split", "rows"), [(1, "train", 3570), (1, "test", 1530), (3, "test", 1530)]
)
def test_hmdb51(shared_dir: Path, tmp_path: Path, fold: int, split: str, rows: int) -> None:
    name = "(HQ)_Rock_Climbing_-_Free_Solo_Speed_Climb_-_Dan_Osman_climb_f_cm_np1_le_med_2"
    videos = touch(tmp_path, f"climb/{name}.avi")
    inputs = datasets.hmdb51(str(shared_dir / "annotations" / "hmdb51_splits"), str(videos), fold, split)
    assert len(inputs.items) == rows
    assert inputs.labels == (shared_dir / "annotations" / "label_map_hmdb51.txt").read_text().splitlines()
    assert all(item.source.startswith(f"{item.label_name}/") for item in inputs.items)
    item = by_source(inputs).get(f"climb/{name}.avi")
    if item:
        assert item.file == f"climb/{name}.avi"
        assert inputs.labels[item.label] == "climb"


def test_ava_boxes_are_placed_on_the_written_pictures(shared_dir: Path, tmp_path: Path) -> None:
    annotations = shared_dir / "annotations"
    videos = touch(tmp_path, "1j20qq1JyX4.mkv")
    inputs = datasets.ava(
        str(annotations / "ava_v2.2_excerpt.csv"), str(videos), str(annotations / "label_map_ava.txt"), 900.0
    )
    (item,) = inputs.items
    assert inputs.labels[12] == "stand"
    video = VideoInfo(
        width=320, height=240, fps=25.0, frames=100, duration=4.0, codec="h264", pixel_format="yuv420p"
    )
    placed = boxes.placed(item.extra["boxes"], item.extra["video_start"], 0.08, video)
    assert placed["boxes_outside"] == 0
    assert placed["boxes"][0] == {
        "movie_second": 902.0,
        "frame": 48,  # (902 - 900 - 0.08) s at 25 a second
        "box": [0.002, 0.118, 0.714, 0.977],
        "action": 12,
        "person": 1,
    }
    with pytest.raises(Rejected, match=r"boxes: all at 902 to 902 s, the video lasts 4 s"):
        boxes.placed(item.extra["boxes"], 0.0, 0.0, video)


AVA_LABELS = """label {
  name: "bend/bow (at the waist)"
  label_id: 1
  label_type: PERSON_MOVEMENT
}
label {
  name: "answer phone"
  label_id: 11
  label_type: OBJECT_MANIPULATION
}label{
    name: "stand"label_id: 12label_type: PERSON_MOVEMENT
}
"""
AVA_ITEMS = """item {
  name: "bend/bow (at the waist)"
  id: 1
}
item {
  id: 11
  name: 'answer phone'
}
item { name: "stand" id: 12 label_type: PERSON_MOVEMENT }
"""


@pytest.mark.parametrize("text", [AVA_LABELS, AVA_ITEMS])
def test_avas_own_label_files_number_its_labels(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ava_action_list_v2.2.pbtxt"
    path.write_text(text)
    names = labels.read_label_map(str(path))
    assert len(names) == 13
    assert {index: name for index, name in enumerate(names) if name} == {
        1: "bend/bow (at the waist)",
        11: "answer phone",
        12: "stand",
    }
    path.write_text('item {\n  name: "stand"\n}\n')
    with pytest.raises(UserError, match="no name and number in 'name: \"stand\"'"):
        labels.read_label_map(str(path))
    path.write_text("stand\n")
    with pytest.raises(UserError, match="it names no labels"):
        labels.read_label_map(str(path))


def test_ava_actions_that_the_label_map_does_not_name_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "ava.csv"
    rows.write_text(
        "abc,0902,0.1,0.1,0.9,0.9,12,0\nabc,0902,0.1,0.1,0.9,0.9,79,0\nabc,0903\nx,0902,0,0,1,1,,3\n"
    )
    label_map = tmp_path / "labels.pbtxt"
    label_map.write_text(AVA_LABELS)
    with pytest.raises(UserError, match=r"labels.pbtxt: it does not name the actions 79 of"):
        datasets.ava(str(rows), str(tmp_path), str(label_map), 900.0)
    assert len(datasets.ava(str(rows), str(tmp_path), None, 900.0).items) == 2


def test_ava_rows_are_grouped_by_video(shared_dir: Path, tmp_path: Path) -> None:
    inputs = datasets.ava(
        str(shared_dir / "annotations" / "ava_style_gt.mmaction2_tests.csv"), str(tmp_path), None, 0.0
    )
    assert [(item.source, len(item.extra["boxes"])) for item in inputs.items] == [
        ("3reY9zJKhqN", 4),
        ("HmR8SmNIoxu", 4),
        ("5HNXoce1raG", 4),
    ]


def test_annotation_mistakes_name_file_and_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("label,youtube_id\nx,y\n")
    with pytest.raises(UserError, match="no column time_end, time_start"):
        datasets.kinetics("kinetics400", str(bad), str(tmp_path), None)
    bad.write_text("youtube_id,time_start,time_end\ny,1,2\nz,one,2\n")
    with pytest.raises(UserError, match="line 3: time_start is 'one', not a finite number"):
        datasets.kinetics("kinetics400", str(bad), str(tmp_path), None)
    with pytest.raises(UserError, match="No such file"):
        datasets.kinetics("kinetics400", str(tmp_path / "absent.csv"), str(tmp_path), None)
    with pytest.raises(UserError, match="hmdb51 has the splits train and test"):
        datasets.hmdb51(str(tmp_path), str(tmp_path), 1, "val")
    bad.write_text("abc,902,0.1,0.1\n")
    with pytest.raises(UserError, match="line 1 has 4 columns"):
        datasets.ava(str(bad), str(tmp_path), None, 0)
    bad.write_text("abc,902,0.1,0.1,0.2,0.2,3,1\nabc,soon,0.1,0.1,0.2,0.2,3,1\n")
    with pytest.raises(UserError, match="line 2: the time is 'soon', not a finite number"):
        datasets.ava(str(bad), str(tmp_path), None, 0)
    (tmp_path / "labels.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=r'not a JSON object of \{"name": number\}'):
        labels.read_label_map(str(tmp_path / "labels.json"))
    (tmp_path / "list.txt").write_text("a.mp4 1\n")
    with pytest.raises(UserError, match="--videos /nowhere: no such folder"):
        lists.listed(str(tmp_path / "list.txt"), "/nowhere", None)


def test_videos_in_a_folder_that_cannot_be_entered_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.csv").write_text("youtube_id,time_start,time_end\ny,1,2\n")
    touch(tmp_path, "videos/closed/y_000001_000002.mp4", "videos/open/x.mp4")
    (tmp_path / "videos" / "open" / "back").symlink_to(tmp_path / "videos")  # leads to what is found anyway
    arguments = ("kinetics400", str(tmp_path / "list.csv"), str(tmp_path / "videos"), None)
    assert datasets.kinetics(*arguments).items[0].reason is None
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("/closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"1 folder\(s\) in it cannot be entered, first .*closed: unreadable"):
        datasets.kinetics(*arguments)


def test_paths_of_videos_hold_wherever_a_worker_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "videos/y_000001_000002.mp4")
    (tmp_path / "list.csv").write_text("youtube_id,time_start,time_end\ny,1,2\n")
    (tmp_path / "list.txt").write_text("videos/y_000001_000002.mp4 1\n")
    monkeypatch.chdir(tmp_path)
    for inputs in (
        datasets.kinetics("kinetics400", "list.csv", "videos", None),
        lists.listed("list.txt", None, None),
        folder.read("videos", labels_from_folders=False),
    ):
        assert inputs.items[0].path == str(tmp_path / "videos/y_000001_000002.mp4")


KINETICS = "label,youtube_id,time_start,time_end\n"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "-5", "20", "", "ten"])
def test_times_of_kinetics_that_are_none_name_file_and_line(tmp_path: Path, value: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"{KINETICS}run,abc,1,11\nrun,def,{value},10\n")
    with pytest.raises(UserError, match=r"rows.csv: line 3: (time_start is|the video is said to last from)"):
        datasets.kinetics("kinetics400", str(rows), str(tmp_path), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('run,abc,1,11\n"run,def,1,11\n', "line 3: unexpected end of data: is a quotation mark open"),
        (f'"{"x" * 200_000}",abc,1,11\n', "line 2: field larger than field limit"),
        ("run,abc,1,11,12\n", "line 2 has 5 columns, the first line 4"),
        ("run,abc,1\n", "line 2 has 3 columns, the first line 4"),
        ("run,,1,11\n", "line 2: youtube_id is '', not a text"),
        ('"run\nfast",abc,1,11\n', r"line 3: label 'run\\nfast' holds a line break"),
    ],
)
def test_damaged_rows_of_kinetics_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(KINETICS + text)
    with pytest.raises(UserError, match=message):
        datasets.kinetics("kinetics400", str(rows), str(tmp_path), None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(
            (f"abc,{time},0.1,0.1,0.9,0.9,12,0", "line 2: the time is")
            for time in ("inf", "nan", "1e400", "-5")
        ),
        *((f"abc,902,{x},0.1,0.9,0.9,12,0", "line 2: x1 is") for x in ("inf", "nan", "1e400", "x")),
        ("abc,902,0.5,0.1,0.2,0.9,12,0", "line 2: the box ends before it begins: 0.5,0.1,0.2,0.9"),
        ("abc,902,0.1,0.1,0.9,0.9,1e400,0", "line 2: the action is '1e400', not a whole number"),
        ("abc,902,0.1,0.1,0.9,0.9,12,-1", "line 2: the person is '-1', not a whole number"),
        (",902,0.1,0.1,0.9,0.9,12,0", "line 2: video is '', not a text"),
    ],
)
def test_rows_of_ava_that_are_no_boxes_name_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    rows = tmp_path / "ava.csv"
    rows.write_text(f"abc,0902,0.1,0.1,0.9,0.9,12,0\n{row}\n")
    with pytest.raises(UserError, match=rf"ava.csv: {message}"):
        datasets.ava(str(rows), str(tmp_path), None, 900.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": 1e400}]', 'line 2: an entry without a text or number "id"'),
        ('[\n{"id": "1"},\n{"id": null}]', 'line 3: an entry without a text or number "id"'),
        ('[{"id": "1", "template": 5}]', "line 1: template is 5, not a text"),
        ('[{"id": "1", "label": Infinity}]', "line 1: label is inf, not a text"),
        ('[{"id": "\\ud800"}]', "line 1: id .* control character"),
        ("[" * 100_000, "line 1: not JSON: maximum recursion depth"),
        ('[{"id": "1"}\n{"id": "2"}]', "not a whole JSON list"),
        ('[{"id": "1"},\n', "line 2: not JSON"),
        ('{"id": "1"}', "not a JSON list"),
    ],
)
def test_entries_of_ssv2_that_are_none_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=rf"rows.json: {message}"):
        datasets.ssv2(str(tmp_path / "rows.json"), str(tmp_path), None, None)


def test_other_lines_that_are_none_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"id": "1"}]')
    (tmp_path / "answers.csv").write_text("1;run\n2 run\n")
    with pytest.raises(UserError, match=r"answers.csv: line 2 is not `id;label`: '2 run'"):
        datasets.ssv2(str(tmp_path / "rows.json"), str(tmp_path), None, str(tmp_path / "answers.csv"))
    (tmp_path / "run_test_split1.txt").write_text("a.avi 1 \nb.avi 3\n")
    with pytest.raises(UserError, match=r"run_test_split1.txt: line 2 is not `<video> 0\|1\|2`: 'b.avi 3'"):
        datasets.hmdb51(str(tmp_path), str(tmp_path), 1, "train")


@pytest.mark.parametrize("number", ["1e400", "1.5", "-1", "true", '"²"', "NaN", "[0]", "1" * 30])
def test_label_numbers_that_are_none_are_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(f'{{"run": 0, "jump": {number}}}')
    with pytest.raises(UserError, match=r"labels.json: not a JSON object of .*: 'jump' has"):
        labels.read_label_map(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: run\njump\n", "line 2 is not `number: name` as others are: 'jump'"),
        ("0: run\n0: jump\n", "0 is both 'run' and 'jump'"),
        ("run\nrun\n", "'run' is both 0 and 1"),
        ("999999999: run\n", "'run' has the number 999999999"),
        ("run\x0cjump\n", "control character"),
    ],
)
def test_label_maps_that_say_two_things_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        labels.read_label_map(str(path))


def test_an_empty_line_of_a_label_map_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\r\nrun\r\n\r\njump\r\n\r\n")
    assert labels.read_label_map(str(path)) == ["", "run", "", "jump"]


def test_a_whole_video_is_not_taken_for_a_clip_but_named(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", "x/abc.mp4")
    (tmp_path / "rows.csv").write_text(f"{KINETICS}run,abc,1,11\n")
    (item,) = datasets.kinetics("kinetics400", str(tmp_path / "rows.csv"), str(videos), None).items
    assert item.path is None
    assert item.reason == (
        "missing: no video of this name, but x/abc.mp4: cut it, or if it is cut, call it abc_000001_000011"
    )
