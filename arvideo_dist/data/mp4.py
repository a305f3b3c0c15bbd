"""The sample table of an mp4 file: where each coded picture's bytes stand and when it is shown.

Opening a file through libavformat decodes its first picture and reads every packet on the way; for clips of
ten seconds that costs as much as a fifth of decoding. The table alone says where the wanted bytes are. Only
plain files are taken (ISO/IEC 14496-12: one H.264 track, no fragments, no edits that cut); `read_table` gives
None for every other file and leaves it to the libraries.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arvideo_dist.data.boxes import Edit, boxes, edit_list, ticks_a_second


class SampleTable(NamedTuple):
    """The pictures of the file's video track, in decoding order (N of them)."""

    offsets: NDArray[np.int64]  # [N] first byte in the file
    sizes: NDArray[np.int64]  # [N]
    shown: NDArray[np.int64]  # [N] number of the picture in display order
    keys: NDArray[np.int64]  # decoding numbers of the pictures at which decoding can start
    header: bytes  # avcC: the decoder's configuration


def read_table(video: bytes) -> SampleTable | None:
    """The table of the file `video`; None if the file is of another kind or damaged."""
    try:
        return _read_table(memoryview(video))
    except (KeyError, IndexError, ValueError, ZeroDivisionError, struct.error):
        return None


def _read_table(video: memoryview) -> SampleTable | None:
    movie = dict(boxes(dict(boxes(video))[b"moov"]))
    tracks = [body for kind, body in boxes(dict(boxes(video))[b"moov"]) if kind == b"trak"]
    if len(tracks) != 1 or b"mvex" in movie:  # another track, or fragments
        return None
    track = dict(boxes(tracks[0]))
    media = dict(boxes(track[b"mdia"]))
    table = dict(boxes(dict(boxes(media[b"minf"]))[b"stbl"]))
    description = table[b"stsd"]
    if description[4:8] != b"\0\0\0\1" or description[12:16] != b"avc1":
        return None
    # 16 bytes into the box, a visual sample entry has 78 bytes of fixed fields, then boxes.
    header = dict(boxes(description[16 + 78 : 8 + int.from_bytes(description[8:12], "big")]))[b"avcC"]

    sizes = _sizes(table[b"stsz"], len(video))
    offsets = _offsets(table, sizes)
    decoded = _run_lengths(table[b"stts"], len(sizes)).cumsum()
    decoded = np.concatenate([[0], decoded[:-1]])
    shown_at = decoded + (_run_lengths(table[b"ctts"], len(sizes)) if b"ctts" in table else 0)
    order = np.argsort(shown_at, kind="stable")
    if len(np.unique(shown_at)) != len(sizes) or (offsets + sizes).max() > len(video):
        return None
    if b"edts" in track:
        ticks = Fraction(ticks_a_second(media[b"mdhd"]), ticks_a_second(movie[b"mvhd"]))
        if not _shows_everything(edit_list(dict(boxes(track[b"edts"]))[b"elst"]), shown_at, ticks):
            return None
    shown = np.empty(len(sizes), dtype=np.int64)
    shown[order] = np.arange(len(sizes))
    keys = np.frombuffer(table[b"stss"], ">u4", offset=8).astype(np.int64) - 1
    if not len(keys) or keys[0] != 0:
        return None
    return SampleTable(offsets, sizes, shown, keys, bytes(header))


# Counts are compared before arrays of that length are made: a flipped bit in one must not ask for all memory.


def _sizes(box: memoryview, file_bytes: int) -> NDArray[np.int64]:
    same, count = struct.unpack_from(">II", box, 4)
    if same:
        if same * count > file_bytes:
            raise ValueError("more samples than bytes")
        return np.full(count, same, dtype=np.int64)
    return np.frombuffer(box, ">u4", count, offset=12).astype(np.int64)


def _offsets(table: dict[bytes, memoryview], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """First byte of each sample: samples lie one after the other in chunks."""
    if b"stco" in table:
        chunks = np.frombuffer(table[b"stco"], ">u4", offset=8).astype(np.int64)
    else:
        chunks = np.frombuffer(table[b"co64"], ">u8", offset=8).astype(np.int64)
    runs = np.frombuffer(table[b"stsc"], ">u4", offset=8).reshape(-1, 3).astype(np.int64)
    lengths = np.diff(np.append(runs[:, 0] - 1, len(chunks)))
    if (runs[:, 1] * lengths).sum() != len(sizes):
        raise ValueError("chunks and samples disagree")
    chunk_of_sample = np.repeat(np.arange(len(chunks)), np.repeat(runs[:, 1], lengths))
    before = np.cumsum(sizes) - sizes
    first = np.searchsorted(chunk_of_sample, np.arange(len(chunks)))
    return chunks[chunk_of_sample] + before - before[first][chunk_of_sample]


def _run_lengths(box: memoryview, samples: int) -> NDArray[np.int64]:
    """Values of a table of (count, value), one a sample: durations (stts), display offsets (ctts)."""
    signed = ">i4" if box[0] == 1 else ">u4"
    counts = np.frombuffer(box, ">u4", offset=8)[0::2]
    values = np.frombuffer(box, signed, offset=8)[1::2].astype(np.int64)
    if counts.sum(dtype=np.int64) != samples:
        raise ValueError("times and samples disagree")
    return np.repeat(values, counts)


def _shows_everything(edits: list[Edit], shown_at: NDArray[Any], ticks: Fraction) -> bool:
    """Whether the edit list only takes back the reordering delay, as muxers write it for B-pictures.

    `ticks` of the track's clock are one of the movie's.
    """
    if len(edits) != 1 or edits[0].rate != 1 or edits[0].start != shown_at.min():
        return False
    return bool(edits[0].start + edits[0].duration * ticks > int(shown_at.max()))
