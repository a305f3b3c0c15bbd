"""Inputs and names of files in a temporary database on disk, so that a million of them take no memory."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from data_prep.items import DUPLICATE, Item

_COLUMNS = "source, path, file, choices, label, label_name, extra, reason"


def temporary_database() -> sqlite3.Connection:
    """An empty database in a file of the temporary folder that nobody else sees and that goes with the process."""
    base = sqlite3.connect("", isolation_level=None)
    base.execute("pragma journal_mode = off")
    base.execute("pragma synchronous = off")
    base.execute("pragma cache_size = -16384")  # KiB
    return base


class ItemTable(Sequence[Item]):
    """Items in their order. One whose name has come before is refused as a duplicate."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._base = temporary_database()
        self._base.execute(
            "create table items (number integer primary key, source text, path blob, file text, choices blob,"
            " label integer, label_name text, extra text, reason text)"
        )
        self._base.execute("begin")
        places = ",".join("?" * 8)
        self._base.executemany(f"insert into items ({_COLUMNS}) values ({places})", map(_row, items))
        self._base.execute("create index sources on items (source)")
        self._base.execute(
            "update items set reason = ?, path = null, choices = null where exists (select 1 from items as"
            " earlier where earlier.source = items.source and earlier.number < items.number)",
            (DUPLICATE,),
        )
        self._base.execute("commit")
        (self._count,) = self._base.execute("select count(*) from items").fetchone()

    def label_names(self) -> list[str]:
        """The names that occur, sorted."""
        found = self._base.execute("select distinct label_name from items where label_name is not null")
        return sorted(name for (name,) in found)

    def number_labels(self, labels: list[str]) -> None:
        """Give every item with a label's name the place of that name in `labels`."""
        self._base.execute("create temp table numbers (name text primary key, number integer)")
        named = [(name, number) for number, name in enumerate(labels) if name]
        self._base.executemany("insert into numbers values (?, ?)", named)
        self._base.execute(
            "update items set label = (select numbers.number from numbers where name = label_name)"
            " where label_name is not null"
        )
        self._base.execute("drop table numbers")

    def found(self) -> int:
        """How many have a file."""
        (count,) = self._base.execute("select count(*) from items where path is not null").fetchone()
        return int(count)

    def __len__(self) -> int:
        return int(self._count)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place] + 1
        row = self._base.execute(f"select {_COLUMNS} from items where number = ?", (number,)).fetchone()
        return _item(row)

    def __iter__(self) -> Iterator[Item]:
        return map(_item, self._base.execute(f"select {_COLUMNS} from items order by number"))


def _row(item: Item) -> tuple[Any, ...]:
    assert item.clip is None, "rendered clips are computed, not kept"
    return (
        item.source,
        os.fsencode(item.path) if item.path is not None else None,
        item.file,
        # Names of files may hold bytes that are not UTF-8.
        json.dumps(item.choices) if item.choices else None,
        item.label,
        item.label_name,
        json.dumps(item.extra) if item.extra else None,
        item.reason,
    )


def _item(row: tuple[Any, ...]) -> Item:
    source, path, file, choices, label, label_name, extra, reason = row
    return Item(
        source=source,
        path=os.fsdecode(path) if path is not None else None,
        file=file,
        choices=_choices(choices) if choices else (),
        label=label,
        label_name=label_name,
        extra=json.loads(extra) if extra else {},
        reason=reason,
    )


def _choices(text: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple((path, file) for path, file in group) for group in json.loads(text))


class NameTable:
    """A set of names."""

    def __init__(self) -> None:
        self._base = temporary_database()
        self._base.execute("create table names (name text primary key) without rowid")

    def add(self, names: Iterable[str]) -> None:
        self._base.execute("begin")
        self._base.executemany("insert or ignore into names values (?)", ((name,) for name in names))
        self._base.execute("commit")

    def __contains__(self, name: str) -> bool:
        return self._base.execute("select 1 from names where name = ?", (name,)).fetchone() is not None


class FileTable:
    """Video files by their name without suffix."""

    def __init__(self, files: Iterable[str], top: str) -> None:
        """`files`: paths below the folder `top`."""
        self._base = temporary_database()
        self._base.execute("create table files (stem blob, path blob)")
        self._base.execute("begin")
        skipped = len(os.fsencode(top)) + (not top.endswith("/"))
        self._base.executemany(
            "insert into files values (?, ?)",
            ((_stem(path), os.fsencode(path)[skipped:]) for path in files),
        )
        self._base.execute("create index stems on files (stem)")
        self._base.execute("commit")
        (self.count,) = self._base.execute("select count(*) from files").fetchone()

    def named(self, stem: str) -> list[str]:
        """Paths below the top of the files called `stem`, in the order in which they were given."""
        rows = self._base.execute(
            "select path from files where stem = ? order by rowid", (os.fsencode(stem),)
        )
        return [os.fsdecode(path) for (path,) in rows]


def _stem(path: str) -> bytes:
    return os.fsencode(os.path.splitext(os.path.basename(path))[0])
