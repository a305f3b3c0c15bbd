"""Inputs before any of them is opened: names, labels, and the order that deals them into shards."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_prep.synthetic import Clip

DUPLICATE = "duplicate: listed more than once"


@dataclass(frozen=True)
class Item:
    """One input: a file, a clip to be rendered, or one that is known to be missing."""

    source: str  # unique name of the input in its data set, as it goes into index and rejects
    path: str | None = None
    file: str | None = None  # where the source goes by another name: the file below the videos' folder
    clip: Clip | None = None
    label: int = -1
    label_name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the sample's JSON
    reason: str | None = None  # set where the input is refused before it is opened

    @property
    def key(self) -> str:
        """Name of the sample in the tar: readable, unique, and without a dot (WebDataset splits there)."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(self.source).stem).strip("_")[:64]
        return f"{stem or 'video'}-{_digest(self.source)[:12]}"


@dataclass(frozen=True)
class Inputs:
    """What a source found: the items, the label names by index, and what it left aside (for the summary)."""

    items: list[Item]
    labels: list[str]
    description: dict[str, Any]  # of the source; part of the fingerprint
    remarks: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Hex digest of names and labels in the source's order; files may come and go without changing it."""
        total = hashlib.sha256()
        for item in self.items:
            total.update(
                repr((item.source, item.label, item.label_name, item.extra)).encode(
                    "utf-8", "backslashreplace"
                )
            )
        return total.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """The items in an order drawn by hash: it depends on nothing but each name and the seed."""
    return sorted(items, key=lambda item: (_digest(f"{seed}/{item.source}"), item.source))


def printable(path: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
