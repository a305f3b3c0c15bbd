"""What a video file really holds: read by PyAV, in a process of its own.

`python -m data_prep.probe` answers one JSON line on stdout for each JSON line on stdin, so that a file that
crashes or floods the demuxer takes that process and nothing else (`data_prep.isolation` restarts it).
Rates come from the packets' times, never from headers: variable-rate files, FLV and Matroska state nonsense
such as 1000 fps.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import IO, Any

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from arvideo_dist.data.boxes import read_edits, read_movie
from data_prep.errors import Rejected
from data_prep.timeline import Timeline, frame_rate, goes_back, timeline

# Containers of video files. Playlists and image sequences are left out on purpose: they name other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,h264,hevc,m4v,mxf,gif,ivf,"
    "rm,dv,nut,vob,wtv,swf,obu,h263"
)
_MIN_SHORT_SIDE = 16  # one macroblock
_MAX_LONG_SIDE = 16384
_PROGRESSIVE = 1  # field order of libavcodec; larger ones are interlaced
_RAW_RATE = 25  # pictures a second of a stream without times that states none, as ffmpeg has it


@dataclass(frozen=True)
class SourceInfo:
    """The video stream of an input file, as it is to be shown."""

    stream: int  # index in the container
    codec: str
    width: int  # pixels as displayed: rotation and sample aspect ratio applied
    height: int
    pixel_format: str
    full_range: bool
    matrix: int  # matrix coefficients, primaries and transfer characteristics: numbers of ITU-T H.273
    primaries: int
    transfer: int
    rotation: int  # degrees, anticlockwise, by which the stored picture is to be turned
    transform: list[int]  # a, b, c, d of the display matrix; empty if the stored picture is upright
    square_pixels: bool
    cropped: bool  # an mp4 asks for a part of the stored pictures (clean aperture)
    interlaced: bool  # the first picture, or the stream as a whole, is flagged so
    container: str
    timed: bool  # not a raw stream, whose pictures have no times
    joins: int  # places where streams were joined, which the demuxer takes for a loss
    key_interval: int  # pictures from one key picture to the next, at most
    references: int  # pictures that others may refer to; all of them if the codec is not H.264 in mp4
    discarded: int  # pictures in the file that an edit list hides
    constant_rate: bool
    fps_num: int  # the rate that the packets' times show
    fps_den: int
    packets: int
    start: float  # seconds: time of the first picture in the container
    duration: float  # seconds from the first picture to the end of the last, without the cuts
    cuts: list[list[float]]  # seconds from the first picture: holes without pictures that are left out
    max_hold: float | None  # seconds that a picture is held at most; None if that is not needed


@dataclass(frozen=True)
class VideoInfo:
    """A finished mp4, read back."""

    width: int
    height: int
    fps: float
    frames: int
    duration: float  # seconds
    codec: str
    pixel_format: str


def _open(path: str, options: dict[str, str] | None = None) -> InputContainer:
    try:
        path.encode()
        file: str | IO[bytes] = f"file:{path}"
    except UnicodeEncodeError:  # a name that is no UTF-8: PyAV cannot pass it on
        file = open(path, "rb")  # noqa: SIM115  (the container reads from it while it lives)
    try:
        return av.open(
            file,
            mode="r",
            metadata_errors="replace",
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"} | (options or {}),
        )
    except (av.FFmpegError, ValueError, IndexError, UnicodeError) as error:
        raise Rejected(f"not a video: {_text(error)}") from error


def _text(error: BaseException) -> str:
    """The library's words without the path and the error number around them."""
    strerror = getattr(error, "strerror", None)
    return str(strerror or error or type(error).__name__)


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams:
        raise Rejected("not a video: it holds no streams")
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        kinds = ", ".join(sorted({s.type for s in container.streams}))
        raise Rejected(f"no video stream: streams found: {kinds}")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise Rejected("no video stream: only a cover picture")
    return stream


@dataclass
class _Scan:
    """What the packets of a file say."""

    # Seconds of the shown pictures, a list for each part with a clock of its own; none in a raw stream.
    parts: list[list[Fraction]] = field(default_factory=lambda: [[]])
    pictures: int = 0  # that are shown
    packets: int = 0
    last: Fraction = Fraction(0)  # end of whatever stream lasts longest
    references: int = 0
    key_interval: int = 0
    joins: int = 0

    @property
    def is_timed(self) -> bool:
        return any(self.parts)


