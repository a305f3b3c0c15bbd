"""Source videos for the tests, made by the same ffmpeg binary, and independent readers of written ones."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from data_prep.transcode import ffmpeg


def make(path: Path, *arguments: str, source: str = "testsrc2=s=160x120:r=25:d=0.6") -> Path:
    """A short test pattern encoded as `arguments` say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [ffmpeg()[0], "-v", "error", "-y", "-f", "lavfi", "-i", source, *arguments, f"file:{path}"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    return path


def mux(path: Path, *arguments: str) -> Path:
    """Run ffmpeg with `arguments`, writing `path`."""
    command = [ffmpeg()[0], "-v", "error", "-y", *arguments, f"file:{path}"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    return path


def frames_of(data: bytes | Path) -> list[NDArray[np.uint8]]:
    """RGB pictures of a video as PyAV decodes them."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def reference_flags(data: bytes | Path) -> tuple[list[bool], list[str]]:
    """For each packet in decoding order: does anything refer to it (nal_ref_idc of its first slice); and the
    picture types in the same order."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        flags, times = [], []
        for packet in container.demux(video=0):
            if packet.size:
                flags.append(_slice_ref_idc(bytes(packet)) != 0)
                times.append(packet.pts)
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        types = {frame.pts: PictureType(frame.pict_type).name for frame in container.decode(video=0)}
    return flags, [types[time] for time in times]


def _slice_ref_idc(packet: bytes) -> int:
    """The two bits of the first slice's NAL header in an mp4 packet (4-byte lengths)."""
    place = 0
    while place < len(packet):
        size, header = int.from_bytes(packet[place : place + 4], "big"), packet[place + 4]
        if header & 31 in (1, 5):
            return header >> 5 & 3
        place += 4 + size
    raise AssertionError("a packet without a slice")


def with_edits(source: Path, target: Path, *edits: tuple[float, float | None, float]) -> Path:
    """The mp4 `source`, its media at the end, with another edit list: (seconds shown, second of the media that is
    shown first or None for nothing, rate) each."""
    data = source.read_bytes()
    movie_ticks, media_ticks = (_number(data, name, 12) for name in (b"mvhd", b"mdhd"))
    delay = _number(data, b"elst", 12)  # of reordering, which ffmpeg's own edit takes back
    box = struct.pack(">II", 0, len(edits))
    for seconds, first, rate in edits:
        start = -1 if first is None else round(first * media_ticks) + delay
        box += struct.pack(">Iii", round(seconds * movie_ticks), start, round(rate * 65536))
    target.write_bytes(_replaced(data, b"edts", _box(b"elst", box)))
    return target


def with_clean_aperture(source: Path, target: Path, width: int, height: int) -> Path:
    """The mp4 `source`, its media at the end, that asks for the middle `width` x `height` of its pictures."""
    data = source.read_bytes()
    at = data.index(b"avcC") - 4
    clap = _box(b"clap", struct.pack(">8I", width, 1, height, 1, 0, 1, 0, 1))
    grown = bytearray(data[:at] + clap + data[at:])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = data.index(kind) - 4
        struct.pack_into(">I", grown, place, int.from_bytes(data[place : place + 4], "big") + len(clap))
    target.write_bytes(grown)
    return target


def _number(data: bytes, box: bytes, offset: int) -> int:
    at = data.index(box) + 4 + offset
    return int.from_bytes(data[at : at + 4], "big")


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _replaced(data: bytes, name: bytes, body: bytes) -> bytes:
    """The boxes in `data`, in that of type `name` another body."""
    out, at = b"", 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        inside = data[at + 8 : at + size]
        if kind == name:
            inside = body
        elif kind in (b"moov", b"trak"):
            inside = _replaced(inside, name, body)
        out, at = out + _box(kind, inside), at + size
    return out
