"""Source `folder`: a tree of videos; the first folder below the top may be the label."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError, is_machines_fault
from data_prep.items import Inputs, Item, printable
from data_prep.table import ItemTable

_SUFFIXES = (
    "3g2 3gp asf avi divx dv f4v flv gif h264 hevc ivf m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf nut ogm ogv"
    " rm rmvb ts vob webm wmv"
)
UNREADABLE = "unreadable"
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
# Folders that systems and tools make for themselves; so are those whose name begins with a dot.
_JUNK = {"__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information"}
_JUNK |= {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}


@dataclass
class Walk:
    """One pass over what is below `top`, and what was seen beside the files."""

    top: Path
    refused: list[tuple[str, str]] = field(default_factory=list)  # folders that cannot be entered, with why
    # Hidden files, and folders that are no user's, by name.
    junk: Counter[str] = field(default_factory=Counter)

    def files(self) -> Iterator[str]:
        """Paths of every entry that is not a folder, sorted.

        Links to folders are followed; one that leads back to a folder on its own path is refused, not entered.
        Raises OSError if the disk or mount fails.
        """
        yield from self._enter(str(self.top), frozenset())

    def _enter(self, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                self.refused.append((folder, "symbolic link loop: it leads back to a folder above it"))
                return
            with os.scandir(folder) as found:
                entries = sorted((entry.name, _is_folder(entry)) for entry in found)
        except OSError as error:
            if is_machines_fault(error):
                raise
            self.refused.append((folder, f"{UNREADABLE}: {error.strerror}"))
            return
        for name, is_folder in entries:
            if is_folder and (name.startswith(".") or name.lower() in _JUNK):
                self.junk[f"{printable(name)}/"] += 1
            elif name.startswith("."):
                self.junk["hidden files"] += 1
            elif is_folder:
                yield from self._enter(os.path.join(folder, name), above | {identity})
            else:
                yield os.path.join(folder, name)

    def remarks(self) -> list[str]:
        """What was left aside, for the summary."""
        named = ", ".join(f"{count} x {name}" for name, count in sorted(self.junk.items()))
        return [f"left aside, of systems and tools: {named}"] if named else []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_machines_fault(error):
            raise
        return False  # a link to itself: opening it says so


def is_video(path: str) -> bool:
    """Whether `path` is a video by its name."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def read(videos: str, labels_from_folders: bool) -> Inputs:
    """The videos below the folder `videos`; raises UserError if there are none."""
    top = Path(videos).expanduser().absolute()  # Ray's workers stand in other folders
    if not top.is_dir():
        raise UserError(f"--videos {videos}: no such folder")
    walk, others, folders = Walk(top), Counter[str](), dict[str, str]()

    def items() -> Iterator[Item]:
        for path in walk.files():
            if not is_video(path):
                others[printable(os.path.splitext(path)[1].lower()) or "no suffix"] += 1
                continue
            relative = os.path.relpath(path, top)
            label = reason = None
            if labels_from_folders:
                first, below, _ = relative.partition("/")
                label = printable(first) if below else None
                reason = None if below else "label: the video stands in no label folder"
            if label is not None and folders.setdefault(label, first) != first:
                raise UserError(
                    f"--videos {videos}: two folders in it have names that read {label!r}: rename one"
                )
            yield Item(source=printable(relative), path=path, label_name=label, reason=reason)
        for path, why in walk.refused:
            yield Item(source=printable(os.path.relpath(path, top)), reason=why)

    table = ItemTable(items())
    if not table:
        raise UserError(f"--videos {videos}: no videos found (files there: {others.total()})")
    labels = table.label_names()
    if labels_from_folders and not labels:
        raise UserError(f"--labels-from-folders: {videos} holds no videos in folders below it")
    table.number_labels(labels)
    remarks = walk.remarks()
    if others:
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(others.items()))
        remarks.append(f"not considered, no video by their name: {kinds}")
    return Inputs(table, labels, {"source": "folder", "labels_from_folders": labels_from_folders}, remarks)
