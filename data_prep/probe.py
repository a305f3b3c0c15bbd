"""What a video file really holds: read by PyAV, in a process of its own.

`python -m data_prep.probe` answers one JSON line on stdout for each JSON line on stdin, so that a file that
crashes or floods the demuxer takes that process and nothing else (`data_prep.isolation` restarts it).
Rates come from the packets' times, never from headers: variable-rate files, FLV and Matroska state nonsense
such as 1000 fps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import IO, Any

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from data_prep.errors import Rejected

# Containers of video files. Playlists and image sequences are left out on purpose: they name other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,h264,hevc,m4v,mxf,gif,ivf,"
    "rm,dv,nut,vob,wtv,swf,obu,h263"
)
_STANDARD_RATES = [Fraction(n) for n in range(1, 241)] + [Fraction(n * 1000, 1001) for n in (24, 30, 60, 120)]
_MIN_SHORT_SIDE = 16  # one macroblock
_MAX_LONG_SIDE = 16384
_PQ, _HLG = 16, 18  # transfer characteristics of ITU-T H.273 that mean HDR


@dataclass(frozen=True)
class SourceInfo:
    """The video stream of an input file, as it is to be shown."""

    stream: int  # index in the container
    codec: str
    width: int  # pixels as displayed: rotation and sample aspect ratio applied
    height: int
    pixel_format: str
    full_range: bool
    hdr: bool
    rotation: int  # degrees; 0 where the stored picture is upright
    square_pixels: bool
    standard_colour: bool  # BT.601 matrix, stated or assumed for want of a statement, limited range
    container: str
    key_interval: int  # pictures from one key picture to the next, at most
    references: int  # pictures that others may refer to; all of them where the codec is not H.264 in mp4
    discarded: int  # pictures in the file that an edit list hides
    constant_rate: bool
    fps_num: int  # the rate that the packets' times show
    fps_den: int
    packets: int
    start: float  # seconds: time of the first picture in the container
    duration: float  # seconds from the first picture to the end of the last


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


def _open(path: str) -> InputContainer:
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
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
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


def frame_rate(times: list[Fraction]) -> tuple[Fraction, bool]:
    """The rate of pictures shown at `times` (seconds, ascending) and whether it is constant.

    Constant: no interval strays from the mean by more than a quarter of it (Matroska and FLV round times to
    1 ms). Then the mean is the rate, else the median interval's. Rates within 0.1 % (constant) or 1 %
    (variable) of a standard rate become that rate.
    """
    gaps = [b - a for a, b in pairwise(times) if b > a]
    if not gaps:
        return Fraction(1), True
    mean = sum(gaps, Fraction(0)) / len(gaps)
    constant = all(abs(gap - mean) <= mean / 4 for gap in gaps)
    rate: Fraction = 1 / mean if constant else 1 / sorted(gaps)[len(gaps) // 2]
    tolerance = Fraction(1, 1000) if constant else Fraction(1, 100)
    nearest = min(_STANDARD_RATES, key=lambda standard: float(abs(standard - rate)))
    if abs(nearest - rate) <= tolerance * rate:
        return nearest, constant
    return rate.limit_denominator(1001), constant


@dataclass
class _Scan:
    """What the packets of a file say."""

    times: list[Fraction] = field(default_factory=list)  # seconds of the shown pictures, ascending
    packets: int = 0
    last: Fraction = Fraction(0)  # end of whatever stream lasts longest
    references: int = 0
    key_interval: int = 0


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
    try:
        for packet in container.demux():
            if packet.dts is None and packet.pts is None and not packet.size:
                continue  # PyAV's flush packets
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None and packet.time_base is not None:
                scan.last = max(scan.last, (time + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index != stream.index:
                continue
            scan.packets += 1
            since_key = 1 if packet.is_keyframe else since_key + 1
            scan.key_interval = max(scan.key_interval, since_key)
            scan.references += not sliced or slice_is_reference(packet)
            if packet.size and not packet.is_discard and time is not None and packet.time_base is not None:
                scan.times.append(time * packet.time_base)
    except av.FFmpegError as error:
        raise Rejected(f"damaged: reading stops after {scan.packets} pictures: {_text(error)}") from error
    scan.times.sort()
    return scan


def probe_source(path: str) -> SourceInfo:
    """Read the input file `path` whole (packets only, one picture decoded).

    Raises Rejected where it holds no video, is cut off, or nothing in it decodes.
    """
    with _open(path) as container:
        stream = _video_stream(container)
        stream.thread_type = "NONE"
        scan = _scan(container, stream)
        times, last = scan.times, scan.last
        declared = Fraction(container.duration or 0, av.time_base)
        if stream.frames and "mov" in container.format.name and scan.packets < stream.frames:
            raise Rejected(f"truncated: {scan.packets} of {stream.frames} pictures are in the file")
        if declared - last > max(Fraction(1), declared / 10):
            raise Rejected(f"truncated: {float(last):.1f} of {float(declared):.1f} seconds are in the file")
        if not times:
            raise Rejected("no video stream: it holds no pictures")
    with _open(path) as container:  # again from the start: not every container can seek back
        stream = _video_stream(container)
        try:
            frame = next(_frames(container, stream), None)
        except (av.FFmpegError, IndexError, UnicodeError) as error:
            raise Rejected(f"cannot be decoded ({stream.codec_context.name}): {_text(error)}") from error
        if frame is None:
            raise Rejected(f"cannot be decoded ({stream.codec_context.name}): no picture comes out")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        rotation = round(frame.rotation)
        width, height = max(1, round(frame.width * aspect)), frame.height
        if rotation % 180:
            width, height = height, width
        if min(width, height) < _MIN_SHORT_SIDE or max(width, height) > _MAX_LONG_SIDE:
            raise Rejected(
                f"size: {width}x{height}; the sides must be in {_MIN_SHORT_SIDE} to {_MAX_LONG_SIDE}"
            )
        rate, constant = frame_rate(times)
        return SourceInfo(
            stream=stream.index,
            codec=stream.codec_context.name,
            width=width,
            height=height,
            pixel_format=frame.format.name,
            full_range=int(frame.color_range) == 2 or frame.format.name.startswith("yuvj"),
            hdr=int(frame.color_trc) in (_PQ, _HLG),
            rotation=rotation,
            square_pixels=aspect == 1,
            standard_colour=int(frame.colorspace) in (2, 5, 6),
            container=container.format.name,
            key_interval=scan.key_interval,
            references=scan.references,
            discarded=scan.packets - len(times),
            constant_rate=constant,
            fps_num=rate.numerator,
            fps_den=rate.denominator,
            packets=len(times),
            start=float(times[0]),
            duration=float(times[-1] - times[0] + 1 / rate),
        )


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
        times, packets = scan.times, scan.packets
        rate, constant = frame_rate(times)
        if not times or len(times) != packets or not constant:
            raise Rejected(f"encoder output is not of constant rate: {len(times)} of {packets} pictures")
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
