"""Inputs before any of them is opened: names, labels, and the order that deals them into shards.

Of a large set no input is kept as an object: sources give sequences that make an `Item` when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, overload

import numpy as np

from data_prep.errors import UserError
from data_prep.synthetic import Clip

# What no name in an index or a list of labels may hold: line breaks, other control characters, half characters.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
DUPLICATE = "duplicate: listed more than once"


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a file, a clip to be rendered, or one that is known to be missing.

    `choices`: if several files have its name, their paths and names below the videos' folder, in groups: a file
    of the first group has the better claim. Which one is taken depends on which are sound.
    """

    source: str  # unique name of the input in its data set, as it goes into index and rejects
    path: str | None = None
    file: str | None = None  # if the source goes by another name: the file below the videos' folder
    choices: tuple[tuple[tuple[str, str], ...], ...] = ()
    clip: Clip | None = None
    label: int = -1
    label_name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the sample's JSON
    reason: str | None = None  # set if the input is refused before it is opened

    @property
    def key(self) -> str:
        """Name of the sample in the tar: readable, unique, and without a dot (WebDataset splits there)."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(self.source).stem).strip("_")[:64]
        return f"{stem or 'video'}-{_digest(self.source)[:12]}"


@dataclass(frozen=True)
class Inputs:
    """What a source found: the items, the label names by index, and what it left aside (for the summary)."""

    items: Sequence[Item]
    labels: list[str]
    description: dict[str, Any]  # of the source; part of the fingerprint
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for label in self.labels:
            if CONTROL.search(label):
                raise UserError(f"the label {label!r} holds a line break or another control character")

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


class Computed(Sequence[Item]):
    """`count` items, each made when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self._make(number) for number in range(*place.indices(self._count))]
        return self._make(range(self._count)[place])

    def __iter__(self) -> Iterator[Item]:
        return map(self._make, range(self._count))


def shuffled(items: Iterable[Item], seed: int) -> Sequence[Item]:
    """The items in an order drawn by hash: it depends on nothing but each name and the seed."""
    kept = items if isinstance(items, Sequence) else list(items)
    # The first 128 bits of the digests are enough: who agrees in them has the same name, and stays in order.
    halves = np.empty((len(kept), 2), dtype=np.uint64)
    for place, item in enumerate(kept):
        digest = bytes.fromhex(_digest(f"{seed}/{item.source}")[:32])
        halves[place] = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return Computed(len(kept), lambda place: kept[int(order[place])])


def printable(path: str) -> str:
    """A file name as one line of valid text: control characters, and bytes that are not UTF-8, become escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
