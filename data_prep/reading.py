"""Annotation files as text: opened once, read row by row, and refused with file and line."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.items import CONTROL

_SPACE = re.compile(r"[ \t\r\n]*")


@contextlib.contextmanager
def opened(path: str, option: str) -> Iterator[IO[str]]:
    """The UTF-8 file `path` that `option` names, to be read more than once (so a pipe is copied first).

    Raises UserError if it cannot be read or is not UTF-8.
    """
    with contextlib.ExitStack() as stack:
        try:
            raw: IO[bytes] = stack.enter_context(open(Path(path).expanduser(), "rb"))
        except OSError as error:
            raise UserError(f"{option} {path}: {error.strerror or error}") from error
        if not raw.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(raw, copy)
            copy.seek(0)
            raw = copy
        try:
            yield stack.enter_context(open(raw.fileno(), encoding="utf-8-sig", newline="", closefd=False))
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x}"
            raise UserError(f"{option} {path}: not UTF-8 text ({byte}); save it as UTF-8") from error


def read_text(path: str, option: str) -> str:
    """The whole of a small file; lines end in a newline whatever system wrote it."""
    with opened(path, option) as file:
        return file.read().replace("\r\n", "\n").replace("\r", "\n")


def lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and texts of the lines that hold more than blanks, stripped."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if text := line.strip():
            yield number, text


def csv_rows(path: str, columns: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a row stands (for errors) and its fields by the names in the first line.

    Raises UserError if one of `columns` is absent or a row has more or fewer fields than the first line.
    """
    with opened(path, "--annotations") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            if missing := columns - set(names):
                raise UserError(
                    f"--annotations {path}: no column {', '.join(sorted(missing))} in the first line"
                )
            for fields in reader:
                where = f"--annotations {path}: line {reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise UserError(
                        f"{where} has {len(fields)} columns, the first line {len(names)}: {fields}"
                    )
                yield where, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise UserError(
                f"--annotations {path}: line {reader.line_num}: {error}: is a quotation mark open there, or in a "
                "line before?"
            ) from error


def json_of(text: str, path: str) -> Any:
    """The value in `text`; UserError names `path` if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def json_entries(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """Where each entry of the JSON list in `text` stands (for errors) and its value, one at a time."""

    def space(place: int) -> int:
        found = _SPACE.match(text, place)
        return found.end() if found else place

    decoder = json.JSONDecoder()
    place, number, seen = space(0), 1, 0
    if text[place : place + 1] != "[":
        raise UserError(f"--annotations {path}: not a JSON list")
    place = space(place + 1)
    while text[place : place + 1] != "]":
        number, seen = number + text.count("\n", seen, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--annotations {path}: line {number}: not JSON: {error}") from error
        yield f"--annotations {path}: line {number}", value
        place = space(place)
        if text[place : place + 1] == ",":
            place = space(place + 1)
        elif text[place : place + 1] != "]":
            raise UserError(f"--annotations {path}: not a whole JSON list: it breaks off after line {number}")


def finite(text: str, where: str, what: str) -> float:
    """The number in `text`; UserError if it is none, or not finite (`inf`, `nan`, `1e400`)."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {what} is {text!r}, not a finite number")
    return number


def whole(text: str, where: str, what: str) -> int:
    """The whole number from 0 in `text`, or UserError."""
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise UserError(f"{where}: {what} is {text!r}, not a whole number")
    return int(text)


def word(value: object, where: str, what: str) -> str:
    """`value` as it is, a text that can stand in an index; UserError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {what} is {value!r}, not a text")
    if CONTROL.search(value):
        raise UserError(f"{where}: {what} {value!r} holds a line break or another control character")
    return value
