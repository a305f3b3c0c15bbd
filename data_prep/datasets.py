"""Sources that follow an annotation file: Kinetics, Something-Something V2, HMDB51, AVA.

Each row of the annotation is one input, whether its video is there or not: a video that is missing is a reject.
Videos are found by the name that the data set's publishers give them, without the suffix, anywhere below the
videos' folder; if several files have that name the one that is sound is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.items import Inputs, Item, printable
from data_prep.labels import numbered_names, read_label_map
from data_prep.reading import csv_rows, finite, json_entries, lines, opened, read_text, whole, word
from data_prep.table import ItemTable
from data_prep.videos import VideoFiles

KINETICS_LABELS = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700}


def kinetics(source: str, annotations: str, videos: str, label_map: str | None) -> Inputs:
    """A Kinetics CSV: columns by their names, in any order; `label` and `is_cc` may be absent."""

    def items(files: VideoFiles) -> Iterator[Item]:
        for where, row in csv_rows(annotations, {"youtube_id", "time_start", "time_end"}):
            youtube = word(row["youtube_id"], where, "youtube_id")
            start, end = (finite(row[name], where, name) for name in ("time_start", "time_end"))
            if not 0 <= start <= end < 1e6:
                raise UserError(f"{where}: the video is said to last from {start:g} to {end:g} seconds")
            stem = f"{youtube}_{int(start):06d}_{int(end):06d}"
            label = word(row["label"], where, "label") if row.get("label") else None
            yield files.located(Item(source=stem, label_name=label), stem, label, whole=youtube)

    inputs = _inputs(source, annotations, videos, items, label_map)
    if inputs.labels and len(inputs.labels) != KINETICS_LABELS[source]:
        inputs.remarks.append(
            f"{len(inputs.labels)} labels, {source} has {KINETICS_LABELS[source]}: give --label-map, so that every "
            "split numbers them alike"
        )
    return inputs


def ssv2(annotations: str, videos: str, label_map: str | None, answers: str | None) -> Inputs:
    """A Something-Something V2 JSON list; the label is the template without its brackets.

    `answers`: the test set's `id;label` CSV. `label_map`: the publishers' labels JSON.
    """
    answer = dict(_answers(answers)) if answers else {}

    def items(files: VideoFiles) -> Iterator[Item]:
        for where, row in json_entries(read_text(annotations, "--annotations"), annotations):
            name = row.get("id") if isinstance(row, dict) else None
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise UserError(f'{where}: an entry without a text or number "id"')
            name = word(str(name), where, "id")
            template = word(row["template"], where, "template") if row.get("template") else None
            label = template.replace("[", "").replace("]", "") if template else answer.get(name)
            if label and label_map is None:
                raise UserError("ssv2: give --label-map, the publishers' labels JSON: it numbers the labels")
            extra = {"caption": word(row["label"], where, "label")} if "label" in row else {}
            yield files.located(Item(source=name, label_name=label, extra=extra), name)

    return _inputs("ssv2", annotations, videos, items, label_map)


def _answers(path: str) -> Iterator[tuple[str, str]]:
    with opened(path, "--answers") as file:
        for number, line in lines(file):
            name, mark, text = line.partition(";")
            where = f"--answers {path}: line {number}"
            if not mark:
                raise UserError(f"{where} is not `id;label`: {line!r}")
            yield name.strip(), word(text.strip(), where, "the label")


def hmdb51(annotations: str, videos: str, fold: int, split: str) -> Inputs:
    """HMDB51's folder of `<class>_test_split<fold>.txt`: 1 marks training, 2 test, 0 neither."""
    wanted = {"train": "1", "test": "2"}.get(split)
    if wanted is None:
        raise UserError(f"--split {split}: hmdb51 has the splits train and test")
    ending = f"_test_split{fold}.txt"
    paths = sorted(Path(annotations).expanduser().glob(f"[!.]*{ending}"))
    if not paths:
        raise UserError(f"--annotations {annotations}: no files named <class>{ending} in that folder")
    others = 0

    def items(files: VideoFiles) -> Iterator[Item]:
        nonlocal others
        for path in paths:
            label = path.name.removesuffix(ending)
            with opened(str(path), "--annotations") as file:
                for number, line in lines(file):
                    where = f"{printable(str(path))}: line {number}"
                    name, _, flag = line.rpartition(" ")
                    name = name.strip()
                    if flag not in ("0", "1", "2") or not name:
                        raise UserError(f"{where} is not `<video> 0|1|2`: {line!r}")
                    if flag != wanted:
                        others += 1
                        continue
                    item = Item(
                        source=word(f"{printable(label)}/{name}", where, "video"), label_name=printable(label)
                    )
                    yield files.located(item, Path(name).stem, label)

    inputs = _inputs("hmdb51", annotations, videos, items, None)
    inputs.remarks.append(
        f"fold {fold}: {others} videos of the annotation belong to the other split or to none"
    )
    return replace(inputs, description={**inputs.description, "fold": fold})


