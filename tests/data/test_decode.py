"""Decoding: packet selection, decord and a full decode give the same frames; faults become bad samples."""

from __future__ import annotations

import subprocess
import tracemalloc
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest

from arvideo_dist.data import decode
from arvideo_dist.data.decode import BadSample, decode_planes, decode_rgb
from arvideo_dist.data.mp4 import read_table
from tests.data.conftest import encode

# data_prep's encoding: every 16th picture a reference, the 15 between droppable
X264 = "threads=1:scenecut=0:b-adapt=0:b-pyramid=none:ref=1:pbratio=1.0:open-gop=0"
DROPPABLE = (
    *("-c:v", "libx264", "-crf", "20", "-tune", "fastdecode", "-g", "64", "-keyint_min", "64", "-bf", "15"),
    *("-x264-params", X264, "-movflags", "+faststart"),
)


def full_decode(video: bytes) -> np.ndarray:
    """All frames by decord, the plain way."""
    reader = decode.decord.VideoReader(decode.io.BytesIO(video), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def selected(video: bytes) -> bool:
    """Whether packet selection applies to the file."""
    return decode.select_packets(video, np.array([0])) is not None


@pytest.fixture(scope="module")
def droppable(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """150 frames: two whole groups of pictures and a short one."""
    return encode(tmp_path_factory.mktemp("droppable") / "v.mp4", 150, 3, DROPPABLE)


@pytest.mark.parametrize("stride", range(1, 9))
def test_selected_frames_equal_a_full_decode(droppable: bytes, stride: int) -> None:
    assert selected(droppable)
    everything = full_decode(droppable)
    rng = np.random.default_rng(stride)
    starts = {0, 149 - 15 * stride, *rng.integers(0, 150 - 15 * stride, 3).tolist()}
    for start in starts:
        indices = start + stride * np.arange(16)
        assert np.array_equal(decode_rgb(droppable, indices), everything[indices])


@pytest.mark.parametrize(
    "indices", [[0], [149], [63, 64], [15, 16, 17], [0, 149], [64], [127, 128, 148, 149]]
)
def test_selection_is_exact_at_the_borders_of_groups(droppable: bytes, indices: list[int]) -> None:
    wanted = np.array(indices)
    assert np.array_equal(decode_rgb(droppable, wanted), full_decode(droppable)[wanted])


def test_only_needed_packets_reach_the_decoder(droppable: bytes) -> None:
    wanted = 20 + 4 * np.arange(16)
    selection = decode.select_packets(droppable, wanted)
    assert selection is not None
    packets = selection.packets
    # frames 20..80: of the first group the anchors 0, 16, 32, 48, 62, 63 and 11 - 1 wanted B-pictures, ...
    assert len(packets) < 26
    assert {packet.pts for packet in packets} >= set(wanted.tolist())


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("default", ()),
        ("pyramid", ("-c:v", "libx264", "-bf", "8", "-x264-params", "b-pyramid=normal:scenecut=40")),
        ("open-gop", ("-c:v", "libx264", "-bf", "3", "-g", "12", "-x264-params", "open-gop=1")),
        ("intra", ("-c:v", "libx264", "-g", "1")),
        ("fragmented", ("-c:v", "libx264", "-movflags", "frag_keyframe+empty_moov")),
        ("hevc", ("-c:v", "libx265", "-x265-params", "log-level=none")),
    ],
)
def test_other_encodings_decode_the_same_both_ways(tmp_path: Path, name: str, codec: tuple[str, ...]) -> None:
    video = encode(tmp_path / f"{name}.mp4", 60, 1, codec)
    everything = full_decode(video)
    for indices in (np.arange(0, 60, 4), np.arange(20, 36), np.array([59])):
        assert np.array_equal(decode_rgb(video, indices), everything[indices])
        for planes, picture in zip(decode_planes(video, indices), everything[indices], strict=True):
            assert planes.y.shape == picture.shape[:2]


