"""Lists `path label` of VideoMAE, mmaction2 and relatives: read as they mean it, or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import lists
from data_prep.errors import UserError
from data_prep.items import Inputs
from tests.data_prep.test_datasets import by_source, touch

NAMES = [f"{letter}.mp4" for letter in "abcdef"]


def read(folder: Path, text: str | bytes, label_map: str | None = None) -> Inputs:
    """A list with this text beside the videos of `folder`."""
    (folder / "list.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    if label_map is not None:
        (folder / "labels.txt").write_text(label_map)
    return lists.listed(
        str(folder / "list.txt"), None, str(folder / "labels.txt") if label_map is not None else None
    )


def labels(inputs: Inputs) -> list[tuple[str, int, str | None]]:
    assert all(item.path and Path(item.path).is_file() for item in inputs.items)
    return [(item.source, item.label, item.label_name) for item in inputs.items]


def test_numbers_are_never_renumbered_and_minus_one_is_no_label(tmp_path: Path) -> None:
    touch(tmp_path, *NAMES)
    inputs = read(tmp_path, "a.mp4 0\nb.mp4 1\nc.mp4 2\nd.mp4 10\ne.mp4 -1\n")
    assert [item.label for item in inputs.items] == [0, 1, 2, 10, -1]
    assert [item.label_name for item in inputs.items] == ["0", "1", "2", "10", None]
    assert inputs.labels == [str(number) for number in range(11)]
    assert labels(read(tmp_path, "a.mp4 run\nb.mp4 -1\n")) == [("a.mp4", 0, "run"), ("b.mp4", -1, None)]
    assert read(tmp_path, "a.mp4 -1\nb.mp4 -1\n").labels == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.mp4 0\nb.mp4 run\n",
            r"line 2: 'b.mp4 run': .*line 2 has the name 'run' and line 1 the number 0",
        ),
        ("path label\na.mp4 0\n", r"line 1 is a header: 'path label'"),
        ("video,class_id\na.mp4,0\n", r"line 1 is not `path label`|line 1 is a header"),
        ("clip verb\na.mp4 0\n", r"line 2: 'a.mp4 0': .*line 1 has the name 'verb'"),
        ("a.mp4 0\nb.mp4 -2\n", r"line 2: 'b.mp4 -2': the label -2 is negative"),
        ("a.mp4 0\nb.mp4 1000000\n", r"line 2: 'b.mp4 1000000': the label 1000000 is too large"),
        (f"a.mp4 {'9' * 5000}\n", r"line 1: .*is too large"),
        ("a.mp4 0.5\n", r"line 1: 'a.mp4 0.5': the label 0.5 is not a whole number"),
        ("a.mp4 1e400\n", r"the label 1e400 is not a whole number"),
    ],
)
def test_labels_that_do_not_go_together_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, *NAMES)
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_labels_that_the_map_lacks_name_the_line(tmp_path: Path) -> None:
    touch(tmp_path, *NAMES)
    with pytest.raises(UserError, match=r"line 2: 'b.mp4 3': the label 3 is not in --label-map"):
        read(tmp_path, "a.mp4 0\nb.mp4 3\n", "run\njump\n")
    with pytest.raises(UserError, match=r"line 2: 'b.mp4 1': the label 1 is not in --label-map"):
        read(tmp_path, "a.mp4 0\nb.mp4 1\n", "run\n\njump\n")  # a number without a name
    with pytest.raises(UserError, match=r"line 1: 'a.mp4 walk': the label 'walk' is not in --label-map"):
        read(tmp_path, "a.mp4 walk\n", "run\njump\n")
    assert labels(read(tmp_path, "a.mp4 2\nb.mp4 -1\n", "run\n\njump\n")) == [
        ("a.mp4", 2, "jump"),
        ("b.mp4", -1, None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4 0\nb.mp4 1\n",
        "a.mp4  0\nb.mp4  1\n",
        "a.mp4,0\nb.mp4,1\n",
        "a.mp4, 0\nb.mp4, 1\n",
        "a.mp4\t0\nb.mp4\t1\n",
        b"\xef\xbb\xbfa.mp4 0\r\n\r\nb.mp4 1\r\n",
        "# made by hand\na.mp4 0\n#\n  \nb.mp4 1",
        "\"a.mp4\" 0\n'b.mp4' 1\n",
        '"a.mp4","0"\n"b.mp4","1"\n',
    ],
)
def test_forms_of_one_list_read_alike(tmp_path: Path, text: str | bytes) -> None:
    touch(tmp_path, *NAMES)
    inputs = read(tmp_path, text)
    assert labels(inputs) == [("a.mp4", 0, "0"), ("b.mp4", 1, "1")]
    assert inputs.labels == ["0", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4,playing guitar\nb, c/d e.mp4,run\n",
        "a.mp4\tplaying guitar\nb, c/d e.mp4\trun\n",
        '"a.mp4" "playing guitar"\n"b, c/d e.mp4" run\n',
        'a.mp4 "playing guitar"\nb, c/d e.mp4 run\n',
    ],
)
def test_names_and_paths_with_blanks_and_commas(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.mp4", "b, c/d e.mp4")
    assert labels(read(tmp_path, text)) == [("a.mp4", 0, "playing guitar"), ("b, c/d e.mp4", 1, "run")]


def test_paths_with_blanks_and_numbers_at_their_ends(tmp_path: Path) -> None:
    touch(
        tmp_path, "a b/one two.mp4", "[x] (HQ) 300+.avi", "take 12.mp4", "b, c/x 3", "'t.mp4", 'say "hi".mp4'
    )
    text = 'a b/one two.mp4 2\n[x] (HQ) 300+.avi 0\ntake 12 1\nb, c/x 3 4\n\'t.mp4 0\n"say ""hi"".mp4" 5\n'
    assert [label for _, label, _ in labels(read(tmp_path, text))] == [2, 0, 1, 4, 0, 5]
    (missing,) = read(tmp_path, "missing one.mp4 1\n").items
    assert missing.reason == "missing: no file of this name"
    touch(tmp_path, "elsewhere/list/x.mp4")
    absolute = tmp_path / "elsewhere/list/x.mp4"
    assert by_source(read(tmp_path, f"{absolute} label_1\n"))[str(absolute)].path == str(absolute)


def test_paths_without_a_suffix_are_the_videos_of_that_name(tmp_path: Path) -> None:
    touch(tmp_path, "k/a.mp4", "k/b.webm", "k/c.mp4", "k/c.mkv", "k/c/img_00001.jpg")
    items = by_source(read(tmp_path, "k/a 0\nk/b 1\nk/c 2\nk/d 3\n"))
    assert [(items[name].file, items[name].label) for name in ("k/a", "k/b")] == [
        ("k/a.mp4", 0),
        ("k/b.webm", 1),
    ]
    assert [name for group in items["k/c"].choices for _, name in group] == ["k/c.mp4", "k/c.mkv"]
    assert items["k/d"].reason == "missing: no file of this name"


def test_a_whole_video_without_a_label_in_videomae_v2s_form(tmp_path: Path) -> None:
    touch(tmp_path, *NAMES)
    inputs = read(tmp_path, "a.mp4 0 -1\nb.mp4 0 -1\n")
    assert labels(inputs) == [("a.mp4", -1, None), ("b.mp4", -1, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 163 1\n", "line 1 has 3 columns: 'a.mp4 163 1'; expected `path label`"),  # frames, label
        ("a.mp4 0\nb.mp4 1 3 5\n", "line 2 has 4 columns"),  # several labels
        ("d/one 163 1\n", "line 1 has 3 columns"),  # a folder of pictures and their number
        ("d/one 12 163 3\n", "line 1 has 4 columns"),  # the same with its first picture
        ("d/one 1\n", "line 1: 'd/one' is a folder; lists of folders of pictures are not read"),
        ("a.mp4,163,1\n", "line 1 has 3 columns"),
        ("a.mp4,run,1\n", "line 1 has 3 columns"),
        ('"a.mp4" 163 1\n', "line 1 has more than two columns"),
        ("a.mp4 playing guitar\n", "line 1 has 3 columns.*quote a path or a label with blanks"),
        ("alone.mp4\n", "line 1 is not `path label`"),
        ("a.mp4 0\nb.mp4,1\n", "line 2 is not `path label`"),
        ("#a.mp4 0\n", "line 1: '#a.mp4 0' is no file; a comment begins with `# `"),
        ("a.mp4 0\x00\n", "line 1: the line .*control character"),
        ("a.mp4 0\n".encode("utf-16"), "not UTF-8 text .*save it as UTF-8"),
        ("\n# nothing\n", "it lists no videos"),
    ],
)
def test_other_forms_are_refused_with_the_line_and_the_form(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    touch(tmp_path, *NAMES, "d/one/img_00001.jpg")
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_list_may_come_through_a_pipe(tmp_path: Path) -> None:
    import os

    touch(tmp_path, *NAMES)
    reading, writing = os.pipe()
    os.write(writing, b"a.mp4,0\nb.mp4,1\n")
    os.close(writing)
    inputs = lists.listed(f"/dev/fd/{reading}", str(tmp_path), None)
    os.close(reading)
    assert labels(inputs) == [("a.mp4", 0, "0"), ("b.mp4", 1, "1")]
