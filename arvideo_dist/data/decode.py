"""From the bytes of one video file to the wanted frames, at the least CPU time.

Shards of data_prep hold H.264 files in which most pictures are B-pictures that nothing refers to. Of such a
file only the packets that the wanted frames need are decoded (through PyAV). Any other file goes through
decord as a whole. Where both ways apply they give identical frames.

`indices` are frame numbers in display order, sorted and unique. Frames come back in that order, as views of
the decoder's memory: copy what is to be kept.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import av
import decord
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

_SLICE_IDR = 5  # H.264 NAL unit types 1 to 5 are slices
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
        with _opened(video) as (container, stream):
            packets = _select_packets(container, stream, indices)
            if packets is not None:
                return [_rgb(frame) for frame in _decode(stream, *packets)]
        return decode_with_decord(video, indices)


def decode_planes(video: bytes, indices: NDArray[np.int64]) -> list[Planes]:
    """Frames `indices` of the file `video` as planes, without colour conversion. Raises BadSample."""
    with _reasons(), _opened(video) as (container, stream):
        packets = _select_packets(container, stream, indices) or _all_packets(container, stream, indices)
        return [_planes(frame) for frame in _decode(stream, *packets)]


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


@contextmanager
def _opened(video: bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with av.open(io.BytesIO(video), mode="r") as container:
        if not container.streams.video:
            raise BadSample("decode: no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader's processes are the parallelism
        yield container, stream


def _select_packets(
    container: av.container.InputContainer, stream: av.VideoStream, indices: NDArray[np.int64]
) -> tuple[list[av.Packet], list[int]] | None:
    """The packets that the wanted frames need, in decoding order, and the frames' time stamps.

    None where the file is not of the kind: H.264 in mp4 with closed groups of pictures and with droppable
    pictures. Closed groups are independent, and frame numbers run through them one group after the other in
    decoding and in display order alike, so the container's index tells where frame i is.
    """
    header = stream.codec_context.extradata
    if stream.codec_context.name != "h264" or not header or header[0] != 1 or stream.start_time is None:
        return None
    entries = stream.index_entries
    keys = np.array([i for i, entry in enumerate(entries) if entry.is_keyframe] + [len(entries)])
    _check_range(indices, len(entries))
    groups = np.searchsorted(keys, indices[[0, -1]], side="right") - 1
    first, last = int(keys[groups[0]]), int(keys[groups[1] + 1])
    # Seeking goes by display time; the index holds decoding times, earlier by the reordering delay.
    container.seek(entries[first].timestamp - entries[0].timestamp + stream.start_time, stream=stream)
    packets: list[av.Packet] = []
    for packet in container.demux(stream):
        if packets or packet.dts == entries[first].timestamp:
            packets.append(packet)
            if len(packets) == last - first:
                break
    if len(packets) != last - first or any(packet.pts is None or not packet.size for packet in packets):
        return None
    slices = [_first_slice(memoryview(packet), (header[4] & 3) + 1) for packet in packets]
    starts = set((keys[groups[0] : groups[1] + 1] - first).tolist())
    droppable = [ref_idc == 0 for _, ref_idc in slices]
    if any(slices[i][0] != _SLICE_IDR for i in starts) or not any(droppable):
        return None
    shown = np.argsort([packet.pts or 0 for packet in packets]).tolist()
    wanted = {shown[index - first] for index in indices.tolist()}
    needed, ahead = [], False
    for i in reversed(range(len(packets))):  # of each group: nothing after its last wanted packet
        ahead = ahead or i in wanted
        if i in wanted or (ahead and not droppable[i]):
            needed.append(packets[i])
        ahead = ahead and i not in starts
    return needed[::-1], [packets[shown[index - first]].pts or 0 for index in indices.tolist()]


def _first_slice(data: memoryview, length_bytes: int) -> tuple[int, int]:
    """NAL unit type and nal_ref_idc of a picture's first slice; nal_ref_idc 0: nothing refers to it."""
    at = 0
    while at + length_bytes < len(data):
        kind = data[at + length_bytes]
        if 1 <= kind & 31 <= 5:
            return kind & 31, kind >> 5 & 3
        at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
    raise BadSample("decode: a packet without a picture")


def _all_packets(
    container: av.container.InputContainer, stream: av.VideoStream, indices: NDArray[np.int64]
) -> tuple[list[av.Packet], list[int]]:
    container.seek(0)
    packets = [packet for packet in container.demux(stream) if packet.size]
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    _check_range(indices, len(times))
    return packets, [times[index] for index in indices.tolist()]


def _decode(stream: av.VideoStream, packets: list[av.Packet], times: list[int]) -> list[av.VideoFrame]:
    """The frames with time stamps `times`, from decoding `packets`."""
    frames: dict[int, av.VideoFrame | None] = dict.fromkeys(times)
    context = stream.codec_context
    for packet in [*packets, None]:  # None: what the decoder holds back
        for frame in context.decode(packet):
            if frame.pts in frames:
                frames[frame.pts] = frame
    found = [frame for frame in frames.values() if frame is not None]
    if len(found) != len(times):
        raise BadSample(f"decode: {len(times) - len(found)} of {len(times)} frames are missing")
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
    return _view(_reformatter.reformat(frame, format="rgb24"), 0, frame.width, frame.height, 3)


def _planes(frame: av.VideoFrame) -> Planes:
    if frame.format.name != "yuv420p":
        frame = _reformatter.reformat(frame, format="yuv420p")
    half_w, half_h = (frame.width + 1) // 2, (frame.height + 1) // 2
    return Planes(
        _view(frame, 0, frame.width, frame.height),
        _view(frame, 1, half_w, half_h),
        _view(frame, 2, half_w, half_h),
    )


def _view(frame: av.VideoFrame, plane: int, width: int, height: int, samples: int = 1) -> NDArray[np.uint8]:
    """[height, width] or [height, width, samples] of one plane, without the padding at the lines' ends."""
    data = frame.planes[plane]
    lines = np.frombuffer(memoryview(data), np.uint8).reshape(-1, data.line_size)[:height, : width * samples]
    return lines.reshape(height, width, samples) if samples > 1 else lines