def test_an_odd_size_keeps_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=81x63:rate=25",
    ]
    subprocess.run(
        [*command, "-vf", "scale=81:63", "-frames:v", "3", "-pix_fmt", "yuv420p", "-c:v", "mpeg4", str(path)],
        check=True,
    )
    (planes,) = decode_planes(path.read_bytes(), np.array([1]))
    assert planes.y.shape == (63, 81)
    assert planes.u.shape == planes.v.shape == (32, 41)


@pytest.mark.parametrize("function", [decode_rgb, decode_planes])
def test_faults_of_a_file_are_bad_samples_with_a_reason(droppable: bytes, function: object) -> None:
    def reason(video: bytes, *indices: int) -> str:
        with pytest.raises(BadSample) as caught:
            function(video, np.array(indices))
        return str(caught.value)

    assert reason(droppable, 0, 150) == "frame 150 was asked for, the file has 150"
    assert reason(b"", 0).startswith("decode: ")
    assert reason(b"garbage" * 1000, 0).startswith("decode: ")
    assert reason(droppable[: len(droppable) // 2], 0, 140)
    zeroed = droppable[:3000] + bytes(len(droppable) - 3000)
    assert reason(zeroed, 10, 100).startswith("decode: ")


@pytest.mark.parametrize(
    ("box", "at", "content"),  # bytes after the box's name: 4 of flags, then numbers of 4 bytes
    [
        (b"stts", 8, b"\x80\0\0\x96"),  # pictures of one duration
        (b"ctts", 8, b"\xff\xff\xff\xff"),
        (b"stsc", 12, b"\xff\xff\xff\xff"),  # samples a chunk
        (b"stsz", 4, b"\0\0\0\x01\xff\xff\xff\xff"),  # size of all, and their number
    ],
)
def test_a_damaged_count_asks_for_no_memory(droppable: bytes, box: bytes, at: int, content: bytes) -> None:
    begin = droppable.index(box) + 4 + at
    damaged = droppable[:begin] + content + droppable[begin + len(content) :]
    assert read_table(droppable) is not None
    tracemalloc.start()
    try:
        assert read_table(damaged) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.shared
def test_every_real_clip_decodes_the_same_by_selection_and_in_full(shared_dir: Path, tmp_path: Path) -> None:
    """Each real clip in data_prep's encoding; random starts, strides 1 to 8, the ends of the file."""
    rng = np.random.default_rng(0)
    compared = taken = 0
    for clip in sorted((shared_dir / "videos" / "clips").iterdir()):
        target = tmp_path / "clip.mp4"
        scale = "scale='if(gt(iw,ih),-2,min(256,iw))':'if(gt(iw,ih),min(256,ih),-2)',format=yuv420p"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(clip), "-an", "-vf"]
        command += [f"setpts=PTS-STARTPTS,fps=25,{scale}"]
        made = subprocess.run([*command, *DROPPABLE, "-preset", "veryfast", str(target)], capture_output=True)
        if made.returncode or clip.name == "decord__corrupted.mp4":
            continue  # what data_prep rejects
        video = target.read_bytes()
        taken += selected(video)
        everything = full_decode(video)
        for stride in range(1, 9):
            last = len(everything) - 1
            for start in {0, int(rng.integers(len(everything))), max(0, last - 15 * stride)}:
                indices = np.unique(np.minimum(start + stride * np.arange(16), last))
                assert np.array_equal(decode_rgb(video, indices), everything[indices]), (
                    clip.name,
                    start,
                    stride,
                )
                compared += 1
    assert taken >= 70
    assert compared > 1500


def test_droppable_files_are_recognised_by_their_packets(droppable: bytes, tmp_path: Path) -> None:
    """A P-picture is never taken for droppable: the selection of a file without B-pictures is everything."""
    selection = decode.select_packets(droppable, np.array([62]))
    assert selection is not None
    kinds = []
    with av.open(decode.io.BytesIO(droppable)) as container:
        for frame in container.decode(video=0):
            kinds.append(frame.pict_type)
    references = {i for i, kind in enumerate(kinds[:64]) if kind != av.video.frame.PictureType.B}
    assert {packet.pts for packet in selection.packets} == {i for i in references if i < 64} | {62}
