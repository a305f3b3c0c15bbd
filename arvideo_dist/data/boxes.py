"""Boxes and edit lists of mp4 and QuickTime files (ISO/IEC 14496-12).

Malformed ones raise KeyError, IndexError, ValueError or struct.error. Without numpy: a process that only looks
into files starts sooner.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, NamedTuple


def boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Type and body of each box in `data`."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            body = 16
        elif size == 0:
            size = len(data) - at
        if size < body or at + size > len(data):
            raise ValueError("a box passes the end")
        yield kind, data[at + body : at + size]
        at += size


class Edit(NamedTuple):
    """One entry of a track's edit list: what is shown next."""

    duration: int  # in ticks of the movie's clock
    start: int  # tick of the track's clock that is shown first; -1: nothing is shown
    rate: float  # at which the track's clock runs meanwhile


def read_movie(file: IO[bytes]) -> bytes:
    """The body of the movie box of an mp4 or QuickTime file, read without the rest; empty if it has none."""
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        body = size - 8
        if size == 1:
            body = int.from_bytes(file.read(8), "big") - 16
        if kind == b"moov":
            return file.read(body if size else -1)
        if not size or body < 0:
            break
        file.seek(body, 1)
    return b""


def read_edits(movie: memoryview, track_id: int) -> list[Edit]:
    """The edit list of one track, from the movie box's body; empty if it has none."""
    for kind, body in boxes(movie):
        if kind == b"trak":
            track = dict(boxes(body))
            if int.from_bytes(track[b"tkhd"][_after_dates(track[b"tkhd"])][:4], "big") == track_id:
                return edit_list(dict(boxes(track[b"edts"]))[b"elst"]) if b"edts" in track else []
    return []


def has_edits(video: bytes) -> bool:
    """Whether a track of the mp4 file `video` has an edit list."""
    try:
        movie = dict(boxes(memoryview(video)))[b"moov"]
        return any(b"edts" in dict(boxes(body)) for kind, body in boxes(movie) if kind == b"trak")
    except (KeyError, ValueError, struct.error):
        return False


def edit_list(box: memoryview) -> list[Edit]:
    entry = ">Qqi" if box[0] == 1 else ">Iii"
    count = min(int.from_bytes(box[4:8], "big"), (len(box) - 8) // struct.calcsize(entry))
    entries = struct.iter_unpack(entry, box[8 : 8 + count * struct.calcsize(entry)])
    return [Edit(duration, start, rate / 65536) for duration, start, rate in entries]


def _after_dates(box: memoryview) -> slice:
    """Of a header box (mvhd, tkhd, mdhd): what follows its version, flags and two dates."""
    return slice(20 if box[0] == 1 else 12, None)


def ticks_a_second(header: memoryview) -> int:
    return int.from_bytes(header[_after_dates(header)][:4], "big")
