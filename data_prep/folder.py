"""Source `folder`: a tree of videos; the first folder below the top may be the label."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from data_prep.errors import UserError, is_machines_fault
from data_prep.items import Inputs, Item, printable

_SUFFIXES = (
    "3g2 3gp asf avi divx dv f4v flv gif h264 hevc ivf m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf nut ogm ogv"
    " rm rmvb ts vob webm wmv"
)
UNREADABLE = "unreadable"
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))


def walk(top: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every entry below `top` that is not a folder, sorted, and the folders that cannot be entered, with why.

    Links to folders are followed; one that leads back to a folder on its own path is reported, not entered.
    Raises OSError where the disk or mount fails.
    """
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []

    def enter(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                refused.append((folder, "symbolic link loop: it leads back to a folder above it"))
                return
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if is_machines_fault(error):
                raise
            refused.append((folder, f"{UNREADABLE}: {error.strerror}"))
            return
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                if is_machines_fault(error):
                    raise
                is_folder = False  # a link to itself: opening it says so
            if is_folder:
                enter(folder / entry.name, above | {identity})
            else:
                files.append(folder / entry.name)

    enter(top, frozenset())
    return files, refused


def read(videos: str, labels_from_folders: bool) -> Inputs:
    """The videos below the folder `videos`; raises UserError where there are none."""
    top = Path(videos).expanduser().absolute()  # Ray's workers stand in other folders
    if not top.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    files, refused = walk(top)
    chosen = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    others = Counter(
        path.suffix.lower() or "no suffix" for path in files if path.suffix.lower() not in VIDEO_SUFFIXES
    )
    names = {path: printable(path.relative_to(top).as_posix()) for path in chosen}
    labels: list[str] = []
    if labels_from_folders:
        labels = sorted({name.split("/")[0] for name in names.values() if "/" in name})
        if not labels:
            raise UserError(f"--labels-from-folders: {videos} holds no videos in folders below it")
    index = {label: number for number, label in enumerate(labels)}
    items = []
    for path, name in names.items():
        label = name.split("/")[0] if labels and "/" in name else None
        reason = "label: the video stands in no label folder" if labels and label is None else None
        items.append(
            Item(
                source=name,
                path=str(path),
                label=index[label] if label is not None else -1,
                label_name=label,
                reason=reason,
            )
        )
    items += [Item(source=printable(path.relative_to(top).as_posix()), reason=why) for path, why in refused]
    if not items:
        raise UserError(f"--videos {videos}: no videos found (files there: {len(files)})")
    remarks = []
    if others:
        kinds = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in sorted(others.items()))
        remarks.append(f"not considered, no video by their name: {kinds}")
    return Inputs(items, labels, {"source": "folder", "labels_from_folders": labels_from_folders}, remarks)
