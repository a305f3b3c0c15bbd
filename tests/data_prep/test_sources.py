"""Odd sources: edit lists, colours, sizes that change, streams without times, holes, turns, interlaced pictures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import data_prep.prepare
import data_prep.transcode
from arvideo_dist.data.decode import BadSample, decode_planes, decode_rgb
from data_prep.boxes import placed
from data_prep.errors import Rejected
from data_prep.folder import VIDEO_SUFFIXES
from data_prep.isolation import Limits, Prober
from data_prep.items import Inputs
from data_prep.prepare import differences, fingerprint, run_settings
from data_prep.probe import SourceInfo, VideoInfo
from data_prep.timeline import timeline
from data_prep.transcode import TranscodeSettings, compliant, ffmpeg, transcode
from tests.data_prep.videos import frames_of, make, mux, psnr, with_clean_aperture, with_edits

SETTINGS = TranscodeSettings()


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober(Limits())
    yield prober
    prober.close()


def written(source: Path, prober: Prober) -> tuple[list[NDArray[np.uint8]], VideoInfo, SourceInfo]:
    target = source.with_name("out.mp4")
    video, info = transcode(source, target, SETTINGS, Limits(), prober)
    return frames_of(target), video, info


def same(pictures: list[NDArray[np.uint8]], expected: list[NDArray[np.uint8]]) -> None:
    assert len(pictures) == len(expected)
    assert min(map(psnr, pictures, expected)) > 27  # a sharp test pattern; the neighbouring picture gives 22


def reason(source: Path, prober: Prober) -> str:
    with pytest.raises(Rejected) as caught:
        transcode(source, source.with_name("out.mp4"), SETTINGS, Limits(), prober)
    return str(caught.value)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pictures at 25 a second with B-pictures, a key picture every 25."""
    path = tmp_path_factory.mktemp("hundred") / "in.mp4"
    return make(path, "-g", "25", "-bf", "2", "-crf", "10", source="testsrc2=s=160x120:r=25:d=4")


EDITS = {
    "begins later and ends sooner": ([(1.2, 2.4, 1)], [*range(60, 90)], 0.0),
    "ends sooner": ([(1.2, 0, 1)], [*range(30)], 0.0),
    "begins later": ([(1.6, 2.4, 1)], [*range(60, 100)], 0.0),
    "waits": ([(1.0, None, 1), (1.2, 2.4, 1)], [*range(60, 90)], 1.0),
    "leaves out the middle": ([(1.0, 0, 1), (1.2, 2.4, 1)], [*range(25), *range(60, 90)], 0.0),
    "shows the end first": ([(1.2, 2.4, 1), (1.0, 0, 1)], [*range(60, 90), *range(25)], 0.0),
    "lasts longer than the media": ([(10, 0, 1)], [*range(100)], 0.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_list_shows_what_players_show(
    name: str, hundred: Path, tmp_path: Path, prober: Prober
) -> None:
    edits, shown, start = EDITS[name]
    source = with_edits(hundred, tmp_path / "in.mp4", *edits)
    everything = frames_of(hundred)
    pictures, video, info = written(source, prober)
    assert (video.fps, info.start) == (25.0, start)
    same(pictures, [everything[number] for number in shown])
    assert not compliant(info, SETTINGS) or len(shown) == 100


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([(2, 0, 2)], "edit list: it plays at 2 times the rate"),
        ([(8, 0, 0.5)], "edit list: it plays at 0.5 times the rate"),
        ([(2, 0, 0)], "edit list: it plays at 0 times the rate"),
        ([(1, 0, 1), (1, None, 1), (1, 1, 1)], "edit list: it shows nothing for a while"),
        ([(1, 50, 1)], "no video stream: it holds no pictures: its edit list shows none"),
    ],
)
def test_an_edit_list_that_players_disagree_about_is_named(
    edits: list[tuple[float, float | None, float]], words: str, hundred: Path, tmp_path: Path, prober: Prober
) -> None:
    assert reason(with_edits(hundred, tmp_path / "in.mp4", *edits), prober).startswith(words)


