"""Sources that follow an annotation file: Kinetics, Something-Something V2, HMDB51, AVA, plain lists.

Each row of the annotation is one input, whether its video is there or not: a video that is missing is a reject.
Videos are found by the name that the data set's publishers give them, without the suffix, anywhere below the
videos' folder; where two files have that name neither is taken.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.folder import UNREADABLE, VIDEO_SUFFIXES, walk
from data_prep.items import DUPLICATE, Inputs, Item, printable

# Of protobuf's text format what label maps use: entries that hold fields with one word or a quoted text.
_PROTO_FIELD = re.compile(r"""(\w+)\s*:\s*(?:(["'])(.*?)\2|(\d+|\w+))""")
_PROTO_ENTRY = re.compile(r"""\b(?:label|item)\s*\{((?:"[^"]*"|'[^']*'|[^{}"'])*)\}""")
KINETICS_LABELS = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700}


class VideoFiles:
    """The video files below a folder, by name without suffix."""

    def __init__(self, videos: str) -> None:
        self.top = Path(videos).expanduser().absolute()  # Ray's workers stand in other folders
        if not self.top.is_dir():
            raise UserError(f"--videos {videos}: no such folder")
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        files, refused = walk(self.top)
        closed = [
            f"{folder}: {why}" for folder, why in refused if why.startswith(UNREADABLE)
        ]  # the others: loops
        if closed:
            raise UserError(
                f"--videos {videos}: {len(closed)} folder(s) in it cannot be entered, first {closed[0]}; what is "
                "in them would count as missing: make them readable, or move them away"
            )
        for path in files:
            if path.suffix.lower() in VIDEO_SUFFIXES:
                self._by_stem[path.stem].append(path)
        self.count = sum(map(len, self._by_stem.values()))

    def located(self, item: Item, stem: str, folder: str | None = None) -> Item:
        """`item` with its file, the one called `stem` (in `folder`, where several are), or with the reason
        why it has none."""
        found = self._by_stem.get(stem, [])
        if len(found) > 1 and folder:
            found = [path for path in found if path.parent.name == folder] or found
        if not found:
            return replace(item, reason="missing: no video of this name")
        if len(found) > 1:
            return replace(item, reason=f"ambiguous: {len(found)} videos of this name")
        file = printable(found[0].relative_to(self.top).as_posix())
        return replace(item, path=str(found[0]), file=file)


def read_label_map(path: str) -> list[str]:
    """Label names by index from a file: one name a line, `index: name` lines, a JSON object `{name: index}`
    (Something-Something V2), or AVA's `.pbtxt` of labels or items. Indices without a name get an empty one."""
    text = _read(path, "--label-map")
    if path.endswith(".json"):
        numbers = _json(text, path)
        try:
            numbered = {int(index): name for name, index in numbers.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f'--label-map {path}: not a JSON object of {{"name": index}}') from None
    elif path.endswith(".pbtxt"):
        numbered = _text_proto_labels(text, path)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [line.partition(": ") for line in lines]
        if lines and all(mark and index.isdigit() for index, mark, _ in pairs):
            numbered = {int(index): name for index, _, name in pairs}
        else:
            numbered = dict(enumerate(lines))
    if not numbered:
        raise UserError(f"--label-map {path}: it names no labels")
    return [numbered.get(index, "") for index in range(max(numbered) + 1)]


def _text_proto_labels(text: str, path: str) -> dict[int, str]:
    """`label { name: "..." label_id: 1 label_type: ... }`, or `item { name: "..." id: 1 }` (AVA at ActivityNet)."""
    entries = _PROTO_ENTRY.findall(text)
    numbered = {}
    for entry in entries:
        fields = {name: quoted or word for name, _, quoted, word in _PROTO_FIELD.findall(entry)}
        index = fields.get("label_id", fields.get("id", ""))
        if not index.isdigit() or "name" not in fields:
            raise UserError(f"--label-map {path}: no name and number in {' '.join(entry.split())!r}")
        numbered[int(index)] = fields["name"]
    return numbered


def _read(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from error


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _labelled(items: Iterable[Item], label_map: str | None) -> tuple[list[Item], list[str]]:
    """The items with their labels' numbers: from the label map, or by the names' order."""
    items = list(items)
    names = sorted({item.label_name for item in items if item.label_name is not None})
    labels = read_label_map(label_map) if label_map else names
    number = {name: index for index, name in enumerate(labels)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise UserError(f"--label-map {label_map}: {len(unknown)} labels are not in it, first {unknown[0]!r}")
    numbered = [
        replace(item, label=number[item.label_name]) if item.label_name is not None else item
        for item in items
    ]
    return numbered, labels


def _once(items: Iterable[Item]) -> list[Item]:
    """The items; one whose name has come before is marked as a duplicate."""
    seen: set[str] = set()
    result = []
    for item in items:
        if item.source in seen:
            item = replace(item, reason=DUPLICATE, path=None)
        seen.add(item.source)
        result.append(item)
    return result


def kinetics(source: str, annotations: str, videos: str, label_map: str | None) -> Inputs:
    """A Kinetics CSV: columns by their names, in any order; `label` and `is_cc` may be absent."""
    reader = csv.DictReader(_read(annotations, "--annotations").splitlines())
    wanted = {"youtube_id", "time_start", "time_end"}
    if missing := wanted - set(reader.fieldnames or ()):
        raise UserError(
            f"--annotations {annotations}: no column {', '.join(sorted(missing))} in the first line"
        )
    files = VideoFiles(videos)
    items = []
    for row in reader:
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (TypeError, ValueError):
            raise UserError(f"--annotations {annotations}: line {reader.line_num} has no times") from None
        stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        label = row.get("label") or None
        items.append(files.located(Item(source=stem, label_name=label), stem, label))
    items, labels = _labelled(_once(items), label_map)
    remarks = []
    if labels and len(labels) != KINETICS_LABELS[source]:
        remarks.append(
            f"{len(labels)} labels, {source} has {KINETICS_LABELS[source]}: give --label-map, so that every "
            "split numbers them alike"
        )
    return _inputs(source, annotations, items, labels, files, remarks)


def ssv2(annotations: str, videos: str, label_map: str | None, answers: str | None) -> Inputs:
    """A Something-Something V2 JSON list; the label is the template without its brackets.

    `answers`: the test set's `id;label` CSV. `label_map`: the publishers' labels JSON.
    """
    rows = _json(_read(annotations, "--annotations"), annotations)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise UserError(f'--annotations {annotations}: not a list of objects with "id"')
    answer = {}
    if answers:
        for line in _read(answers, "--answers").splitlines():
            name, _, text = line.partition(";")
            answer[name.strip()] = text.strip()
    files = VideoFiles(videos)
    items = []
    for row in rows:
        name = str(row["id"])
        template = row.get("template")
        label = template.replace("[", "").replace("]", "") if template else answer.get(name)
        extra = {"caption": row["label"]} if "label" in row else {}
        items.append(files.located(Item(source=name, label_name=label, extra=extra), name))
    if label_map is None and any(item.label_name for item in items):
        raise UserError("ssv2: give --label-map, the publishers' labels JSON: it numbers the labels")
    items, labels = _labelled(_once(items), label_map)
    return _inputs("ssv2", annotations, items, labels, files, [])


def hmdb51(annotations: str, videos: str, fold: int, split: str) -> Inputs:
    """HMDB51's folder of `<class>_test_split<fold>.txt`: 1 marks training, 2 test, 0 neither."""
    wanted = {"train": "1", "test": "2"}.get(split)
    if wanted is None:
        raise UserError(f"--split {split}: hmdb51 has the splits train and test")
    ending = f"_test_split{fold}.txt"
    paths = sorted(Path(annotations).expanduser().glob(f"*{ending}"))
    if not paths:
        raise UserError(f"--annotations {annotations}: no files named <class>{ending} in that folder")
    files = VideoFiles(videos)
    items, others = [], 0
    for path in paths:
        label = path.name.removesuffix(ending)
        for line in _read(str(path), "--annotations").splitlines():
            name, _, flag = line.strip().rpartition(" ")
            if flag not in ("0", "1", "2") or not name:
                if line.strip():
                    raise UserError(f"{path}: not `<video> 0|1|2`: {line.strip()!r}")
            elif flag == wanted:
                item = Item(source=f"{label}/{name.strip()}", label_name=label)
                items.append(files.located(item, Path(name.strip()).stem, label))
            else:
                others += 1
    items, labels = _labelled(_once(items), None)
    remark = f"fold {fold}: {others} videos of the annotation belong to the other split or to none"
    inputs = _inputs("hmdb51", annotations, items, labels, files, [remark])
    return replace(inputs, description={**inputs.description, "fold": fold})


def ava(annotations: str, videos: str, label_map: str | None, video_start: float) -> Inputs:
    """AVA's box CSV without header: `video, time, x1, y1, x2, y2, action, person`, times in movie seconds.

    `video_start`: the movie second at which the video files begin: 900 for the usual 15-minute cuts.
    """
    boxes: dict[str, list[str]] = {}
    for number, line in enumerate(_read(annotations, "--annotations").splitlines(), 1):
        if not line.strip():
            continue
        video, _, rest = line.strip().partition(",")
        fields = rest.split(",")
        if len(fields) not in (1, 6, 7):  # a time alone: a key frame without boxes
            raise UserError(f"--annotations {annotations}: line {number} has {len(fields) + 1} columns")
        try:
            _ = [float(field) for field in fields[:5]], [int(field) for field in fields[5:] if field]
        except ValueError as error:
            raise UserError(f"--annotations {annotations}: line {number}: {error}") from None
        boxes.setdefault(video, [])
        if len(fields) > 1:
            boxes[video].append(rest)
    files = VideoFiles(videos)
    items = [
        files.located(Item(source=video, extra={"boxes": lines, "video_start": video_start}), video)
        for video, lines in boxes.items()
    ]
    labels = read_label_map(label_map) if label_map else []
    if labels:
        actions = {
            int(fields[5])
            for lines in boxes.values()
            for fields in (line.split(",") for line in lines)
            if fields[5]
        }
        named = {index for index, name in enumerate(labels) if name}
        if unknown := sorted(actions - named):
            raise UserError(
                f"--label-map {label_map}: it does not name the actions {', '.join(map(str, unknown))} of "
                f"{annotations}; the publishers' ava_action_list_v2.2.pbtxt names all 80"
            )
    return _inputs("ava", annotations, items, labels, files, [])


def listed(annotations: str, videos: str | None, label_map: str | None) -> Inputs:
    """Lines `path label`, as VideoMAE's lists: the label is the last word, the path may hold blanks.

    Numbers are the labels' indices, other words their names. Relative paths start at `videos`, or at the
    list's folder. A file's links and absolute paths are taken as they are.
    """
    top = Path(videos if videos else Path(annotations).parent).expanduser().absolute()
    if not top.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    rows = []
    for number, line in enumerate(_read(annotations, "--annotations").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.rsplit(None, 1)
        if len(parts) != 2:
            raise UserError(f"--annotations {annotations}: line {number} is not `path label`: {line!r}")
        rows.append((parts[0].strip(), parts[1]))
    numeric = all(label.isdigit() for _, label in rows)
    items = []
    for path, label in rows:
        item = Item(source=path, path=str(top / path), label_name=label)
        if not (top / path).exists() and not (top / path).is_symlink():
            item = replace(item, path=None, reason="missing: no file of this name")
        items.append(item)
    items = _once(items)
    if numeric and rows:
        highest = max(int(label) for _, label in rows)
        labels = read_label_map(label_map) if label_map else [str(index) for index in range(highest + 1)]
        if highest >= len(labels):
            raise UserError(f"--label-map {label_map}: label {highest} is not in it ({len(labels)} labels)")
        items = [
            replace(item, label=int(item.label_name or 0), label_name=labels[int(item.label_name or 0)])
            for item in items
        ]
    else:
        items, labels = _labelled(items, label_map)
    if not items:
        raise UserError(f"--annotations {annotations}: it lists no videos")
    return Inputs(items, labels, {"source": "list"})


def _inputs(
    source: str, annotations: str, items: list[Item], labels: list[str], files: VideoFiles, remarks: list[str]
) -> Inputs:
    if not items:
        raise UserError(f"--annotations {annotations}: it lists no videos")
    found = sum(item.path is not None for item in items)
    remarks = [f"{found} of {len(items)} listed videos found; {files.count} video files there", *remarks]
    return Inputs(items, labels, {"source": source}, remarks)