def slice_is_reference(packet: av.Packet) -> bool:
    """Whether other pictures may refer to this H.264 picture: `nal_ref_idc` of its first slice.

    The packet is as mp4 stores it, NAL units behind lengths of 4 bytes.
    """
    data = memoryview(packet)
    place = 0
    while place + 4 < len(data):
        if data[place + 4] & 31 in (1, 5):
            return data[place + 4] & 0x60 != 0
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return True


def _scan(container: InputContainer, stream: VideoStream) -> _Scan:
    scan = _Scan()
    extradata = stream.codec_context.extradata or b""
    sliced = stream.codec_context.name == "h264" and extradata[:1] == b"\x01" and extradata[4] & 3 == 3
    since_key = 0
    decoded: Fraction | None = None
    since_corrupt = 2
    try:
        for packet in container.demux():
            if packet.dts is None and packet.pts is None and not packet.size:
                continue  # PyAV's flush packets
            base = packet.time_base or Fraction(0)
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                scan.last = max(scan.last, (time + (packet.duration or 0)) * base)
            if packet.stream_index != stream.index:
                continue
            scan.packets += 1
            since_key = 1 if packet.is_keyframe else since_key + 1
            scan.key_interval = max(scan.key_interval, since_key)
            scan.references += not sliced or slice_is_reference(packet)
            before, decoded = decoded, None if packet.dts is None else packet.dts * base
            if goes_back(before, decoded):
                scan.parts.append([])
                # The demuxer takes the next stream's count of packets for a loss in what it reads just then: the
                # last picture, or the one before if a parser looks ahead.
                scan.joins += since_corrupt < 2
            since_corrupt = 0 if packet.is_corrupt else since_corrupt + 1
            if packet.size and not packet.is_discard:
                scan.pictures += 1
                if time is not None:
                    scan.parts[-1].append(time * base)
    except av.FFmpegError as error:
        raise Rejected(f"damaged: reading stops after {scan.packets} pictures: {_text(error)}") from error
    return scan


def _read_through(path: str) -> tuple[_Scan, Timeline, bytes]:
    """All packets of the file `path`, when its pictures are shown, and the movie box of an mp4."""
    with _open(path) as container:
        stream = _video_stream(container)
        stream.thread_type = "NONE"
        scan = _scan(container, stream)
        stated_frames = stream.frames if "mov" in container.format.name else 0
        track, raw_rate = stream.id, stream.codec_context.framerate or Fraction(_RAW_RATE)
        declared = Fraction(container.duration or 0, av.time_base)
    movie = _check_edits(path, track, scan.packets, stated_frames) if stated_frames else b""
    if scan.is_timed and declared - scan.last > max(Fraction(1), declared / 10):
        raise Rejected(f"truncated: {float(scan.last):.1f} of {float(declared):.1f} seconds are in the file")
    if not scan.pictures:
        edited = f": its edit list shows none of {scan.packets}" if scan.packets else ""
        raise Rejected(f"no video stream: it holds no pictures{edited}")
    parts = scan.parts if scan.is_timed else [[number / raw_rate for number in range(scan.pictures)]]
    return scan, timeline(parts), movie


def probe_source(path: str) -> SourceInfo:
    """Read the input file `path` whole (packets only, one picture decoded).

    Raises Rejected if it holds no video, is cut off, or nothing in it decodes.
    """
    scan, shown, movie = _read_through(path)
    with _open(path) as container:  # again from the start: not every container can seek back
        stream = _video_stream(container)
        try:
            frame = next(_frames(container, stream), None)
        except (av.FFmpegError, IndexError, UnicodeError) as error:
            raise Rejected(f"cannot be decoded ({stream.codec_context.name}): {_text(error)}") from error
        if frame is None:
            raise Rejected(f"cannot be decoded ({stream.codec_context.name}): no picture comes out")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        transform = _transform(frame)
        angle = rotation(transform) if transform else 0
        width, height = max(1, round(frame.width * aspect)), frame.height
        if angle % 180 == 90:
            width, height = height, width
        if min(width, height) < _MIN_SHORT_SIDE or max(width, height) > _MAX_LONG_SIDE:
            raise Rejected(
                f"size: {width}x{height}; the sides must be in {_MIN_SHORT_SIDE} to {_MAX_LONG_SIDE}"
            )
        return SourceInfo(
            stream=stream.index,
            codec=stream.codec_context.name,
            width=width,
            height=height,
            pixel_format=frame.format.name,
            full_range=int(frame.color_range) == 2 or frame.format.name.startswith("yuvj"),
            matrix=int(frame.colorspace),
            primaries=int(frame.color_primaries),
            transfer=int(frame.color_trc),
            rotation=angle,
            transform=transform,
            square_pixels=aspect == 1,
            cropped=b"clap" in movie,
            interlaced=bool(frame.interlaced_frame) or int(stream.codec_context.field_order) > _PROGRESSIVE,
            container=container.format.name,
            timed=scan.is_timed,
            joins=scan.joins,
            key_interval=scan.key_interval,
            references=scan.references,
            discarded=scan.packets - scan.pictures,
            constant_rate=shown.constant,
            fps_num=shown.rate.numerator,
            fps_den=shown.rate.denominator,
            packets=scan.pictures,
            start=float(shown.start),
            duration=float(shown.duration),
            cuts=[[float(begin), float(end)] for begin, end in shown.cuts],
            max_hold=None if shown.max_hold is None else float(shown.max_hold),
        )


