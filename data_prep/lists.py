"""Source `list`: lines `path label`, as VideoMAE, mmaction2 and their relatives write them.

Read: blanks, tabs or commas between the columns, quoted columns, paths with blanks, paths without a suffix, numbers
or names as labels, -1 for no label, and `path 0 -1` (a whole video without a label, VideoMAE V2). What else those
projects write (frame counts, start frames, several labels, folders of pictures, a header) says other things than
one label for one video file, and looks alike, so it is refused with the line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from data_prep.errors import UserError
from data_prep.folder import VIDEO_SUFFIXES, is_video
from data_prep.items import Inputs, Item
from data_prep.labels import MOST_LABELS, read_label_map
from data_prep.reading import lines, opened, word
from data_prep.table import ItemTable

_FORM = "expected `path label` (or `path,label`, or a tab between them): one video file and one label"
_QUOTED_PATH = re.compile(r"""(["'])((?:(?!\1).|\1\1)+)\1(\s*,\s*|\s+)(\S.*)""")
_QUOTED_LABEL = re.compile(r"""(.*\S)(\s*,\s*|\s+)(["'])((?:(?!\3).|\3\3)+)\3""")
_WHOLE = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_HEADINGS = {"label", "labels", "class", "classes", "category", "target", "action"}
_HEADINGS |= {f"{name}_{what}" for name in ("label", "class") for what in ("id", "name", "index", "idx")}
_NO_LABEL = "-1"
_SUFFIXES = (".mp4", *sorted(VIDEO_SUFFIXES - {".mp4"}))


@dataclass(frozen=True)
class _Row:
    """One line: where and what it is, the path as it stands there, its files, and the label's text."""

    where: str
    line: str
    path: str
    files: tuple[str, ...]
    label: str


def listed(annotations: str, videos: str | None, label_map: str | None) -> Inputs:
    """The videos of a list. Numbers are the labels' own, other words their names, -1 means no label.

    Relative paths start at `videos`, or at the list's folder; links and absolute paths are taken as they are.
    Raises UserError with the line for what is not one video and one label, and for labels of both kinds.
    """
    top = str(Path(videos if videos else Path(annotations).parent).expanduser().absolute())
    if not os.path.isdir(top):
        raise UserError(f"--videos {videos}: no such folder")
    labels = _Labels(label_map)
    with opened(annotations, "--annotations") as file:
        commas = all(_has_comma(line, top) for _, line in lines(file) if not _is_comment(line))
        rows = _rows(file, f"--annotations {annotations}", top, commas)
        table = ItemTable(map(labels.labelled, rows))
    if not table:
        raise UserError(f"--annotations {annotations}: it lists no videos")
    if "number" in labels.seen:
        return Inputs(table, labels.known or list(map(str, range(labels.highest + 1))), {"source": "list"})
    names = labels.known or table.label_names()
    table.number_labels(names)
    return Inputs(table, names, {"source": "list"})


class _Labels:
    """What the labels of a list are: all numbers, or all names."""

    def __init__(self, label_map: str | None) -> None:
        self._map, self.known = label_map, read_label_map(label_map) if label_map else []
        self._names = set(self.known) - {""}
        self.seen: dict[str, _Row] = {}  # kind -> its first row
        self.highest = -1

    def labelled(self, row: _Row) -> Item:
        """The row's input; names get their numbers once all are known."""
        item = Item(source=row.path)
        if row.files:
            named = tuple((path, row.path + os.path.splitext(path)[1]) for path in row.files)
            suffixed = not row.files[0].endswith(row.path)
            item = replace(item, path=row.files[0], file=named[0][1] if suffixed else None)
            if len(named) > 1:
                item = replace(item, choices=(named,))
        else:
            item = replace(item, reason="missing: no file of this name")
        if row.label == _NO_LABEL:
            return item
        kind = "number" if _WHOLE.fullmatch(row.label) else "name"
        self.seen.setdefault(kind, row)
        if len(self.seen) > 1:
            number, name = self.seen["number"], self.seen["name"]
            raise UserError(
                f"{row.where}: {row.line!r}: labels are all numbers or all names, but {_short(name)} has the name "
                f"{name.label!r} and {_short(number)} the number {number.label}; remove a header "
                "line, give one kind, and -1 if there is no label"
            )
        if kind == "name":
            return replace(item, label_name=self._checked_name(row))
        label = self._checked_number(row)
        return replace(item, label=label, label_name=self.known[label] if self.known else str(label))

    def _checked_name(self, row: _Row) -> str:
        if _NUMBER.fullmatch(row.label):
            raise UserError(f"{row.where}: {row.line!r}: the label {row.label} is not a whole number")
        if self.known and row.label not in self._names:
            raise UserError(
                f"{row.where}: {row.line!r}: the label {row.label!r} is not in --label-map {self._map} "
                f"({len(self.known)} labels)"
            )
        return word(row.label, row.where, "the label")

    def _checked_number(self, row: _Row) -> int:
        where = f"{row.where}: {row.line!r}: the label {row.label}"
        if row.label.startswith("-"):
            raise UserError(f"{where} is negative; -1 means that there is none")
        if len(row.label) > len(str(MOST_LABELS)) or int(row.label) >= MOST_LABELS:
            raise UserError(f"{where} is too large: below {MOST_LABELS} is possible")
        number = int(row.label)
        if self.known and not (number < len(self.known) and self.known[number]):
            raise UserError(f"{where} is not in --label-map {self._map} ({len(self.known)} labels)")
        self.highest = max(self.highest, number)
        return number


def _short(row: _Row) -> str:
    return row.where.rpartition(": ")[2]


def _rows(file: IO[str], name: str, top: str, commas: bool) -> Iterator[_Row]:
    first = True
    for number, line in lines(file):
        where = f"{name}: line {number}"
        if _is_comment(line):
            continue
        word(line.replace("\t", " "), where, "the line")
        row = _row(where, line, top, commas)
        if first and row.label.lower() in _HEADINGS and not row.files and not is_video(row.path):
            raise UserError(f"{where} is a header: {line!r}; remove it. {_FORM}")
        if not row.files and row.path.startswith("#"):
            raise UserError(f"{where}: {line!r} is no file; a comment begins with `# `")
        first = False
        yield row


def _row(where: str, line: str, top: str, commas: bool) -> _Row:
    """The line taken apart. Raises UserError if it has more columns than two, or names a folder."""
    quoted = _QUOTED_PATH.fullmatch(line)
    if quoted:
        path, gap, label = _unquoted(quoted[1], quoted[2]), quoted[3], quoted[4]
    else:
        path, gap, label = _parted(line, commas)
    if not label:
        raise UserError(f"{where} is not `path label`: {line!r}; {_FORM}")
    words = re.split(r"\s*,\s*" if "," in gap else r"\t" if "\t" in gap else r"\s+", path)
    files = _files(top, path)
    if not quoted and not files and len(words) > 1:
        if (words[-1], label) == ("0", _NO_LABEL):  # from the first picture to the last
            path = path[: path.rindex("0")].rstrip(" \t,")
            files = _files(top, path)
        elif _WHOLE.fullmatch(words[-1]) or _has_columns(words, path):
            raise UserError(
                f"{where} has {len(words) + 1} columns: {line!r}; {_FORM}. Frame counts, start frames and several "
                "labels are not read; quote a path or a label with blanks in it"
            )
    if quoted and quoted[4] == label and _too_many(label, gap):
        raise UserError(f"{where} has more than two columns: {line!r}; {_FORM}")
    if len(label) > 1 and label[0] == label[-1] and label[0] in "\"'":
        label = _unquoted(label[0], label[1:-1])
    if len(files) == 1 and os.path.isdir(files[0]):
        raise UserError(f"{where}: {path!r} is a folder; lists of folders of pictures are not read. {_FORM}")
    return _Row(where, line, path, files, label.strip())


def _parted(line: str, commas: bool) -> tuple[str, str, str]:
    """Path, what parts them, and label; an empty label if there is none."""
    quoted = _QUOTED_LABEL.fullmatch(line)
    if quoted:
        return quoted[1], quoted[2], f"{quoted[3]}{quoted[4]}{quoted[3]}"
    gap = "\t" if "\t" in line else "," if commas else None
    parts = line.rsplit(gap, 1)
    if len(parts) != 2 or not parts[0].strip():
        return line, " ", ""
    return parts[0].strip(), gap or " ", parts[1].strip()


def _too_many(label: str, gap: str) -> bool:
    """Whether what follows a quoted path is more than a label."""
    if label[0] in "\"'" and label.endswith(label[0]) and len(label) > 1:
        return False
    return "," in label if "," in gap else "\t" in label if "\t" in gap else " " in label


def _has_columns(words: list[str], path: str) -> bool:
    """Whether a video's name ends before the path does."""
    return not is_video(path) and any(map(is_video, words))


def _unquoted(mark: str, text: str) -> str:
    return text.replace(2 * mark, mark)


def _has_comma(line: str, top: str) -> bool:
    """Whether a comma, or a tab, parts the line's columns, and not blanks."""
    if "\t" in line:
        return True
    if quoted := _QUOTED_PATH.fullmatch(line):
        return "," in quoted[3]
    if quoted := _QUOTED_LABEL.fullmatch(line):
        return "," in quoted[2]
    path, comma, label = line.rpartition(",")
    if not comma:
        return False
    return is_video(path.strip()) or bool(_WHOLE.fullmatch(label.strip())) or bool(_files(top, path.strip()))


def _is_comment(line: str) -> bool:
    return line == "#" or line.startswith(("# ", "#\t"))


def _files(top: str, path: str) -> tuple[str, ...]:
    """What `path` may mean: itself, or without a suffix the videos that it names."""
    whole = os.path.join(top, path)
    if os.path.lexists(whole) and not (os.path.isdir(whole) and not is_video(path)):
        return (whole,)
    if is_video(path):
        return ()
    named = tuple(found for suffix in _SUFFIXES if os.path.lexists(found := whole + suffix))
    return named or ((whole,) if os.path.isdir(whole) else ())
