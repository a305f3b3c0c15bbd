"""The video files below a folder, looked up by name for the sources that follow an annotation."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.folder import UNREADABLE, Walk, is_video
from data_prep.items import Item, printable
from data_prep.table import FileTable

_MISSING = "missing: no video of this name"


class VideoFiles:
    """The video files below a folder, by name without suffix."""

    def __init__(self, videos: str) -> None:
        self.top = str(Path(videos).expanduser().absolute())  # Ray's workers stand in other folders
        if not os.path.isdir(self.top):
            raise UserError(f"--videos {videos}: no such folder")
        walk = Walk(Path(self.top))
        self._table = FileTable(filter(is_video, walk.files()), self.top)
        closed = [f"{folder}: {why}" for folder, why in walk.refused if why.startswith(UNREADABLE)]
        if closed:  # the others are loops
            raise UserError(
                f"--videos {videos}: {len(closed)} folder(s) in it cannot be entered, first {closed[0]}; what is "
                "in them would count as missing: make them readable, or move them away"
            )
        self.count = self._table.count
        self.remarks = walk.remarks()

    def located(self, item: Item, stem: str, folder: str | None = None, whole: str | None = None) -> Item:
        """`item` with its file, the one called `stem`, or with the reason why it has none.

        Of several, those in `folder` have the better claim. `whole`: what the uncut video would be called, which
        is never taken, but named to the user.
        """
        found = self._table.named(stem)
        if not found:
            uncut = self._table.named(whole) if whole else []
            hint = f", but {printable(uncut[0])}: cut it, or if it is cut, call it {stem}" if uncut else ""
            return replace(item, reason=_MISSING + hint)
        if len(found) == 1:
            path, file = self._placed(found[0])
            return replace(item, path=path, file=file)
        near = [path for path in found if folder and os.path.basename(os.path.dirname(path)) == folder]
        others = [path for path in found if path not in near]
        groups = tuple(tuple(map(self._placed, group)) for group in (near, others) if group)
        path, file = groups[0][0]
        return replace(item, path=path, file=file, choices=groups)

    def _placed(self, path: str) -> tuple[str, str]:
        return os.path.join(self.top, path), printable(path)
