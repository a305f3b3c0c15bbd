"""From the bytes of one video file to the wanted frames, at the least CPU time.

Shards of data_prep hold H.264 files in which most pictures are B-pictures that nothing refers to. Of such a
file only the packets that the wanted frames need are decoded (through PyAV). Any other file is decoded as a
whole, through decord, or through PyAV if an edit list may hide frames. If several ways apply they give
identical frames.

`indices` are frame numbers in display order, sorted and unique. Frames come back in that order, as views of
the decoder's memory: copy what is to be kept.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import av
import decord
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from arvideo_dist.data.boxes import has_edits
from arvideo_dist.data.mp4 import read_table

_SLICE_IDR = 5  # H.264 NAL unit types 1 to 5 are slices
_KEPT_CONTEXTS = 16  # of some 4 MB
# Decoders by their configuration: files of one size and encoding share it, and with it the decoder's buffers.
_contexts: OrderedDict[bytes, av.VideoCodecContext] = OrderedDict()
_reformatter = VideoReformatter()  # keeps its scaler between frames; a fresh one costs more than converting


class BadSample(Exception):  # noqa: N818  # a finding about the data, not a fault of the program
    """One sample cannot be used; the message is the reason that the bad-sample record shows."""


class Planes(NamedTuple):
    """One picture as the decoder has it, YUV 4:2:0: luma [H, W], chroma [ceil(H/2), ceil(W/2)], uint8."""

    y: NDArray[np.uint8]
    u: NDArray[np.uint8]
    v: NDArray[np.uint8]


def decode_rgb(video: bytes, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Frames `indices` of the file `video` as RGB uint8 [H, W, 3]. Raises BadSample."""
    with _reasons():
        selection = select_packets(video, indices)
        if selection is None and has_edits(video):  # decord counts the frames that they hide
            return [_rgb(frame) for frame in _decode_all(video, indices)]
        if selection is None:
            with _opened(video):  # decord leaks memory for each file that it cannot open
                pass
            return decode_with_decord(video, indices)
        return [_rgb(frame) for frame in _decode(selection, indices)]


def decode_planes(video: bytes, indices: NDArray[np.int64]) -> list[Planes]:
    """Frames `indices` of the file `video` as planes, without colour conversion. Raises BadSample."""
    with _reasons():
        selection = select_packets(video, indices)
        frames = _decode_all(video, indices) if selection is None else _decode(selection, indices)
        return [_planes(frame) for frame in frames]


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever a decoder raises is the file's fault: many types, UnicodeDecodeError among them."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise BadSample(f"decode: {type(error).__name__}: {reason[0] if reason else ''}") from error


class Selection(NamedTuple):
    """The packets that some frames need, in decoding order; each one's time stamp is its frame's number."""

    header: bytes  # avcC
    packets: list[av.Packet]


def select_packets(video: bytes, indices: NDArray[np.int64]) -> Selection | None:
    """The packets that frames `indices` need; BadSample if the file has fewer frames.

    None if the file is not of the kind: H.264 in plain mp4 with closed groups of pictures. Such groups are
    independent, and frame numbers run through them one group after the other in decoding and in display order
    alike, so only the groups that hold a wanted frame are looked at.
    """
    table = read_table(video)
    if table is None:
        return None
    _check_range(indices, len(table.sizes))
    ends = np.append(table.keys[1:], len(table.sizes))
    length_bytes = (table.header[4] & 3) + 1
    needed: list[av.Packet] = []
    for group in np.unique(np.searchsorted(table.keys, indices, side="right") - 1).tolist():
        first, end = int(table.keys[group]), int(ends[group])
        shown = table.shown[first:end]
        if shown.min() != first or shown.max() != end - 1:
            return None
        wanted = np.isin(shown, indices)
        end = first + int(np.flatnonzero(wanted)[-1]) + 1  # nothing after the last wanted one
        if (
            _first_slice(video, int(table.offsets[first]), int(table.sizes[first]), length_bytes)[0]
            != _SLICE_IDR
        ):
            return None
        for number, is_wanted, offset, size in zip(
            shown[: end - first].tolist(),
            wanted[: end - first].tolist(),
            table.offsets[first:end].tolist(),
            table.sizes[first:end].tolist(),
            strict=True,
        ):
            if is_wanted or _first_slice(video, offset, size, length_bytes)[1]:
                packet = av.Packet(video[offset : offset + size])
                packet.pts = number
                needed.append(packet)
    return Selection(table.header, needed)