def _check_edits(path: str, track: int, packets: int, stated: int) -> bytes:
    """The movie box of the mp4 `path`. Raises Rejected if fewer pictures than the `stated` are in the file, or
    its edit list asks for more than to begin later, to leave out pictures or to show some again: players do not
    agree about the rest.
    """
    if packets != stated:  # which may be the edit list's doing
        with _open(path, {"ignore_editlist": "1"}) as container:
            packets = _scan(container, _video_stream(container)).packets
        if packets < stated:
            raise Rejected(f"truncated: {packets} of {stated} pictures are in the file")
    with open(path, "rb") as file:
        movie = read_movie(file)
    try:
        edits = [edit for edit in read_edits(memoryview(movie), track) if edit.duration]
    except (KeyError, IndexError, ValueError, struct.error):
        return movie
    for number, edit in enumerate(edits):
        if edit.start == -1 and number:
            raise Rejected(
                "edit list: it shows nothing for a while between pictures; players disagree on that"
            )
        if edit.start != -1 and edit.rate != 1:
            raise Rejected(f"edit list: it plays at {edit.rate:g} times the rate; players disagree on that")
    return movie


def _transform(frame: av.VideoFrame) -> list[int]:
    """a, b, c, d of the picture's display matrix; empty if there is none or it changes nothing."""
    sides: Any = frame.side_data  # a mapping by its type, a sequence when it is gone through
    data = next((data for data in sides if data.type == Type.DISPLAYMATRIX), None)
    if data is not None:
        a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
        return [] if rotation([a, b, c, d]) == 0 and d >= 0 else [a, b, c, d]
    return []


def rotation(transform: list[int]) -> int:
    """Degrees, anticlockwise, by which a display matrix (its four numbers that turn) turns a picture."""
    a, b, c, d = transform
    first, second = math.hypot(a, c), math.hypot(b, d)
    if not first or not second:
        return 0
    return round(-math.degrees(math.atan2(b / second, a / first)))


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Pictures of `stream`; packets that the decoder refuses before the first picture are passed over."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def probe_video(path: str) -> VideoInfo:
    """Read back the finished mp4 `path`: constant rate, every packet a picture. Raises Rejected if not."""
    with _open(path) as container:
        stream = _video_stream(container)
        scan = _scan(container, stream)
        packets = scan.packets
        rate, constant = frame_rate(sorted(scan.parts[0]))
        if not packets or len(scan.parts[0]) != packets or not constant:
            raise Rejected(f"encoder output is not of constant rate: {scan.pictures} of {packets} pictures")
        return VideoInfo(
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(stream.average_rate if stream.average_rate and packets > 1 else rate),
            frames=packets,
            duration=packets / float(stream.average_rate or rate),
            codec=stream.codec_context.name,
            pixel_format=str(stream.codec_context.pix_fmt),
        )


def main() -> None:
    """Answer requests `{"what": "source"|"video", "path": ...}` until stdin ends."""
    av.logging.set_level(av.logging.PANIC)
    answer_with: dict[str, Any] = {"source": probe_source, "video": probe_video}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"info": asdict(answer_with[request["what"]](request["path"]))}
        except Rejected as rejected:
            answer = {"rejected": str(rejected)}
        except MemoryError:
            answer = {"rejected": "memory: reading the file takes more than the limit"}
        except Exception as error:  # a hostile file finds every hole in a parser; it may cost itself only
            answer = {"rejected": f"cannot be read: {type(error).__name__}: {_text(error)}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