def ava(annotations: str, videos: str, label_map: str | None, video_start: float) -> Inputs:
    """AVA's box CSV without header: `video, time, x1, y1, x2, y2, action, person`, times in movie seconds.

    `video_start`: the movie second at which the video files begin: 900 for the usual 15-minute cuts.
    """
    boxes: dict[str, list[str]] = {}
    actions: set[int] = set()
    with opened(annotations, "--annotations") as file:
        for number, line in lines(file):
            where = f"--annotations {annotations}: line {number}"
            video, _, rest = line.partition(",")
            fields = rest.split(",")
            if len(fields) not in (1, 6, 7):  # a time alone: a key frame without boxes
                raise UserError(f"{where} has {len(fields) + 1} columns")
            actions |= _checked_box(fields, where)
            boxes.setdefault(word(video, where, "video"), [])
            if len(fields) > 1:
                boxes[video].append(rest)

    def items(files: VideoFiles) -> Iterator[Item]:
        for video, rows in boxes.items():
            yield files.located(Item(source=video, extra={"boxes": rows, "video_start": video_start}), video)

    inputs = _inputs("ava", annotations, videos, items, None)
    labels = read_label_map(label_map) if label_map else []
    named = {index for index, name in enumerate(labels) if name}
    if labels and (unknown := sorted(actions - named)):
        raise UserError(
            f"--label-map {label_map}: it does not name the actions {', '.join(map(str, unknown))} of "
            f"{annotations}; the publishers' ava_action_list_v2.2.pbtxt names all 80"
        )
    return replace(inputs, labels=labels)


def _checked_box(fields: list[str], where: str) -> set[int]:
    """The action of a row `time[, x1, y1, x2, y2, action[, person]]`, if it has one; raises UserError."""
    if finite(fields[0], where, "the time") < 0:
        raise UserError(f"{where}: the time is {fields[0]!r}, before the movie's beginning")
    names = ("x1", "y1", "x2", "y2")
    box = [finite(field, where, name) for name, field in zip(names, fields[1:5], strict=False)]
    if box and not (box[0] <= box[2] and box[1] <= box[3]):
        raise UserError(f"{where}: the box ends before it begins: {','.join(fields[1:5])}")
    if len(fields) > 6 and fields[6]:
        whole(fields[6], where, "the person")
    return {whole(fields[5], where, "the action")} if len(fields) > 5 and fields[5] else set()


def _inputs(
    source: str,
    annotations: str,
    videos: str,
    items: Callable[[VideoFiles], Iterable[Item]],
    label_map: str | None,
) -> Inputs:
    """Inputs of the rows that `items` yields, their labels numbered by the label map or by the names' order."""
    files = VideoFiles(videos)
    table = ItemTable(items(files))
    if not table:
        raise UserError(f"--annotations {annotations}: it lists no videos")
    labels = numbered_names(table.label_names(), label_map)
    table.number_labels(labels)
    found = f"{table.found()} of {len(table)} listed videos found; {files.count} video files there"
    return Inputs(table, labels, {"source": source}, [found, *files.remarks])