def _first_slice(video: bytes, at: int, size: int, length_bytes: int) -> tuple[int, int]:
    """NAL unit type and nal_ref_idc of the first slice of the picture at `at`; 0: nothing refers to it."""
    end = at + size
    while at + length_bytes < end:
        kind = video[at + length_bytes]
        if 1 <= kind & 31 <= 5:
            return kind & 31, kind >> 5 & 3
        at += length_bytes + int.from_bytes(video[at : at + length_bytes], "big")
    raise BadSample("decode: a packet without a picture")


def _decode(selection: Selection, indices: NDArray[np.int64]) -> list[av.VideoFrame]:
    context = _contexts.pop(selection.header, None)
    if context is None:
        context = av.CodecContext.create("h264", "r")
        context.extradata = selection.header
        context.thread_count = 1  # the loader's processes are the parallelism
    frames: dict[int, av.VideoFrame | None] = dict.fromkeys(indices.tolist())
    for packet in [*selection.packets, None]:  # None: what the decoder holds back
        for frame in context.decode(packet):
            if frame.pts in frames:
                frames[frame.pts] = frame
    context.flush_buffers()
    _contexts[selection.header] = context  # now the newest; one that raised does not come back
    if len(_contexts) > _KEPT_CONTEXTS:
        _contexts.popitem(last=False)
    return _complete(list(frames.values()))


@contextmanager
def _opened(video: bytes) -> Iterator[av.container.InputContainer]:
    with av.open(io.BytesIO(video), mode="r") as container:
        if not container.streams.video:
            raise BadSample("decode: no video stream")
        yield container


def _decode_all(video: bytes, indices: NDArray[np.int64]) -> list[av.VideoFrame]:
    """Through libavformat, every picture up to the last one wanted."""
    with _opened(video) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(indices.tolist())
        frames: list[av.VideoFrame | None] = []
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames.append(frame)
                if len(frames) == len(wanted):
                    return _complete(frames)
    raise BadSample(f"decode: {len(wanted) - len(frames)} of {len(wanted)} frames are missing")


def _complete(frames: list[av.VideoFrame | None]) -> list[av.VideoFrame]:
    found = [frame for frame in frames if frame is not None]
    if len(found) != len(frames):
        raise BadSample(f"decode: {len(frames) - len(found)} of {len(frames)} frames are missing")
    if any(frame.is_corrupt for frame in found):
        raise BadSample("decode: corrupt frames")
    return found


def decode_with_decord(video: bytes, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """As `decode_rgb`, through decord whatever the file is; raises decord's own errors."""
    reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
    _check_range(indices, len(reader))
    frames = reader.get_batch(indices).asnumpy()
    # While the reader lives its threads go on decoding ahead, and compete with the next sample.
    del reader
    return list(frames)


def _check_range(indices: NDArray[np.int64], frames: int) -> None:
    if int(indices[-1]) >= frames:
        raise BadSample(f"frame {indices[-1]} was asked for, the file has {frames}")


def _rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    (plane,) = _reformatter.reformat(frame, format="rgb24").planes
    return _view(plane, frame.width, frame.height, 3)


def _planes(frame: av.VideoFrame) -> Planes:
    if frame.format.name != "yuv420p":
        frame = _reformatter.reformat(frame, format="yuv420p")
    width, height = frame.width, frame.height
    half_w, half_h = (width + 1) // 2, (height + 1) // 2
    y, u, v = frame.planes  # makes all three each time
    return Planes(_view(y, width, height), _view(u, half_w, half_h), _view(v, half_w, half_h))


def _view(plane: av.video.plane.VideoPlane, width: int, height: int, samples: int = 1) -> NDArray[np.uint8]:
    """[height, width] or [height, width, samples] of one plane, without the padding at the lines' ends."""
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
        :height, : width * samples
    ]
    return lines.reshape(height, width, samples) if samples > 1 else lines