def test_a_cut_off_file_with_an_edit_list_is_truncated(hundred: Path, tmp_path: Path, prober: Prober) -> None:
    edited = with_edits(hundred, tmp_path / "in.mp4", (1.2, 2.4, 1))
    first = mux(tmp_path / "first.mp4", "-i", str(edited), "-c", "copy", "-movflags", "+faststart")
    moved = first.read_bytes()
    assert b"elst" in moved
    (tmp_path / "cut.mp4").write_bytes(moved[: len(moved) * 6 // 10])
    assert reason(tmp_path / "cut.mp4", prober).startswith("truncated: ")


@pytest.mark.parametrize("edits", [[(1.2, 2.4, 1)], [(1.2, 0, 1)], [(1.0, 0, 1), (1.2, 2.4, 1)]])
def test_the_loader_shows_no_picture_that_an_edit_list_hides(
    edits: list[tuple[float, float | None, float]], hundred: Path, tmp_path: Path
) -> None:
    data = with_edits(hundred, tmp_path / "in.mp4", *edits).read_bytes()
    expected = frames_of(data)
    indices = np.arange(len(expected))
    assert all(map(np.array_equal, decode_rgb(data, indices), expected))
    with pytest.raises(BadSample):
        decode_rgb(data, np.array([len(expected)]))


# Luma weights of red and blue, ITU-T H.273; chroma of YCgCo is apart.
WEIGHTS = {"smpte170m": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}
COLOURS = np.array(
    [
        *[[grey] * 3 for grey in (0.0, 0.25, 128 / 255, 0.75, 1.0)],
        *[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]],
        *[[0.8, 0.5, 0.3], [0.2, 0.4, 0.7], [0.3, 0.6, 0.2], [0.9, 0.7, 0.6], [0.4, 0.2, 0.5]],
    ]
)
GREYS, PATCH = 5, 32


def to_yuv(rgb: NDArray[np.float64], matrix: str, full: bool, bits: int) -> NDArray[np.float64]:
    """Codes of colours [N, 3] in 0 to 1, not rounded."""
    scale, top = 2.0 ** (bits - 8), 2.0**bits - 1
    r, g, b = rgb.T
    if matrix == "ycgco":
        y, u, v = r / 4 + g / 2 + b / 4, -r / 4 + g / 2 - b / 4, r / 2 - b / 2
    else:
        red, blue = WEIGHTS[matrix]
        y = red * r + (1 - red - blue) * g + blue * b
        u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    if full:
        return np.stack([y * top, u * top + 128 * scale, v * top + 128 * scale], 1)
    return np.stack([16 + 219 * y, 128 + 224 * u, 128 + 224 * v], 1) * scale


def patches(path: Path, matrix: str, full: bool, bits: int) -> tuple[Path, NDArray[np.float64]]:
    """A lossless video of flat patches and what they are in RGB, 0 to 255, after rounding to its codes."""
    codes = np.rint(to_yuv(COLOURS, matrix, full, bits)).clip(0, 2**bits - 1)
    planes = [
        np.kron(codes[:, plane].reshape(4, 4), np.ones((side, side)))
        for plane, side in enumerate((PATCH, PATCH // 2, PATCH // 2))
    ]
    data = b"".join(plane.astype(np.uint8 if bits == 8 else "<u2").tobytes() for plane in planes)
    layout = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    tags = f"setparams=colorspace={matrix}:range={'pc' if full else 'tv'}"
    command = [ffmpeg()[0], "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", layout, "-r", "25"]
    command += ["-s", f"{4 * PATCH}x{4 * PATCH}", "-i", "-", "-vf", tags, "-c:v", "ffv1"]
    command += ["-color_range", "pc" if full else "tv", str(path)]
    subprocess.run(command, input=data * 4, check=True, timeout=60)
    base, *units = (to_yuv(np.array([unit]), matrix, full, bits)[0] for unit in [[0.0] * 3, *np.eye(3)])
    inverse = np.linalg.inv(np.stack(units) - base)
    return path, (codes - base) @ inverse


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("matrix", "full"), [*product(WEIGHTS, (False, True)), ("ycgco", False)])
def test_flat_colours_hold_to_one_code(
    matrix: str, full: bool, bits: int, tmp_path: Path, prober: Prober
) -> None:
    source, rgb = patches(tmp_path / "in.mkv", matrix, full, bits)
    # Without loss, so that what is off is the conversion's doing.
    _, info = transcode(source, tmp_path / "out.mp4", TranscodeSettings(crf=0), Limits(), prober)
    assert (info.full_range, info.pixel_format[7:9]) == (full, "" if bits == 8 else "10")
    data = (tmp_path / "out.mp4").read_bytes()
    (planes,) = decode_planes(data, np.array([1]))
    middles = [
        plane[side // 2 :: side, side // 2 :: side].reshape(-1)
        for plane, side in zip(planes, (PATCH, PATCH // 2, PATCH // 2), strict=True)
    ]
    worst = np.abs(np.stack(middles, 1) - to_yuv(rgb, "smpte170m", False, 8)).max(0)
    assert worst.max() <= 1, f"stored codes of Y, U, V are off by {worst}"
    (picture,) = decode_rgb(data, np.array([1]))
    shown = picture[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].reshape(-1, 3)
    greys = np.abs(shown[:GREYS] - rgb[:GREYS].clip(0, 1) * 255).max()
    assert greys <= 1.5, f"greys of the training clip are {shown[:GREYS, 0]}"
    assert shown[GREYS - 1].tolist() == [255] * 3
    # Decoders round chroma down in the conversion that is fast enough for training.
    assert np.abs(shown - rgb.clip(0, 1) * 255).max() < 4


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_without_matrix_or_primaries_is_taken_for_bt2020(
    transfer: str, tmp_path: Path, prober: Prober
) -> None:
    pictures = {}
    for name, tags in {
        "bare": f"color_trc={transfer}",
        "full": f"color_trc={transfer}:colorspace=bt2020nc:color_primaries=bt2020",
    }.items():
        source = make(
            tmp_path / f"{name}.mkv", "-vf", f"format=yuv420p10,setparams={tags}:range=tv", "-c:v", "ffv1"
        )
        pictures[name], _, _ = written(source, prober)
    assert all(map(np.array_equal, pictures["bare"], pictures["full"]))
    assert np.ptp(pictures["bare"][0]) > 150


def test_matrices_that_cannot_be_converted_are_named(tmp_path: Path, prober: Prober) -> None:
    for matrix, number in {"smpte2085": 11, "ictcp": 14, "chroma-derived-nc": 12, "bt2020c": 10}.items():
        tags = f"format=yuv420p,setparams=colorspace={matrix}"
        source = make(tmp_path / f"{matrix}.mkv", "-vf", tags, "-c:v", "ffv1")
        assert reason(source, prober).startswith(f"colour: matrix coefficients {number} of")
    # RGB that it is not is a wrong tag: taken for no tag.
    wrong = make(tmp_path / "gbr.mkv", "-vf", "format=yuv420p,setparams=colorspace=gbr", "-c:v", "ffv1")
    plain = make(tmp_path / "plain.mkv", "-vf", "format=yuv420p", "-c:v", "ffv1")
    assert all(map(np.array_equal, written(wrong, prober)[0], written(plain, prober)[0]))


def joined(path: Path, *sizes: tuple[str, float]) -> tuple[Path, list[NDArray[np.uint8]]]:
    """Transport streams of these sizes and seconds one after the other, each with a clock of its own."""
    data, pictures = b"", []
    for number, (size, seconds) in enumerate(sizes):
        part = path.with_name(f"{number}.ts")
        make(part, "-c:v", "libx264", "-crf", "10", source=f"testsrc2=s={size}:r=25:d={seconds}")
        data, pictures = data + part.read_bytes(), pictures + frames_of(part)
    path.write_bytes(data)
    return path, pictures


def test_joined_streams_of_one_shape_are_one_clip_of_the_first_ones_size(
    tmp_path: Path, prober: Prober
) -> None:
    source, expected = joined(tmp_path / "in.ts", ("160x120", 1), ("320x240", 1))
    pictures, video, _ = written(source, prober)
    assert (video.width, video.height, video.fps, video.frames) == (160, 120, 25.0, 50)
    same(pictures[:25], expected[:25])
    assert [picture.shape for picture in pictures] == [(120, 160, 3)] * 50
    halved = [
        picture.astype(float).reshape(120, 2, 160, 2, 3).mean((1, 3)).round() for picture in expected[25:]
    ]
    assert min(map(psnr, pictures[25:], halved)) > 22


def test_a_change_of_shape_is_named(tmp_path: Path, prober: Prober) -> None:
    source, _ = joined(tmp_path / "in.ts", ("320x240", 1), ("640x360", 1))
    assert reason(source, prober).startswith("size: it changes from 320x240 to 640x360")
    source, _ = joined(tmp_path / "first.ts", ("640x360", 0.04), ("320x240", 1))
    assert reason(source, prober).startswith("size: it changes from 640x360 to 320x240")


def test_a_change_of_size_after_the_first_picture_keeps_the_time(tmp_path: Path, prober: Prober) -> None:
    parts = [
        make(tmp_path / f"{size}.h264", "-bf", "0", source=f"testsrc2=s={size}:r=25:d={seconds}").read_bytes()
        for size, seconds in (("320x240", 0.04), ("160x120", 2))
    ]
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    pictures, video, _ = written(tmp_path / "both.h264", prober)
    assert (video.width, video.height, video.fps, len(pictures)) == (320, 240, 25.0, 51)
    assert len({picture.tobytes() for picture in pictures}) == 51


def test_a_video_of_two_sizes_is_not_copied(tmp_path: Path, prober: Prober) -> None:
    settings = TranscodeSettings(gop=32, copy_if_compliant=True)
    for size in ("160x120", "320x240"):
        arguments = [*settings.encoder_arguments(), "-f", "mpegts"]
        make(tmp_path / f"{size}.ts", *arguments, source=f"testsrc2=s={size}:r=25:d=1.28")
    (tmp_path / "list").write_text("file 160x120.ts\nfile 320x240.ts\n")
    source = mux(tmp_path / "in.mp4", "-f", "concat", "-i", str(tmp_path / "list"), "-c", "copy")
    assert compliant(prober.source(str(source)), settings)
    transcode(source, tmp_path / "out.mp4", settings, Limits(), prober)
    assert [frame.shape for frame in frames_of(tmp_path / "out.mp4")] == [(120, 160, 3)] * 64


def test_a_change_of_colours_is_named(tmp_path: Path, prober: Prober) -> None:
    source, _ = joined(tmp_path / "in.ts", ("160x120", 1))
    tagged = mux(
        tmp_path / "t.ts", "-i", str(source), "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=1"
    )
    (tmp_path / "both.ts").write_bytes(source.read_bytes() + tagged.read_bytes())
    assert reason(tmp_path / "both.ts", prober).startswith("colour: it changes from bt601 tv to bt709 tv")


@pytest.mark.parametrize("suffix", ["h264", "hevc"])
@pytest.mark.parametrize("rate", [25, 30])
def test_a_raw_stream_runs_at_the_rate_that_it_states(
    suffix: str, rate: int, tmp_path: Path, prober: Prober
) -> None:
    source = make(tmp_path / f"in.{suffix}", "-crf", "10", source=f"testsrc2=s=160x120:r={rate}:d=1")
    pictures, video, info = written(source, prober)
    assert (video.fps, video.frames, info.timed) == (rate, rate, False)
    same(pictures, frames_of(source))


def test_a_raw_stream_that_states_no_rate_runs_at_25(tmp_path: Path, prober: Prober) -> None:
    # This encoder writes no timing.
    source = make(tmp_path / "in.h264", "-c:v", "libopenh264", source="testsrc2=s=160x120:r=30:d=1")
    _, video, _ = written(source, prober)
    assert (video.fps, video.frames) == (25.0, 30)


CONTAINERS = {
    # suffix -> (muxer, encoder)
    **dict.fromkeys(("mp4", "mov", "mkv", "f4v", "ts", "mts", "m2ts", "m4v", "nut"), (None, "libx264")),
    **dict.fromkeys(("3gp", "3g2"), (None, "h263")),
    **dict.fromkeys(("avi", "divx"), ("avi", "mpeg4")),
    **dict.fromkeys(("mpg", "mpeg", "vob", "m2v", "mxf"), (None, "mpeg2video")),
    **dict.fromkeys(("ogv", "ogm"), ("ogg", "libtheora")),
    **dict.fromkeys(("rm", "rmvb"), ("rm", "rv20")),
    **dict.fromkeys(("asf", "wmv"), (None, "wmv2")),
    **dict.fromkeys(("webm", "ivf"), (None, "libvpx")),
    "h264": (None, "libx264"),
    "hevc": (None, "libx265"),
    "flv": (None, "flv"),
    "gif": (None, "gif"),
    "dv": (None, "dvvideo"),
}


def test_every_suffix_that_is_offered_is_read(tmp_path: Path, prober: Prober) -> None:
    assert {f".{suffix}" for suffix in CONTAINERS} == VIDEO_SUFFIXES
    for suffix, (muxer, encoder) in CONTAINERS.items():
        size = "720x576" if suffix == "dv" else "176x144"
        arguments = ["-c:v", encoder, *(["-f", muxer] if muxer else [])]
        arguments += ["-pix_fmt", "yuv420p"] if suffix != "gif" else []
        source = make(tmp_path / f"in.{suffix}", *arguments, source=f"testsrc2=s={size}:r=25:d=0.4")
        _, video, _ = written(source, prober)
        assert (video.fps, abs(video.frames - 10) <= 1) == (25.0, True), (suffix, video)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_a_hole_is_cut_to_a_second_of_stillness(suffix: str, tmp_path: Path, prober: Prober) -> None:
    hole = 5 if suffix == "avi" else 60  # AVI fills it with empty packets
    source = make(
        tmp_path / f"in.{suffix}",
        *("-vf", f"setpts=PTS+gte(N\\,50)*{hole}/TB", "-fps_mode", "passthrough", "-bf", "0", "-crf", "10"),
        source="testsrc2=s=160x120:r=25:d=4",
    )
    pictures, video, info = written(source, prober)
    assert (video.fps, video.frames, info.constant_rate) == (25.0, 124, True)
    originals = frames_of(source)
    same(pictures, [*originals[:50], *[originals[49]] * 24, *originals[50:]])
    assert np.allclose(info.cuts, [[2.96, 2 + hole]], atol=1e-3)


def test_a_clip_that_mostly_stands_still_is_refused(tmp_path: Path, prober: Prober) -> None:
    source = make(
        tmp_path / "in.mkv",
        *("-vf", "setpts='PTS+floor(N/3)*60/TB'", "-fps_mode", "passthrough"),
        source="testsrc2=s=64x64:r=25:d=0.96",
    )
    assert reason(source, prober).startswith("timestamps: 24 pictures ")


def test_time_runs_on_over_holes_and_joins() -> None:
    ticks = [Fraction(n, 25) for n in range(10)]
    plain = timeline([ticks])
    assert (plain.rate, plain.constant, plain.duration, plain.cuts) == (25, True, Fraction(10, 25), [])
    assert plain.max_hold is None
    holed = timeline([[*ticks, *[time + 9 for time in ticks]]])
    assert (holed.rate, holed.constant, holed.max_hold) == (25, True, 1)
    assert holed.cuts == [(Fraction(9, 25) + 1, Fraction(9))]
    assert holed.duration == 1 + Fraction(19, 25)
    again = timeline([ticks, ticks])
    assert (again.rate, again.duration, again.cuts, again.max_hold) == (25, Fraction(20, 25), [], 1)
    slow = timeline([[Fraction(5 * n) for n in range(4)]])  # one picture every five seconds is no hole
    assert (slow.rate, slow.duration, slow.cuts) == (Fraction(1, 5), 20, [])


def test_boxes_behind_a_hole_stand_at_their_pictures() -> None:
    video = VideoInfo(64, 64, 25.0, 124, 4.96, "h264", "yuv420p")
    lines = [f"{second},0,0,1,1,7" for second in (901.0, 930.0, 963.0)]
    result = placed(lines, 900.0, 0.0, video, [[2.96, 62.0]])
    assert [box["frame"] for box in result["boxes"]] == [25, 99]
    assert result["boxes_outside"] == 1


MIRRORED = (
    *("-display_hflip", "-display_vflip", "-display_rotation 180 -display_vflip"),
    *("-display_rotation 90 -display_hflip", "-display_rotation 270 -display_hflip"),
)


def test_mirrored_pictures_are_shown_as_ffmpeg_shows_them(tmp_path: Path, prober: Prober) -> None:
    plain = make(tmp_path / "plain.mp4", "-crf", "5", source="testsrc2=s=160x120:r=25:d=0.4")
    for options in MIRRORED:
        turned = mux(tmp_path / "turned.mp4", *options.split(), "-i", str(plain), "-c", "copy")
        oracle = mux(tmp_path / "oracle.mkv", "-i", str(turned), "-c:v", "ffv1")
        pictures, _, info = written(turned, prober)
        same(pictures, frames_of(oracle))
        assert not compliant(info, SETTINGS), options


def test_a_turn_by_no_quarter_keeps_the_sides(tmp_path: Path, prober: Prober) -> None:
    plain = make(tmp_path / "plain.mp4", "-crf", "5", source="testsrc2=s=160x120:r=25:d=0.4")
    for angle, size in {"45": (160, 120), "10": (160, 120), "100": (160, 120), "89.8": (120, 160)}.items():
        turned = mux(tmp_path / "turned.mp4", "-display_rotation", angle, "-i", str(plain), "-c", "copy")
        oracle = mux(tmp_path / "oracle.mkv", "-i", str(turned), "-c:v", "ffv1")
        pictures, video, _ = written(turned, prober)
        assert (video.width, video.height) == size, angle
        assert min(map(psnr, pictures, frames_of(oracle))) > 25, angle


def combed(picture: NDArray[np.uint8]) -> float:
    """How much more lines differ from their neighbours than from the lines after those."""
    lines = picture.astype(float).mean(2)
    return float(np.abs(lines[1:-1] - lines[:-2]).mean() / np.abs(lines[2:] - lines[:-2]).mean())


@pytest.mark.parametrize("encoder", ["libx264", "mpeg2video"])
def test_interlaced_pictures_are_made_whole(encoder: str, tmp_path: Path, prober: Prober) -> None:
    moving = "color=gray:s=320x240:r=50:d=1[b];color=white:s=60x160:r=50:d=1[w];[b][w]overlay=x=n*5:y=40"
    flags = (
        "-vf",
        "interlace=lowpass=off",
        "-flags",
        "+ildct+ilme",
        "-c:v",
        encoder,
        "-g",
        "12",
        "-q:v",
        "2",
    )
    source = make(tmp_path / "in.mkv", *flags, source=moving)
    pictures, video, info = written(source, prober)
    assert info.interlaced
    assert not compliant(info, SETTINGS)
    assert (video.fps, video.frames) == (25.0, 25)
    assert np.mean([combed(frame) for frame in frames_of(source)]) > 2
    assert np.mean([combed(frame) for frame in pictures]) < 1


def test_pictures_that_are_not_flagged_pass_the_deinterlacer_unchanged(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mkv", "-c:v", "ffv1", source="testsrc2=s=160x120:r=25:d=0.4")
    scale = "scale=flags=bicubic+accurate_rnd+bitexact"
    passed = mux(
        tmp_path / "out.mkv",
        *("-i", str(source), "-vf", f"{scale},bwdif=mode=send_frame:deint=interlaced", "-c:v", "ffv1"),
    )
    assert all(map(np.array_equal, frames_of(source), frames_of(passed)))


def test_a_container_that_crops_is_obeyed(tmp_path: Path, prober: Prober) -> None:
    plain = make(tmp_path / "plain.mp4", "-crf", "5", source="testsrc2=s=320x240:r=25:d=0.4")
    cropped = with_clean_aperture(plain, tmp_path / "in.mp4", 200, 160)
    matroska = mux(tmp_path / "in.mkv", "-i", str(cropped), "-c", "copy")
    for source in (cropped, matroska):
        pictures, video, _ = written(source, prober)
        assert (video.width, video.height) == (200, 160)
        same(pictures, [frame[40:200, 60:260] for frame in frames_of(plain)])
    assert not compliant(prober.source(str(cropped)), SETTINGS)


@pytest.mark.parametrize(("size", "expected"), [("161x121", (160, 120)), ("641x359", (458, 256))])
def test_odd_sizes_become_even(size: str, expected: tuple[int, int], tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mkv", "-c:v", "ffv1", source=f"testsrc2=s={size}:r=25:d=0.2")
    _, video, _ = written(source, prober)
    assert (video.width, video.height) == expected


def test_soft_telecine_is_film_again() -> None:
    # 24 pictures a second, shown for two and three fields in turn.
    times = [Fraction(1001 * (5 * number // 2), 60000) for number in range(480)]
    film = timeline([times])
    assert (film.rate, film.constant, film.max_hold) == (Fraction(24000, 1001), True, None)


def test_a_set_made_with_another_conversion_is_not_mixed_with_new_videos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = Inputs([], [], {"source": "test"})
    now = run_settings(inputs, SETTINGS, 1, 0)
    monkeypatch.setattr(data_prep.prepare, "CONVERSION", 1)
    before = run_settings(inputs, SETTINGS, 1, 0)
    assert differences(before, now) == ["conversion: 1 -> 2"]
    assert fingerprint(before) != fingerprint(now)


def test_of_several_errors_the_first_is_told(tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mkv", source="testsrc2=s=64x64:r=25:d=0.2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep.transcode, "chain", lambda *_: "zscale=m=ycgco:p=bogus")
        text = reason(source, prober)
    assert text.startswith("cannot be decoded (h264): ")
    assert "bogus" in text
