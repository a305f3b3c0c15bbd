"""One video: what comes out shows the source at the same times, upright, and is built as the loader expects."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.errors import Rejected
from data_prep.isolation import Limits, Prober
from data_prep.timeline import frame_rate
from data_prep.transcode import TranscodeSettings, output_size, transcode
from tests.data_prep.videos import frames_of, make, mux, psnr, reference_flags

SETTINGS = TranscodeSettings()


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober(Limits())
    yield prober
    prober.close()


def test_pictures_between_references_are_never_referred_to(tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mkv", source="testsrc2=s=64x64:r=25:d=6")
    video, _ = transcode(source, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    flags, types = reference_flags(tmp_path / "out.mp4")
    assert video.frames == len(flags) == 150
    assert [kind != "B" for kind in types] == flags
    assert types.count("I") == 3  # every 64 pictures
    # A closed group of 64 has its references at 0, 16, 32, 48 and 63; the last one here is 22 long: 0, 16, 21.
    assert sum(flags) == 5 + 5 + 3


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mkv")
    digests = set()
    for name in ("a.mp4", "b.mp4"):
        transcode(source, tmp_path / name, SETTINGS, Limits(), prober)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_baked_in(tmp_path: Path, prober: Prober, rotation: int) -> None:
    plain = make(tmp_path / "plain.mp4", "-crf", "1")
    turned = mux(tmp_path / "turned.mp4", "-display_rotation", str(rotation), "-i", str(plain), "-c", "copy")
    video, source = transcode(turned, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    assert source.rotation % 360 == rotation
    expected = [np.rot90(frame, rotation // 90) for frame in frames_of(plain)]
    written = frames_of(tmp_path / "out.mp4")
    assert written[0].shape == expected[0].shape == (video.height, video.width, 3)
    assert min(map(psnr, written, expected)) > 28  # a sharp test pattern; a wrong turn gives under 12


def test_sample_aspect_ratio_is_baked_in(tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mp4", "-vf", "setsar=4/3")
    video, _ = transcode(source, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    assert (video.width, video.height) == (212, 120)


def test_variable_rate_keeps_the_time_of_every_picture(tmp_path: Path, prober: Prober) -> None:
    # 25 fps whose pictures 5 to 14 are missing: the gap is filled by the last picture before it.
    source = make(
        tmp_path / "in.mkv",
        *("-vf", "select='lt(n,5)+gt(n,14)'", "-fps_mode", "vfr", "-crf", "1"),
        source="testsrc2=s=160x120:r=25:d=1",
    )
    video, info = transcode(source, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    assert not info.constant_rate
    assert (video.fps, video.frames) == (25.0, 25)
    originals, written = frames_of(source), frames_of(tmp_path / "out.mp4")
    assert len(originals) == 15
    shown = [min(place, 4) if place < 10 else (4 if place < 15 else place - 10) for place in range(25)]
    near = [place for place in range(25) if place not in (9, 10, 11, 12, 13, 14)]  # rounding inside the gap
    assert min(psnr(written[place], originals[shown[place]]) for place in near) > 27


@pytest.mark.parametrize(
    ("times", "rate", "constant"),
    [
        ([Fraction(n, 30) for n in range(9)], Fraction(30), True),
        ([Fraction(round(n * 1000 / 30), 1000) for n in range(90)], Fraction(30), True),  # Matroska, FLV
        ([Fraction(n * 1001, 30000) for n in range(9)], Fraction(30000, 1001), True),
        ([Fraction(n, 30) for n in (0, 1, 2, 5, 6, 7, 8)], Fraction(30), False),
        ([Fraction(n * 51, 1000) for n in range(50)], Fraction(1000, 51), True),
        ([Fraction(0)], Fraction(1), True),
    ],
)
def test_rates_come_from_the_pictures_times(times: list[Fraction], rate: Fraction, constant: bool) -> None:
    assert frame_rate(times) == (rate, constant)


def test_fast_sources_are_thinned(tmp_path: Path, prober: Prober) -> None:
    source = make(tmp_path / "in.mp4", source="testsrc2=s=64x64:r=240:d=0.5")
    video, _ = transcode(source, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    assert (video.fps, video.frames) == (60.0, 30)


def test_ten_bit_and_full_range_become_eight_bit_limited(tmp_path: Path, prober: Prober) -> None:
    for name, arguments in {
        "ten.mp4": ("-pix_fmt", "yuv420p10le"),
        "full.mp4": ("-vf", "scale=out_range=pc", "-pix_fmt", "yuvj420p"),
        "444.mp4": ("-pix_fmt", "yuv444p"),
        "bt709.mp4": ("-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"),
    }.items():
        source = make(tmp_path / name, *arguments, "-crf", "1", source="rgbtestsrc=s=160x120:r=25:d=0.4")
        video, _ = transcode(source, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
        assert video.pixel_format == "yuv420p", name
        worst = min(map(psnr, frames_of(tmp_path / "out.mp4"), frames_of(source)))
        assert worst > 30, name  # a wrong range or matrix costs more than 10 dB


def test_of_several_video_streams_one_is_taken_and_audio_is_left_out(tmp_path: Path, prober: Prober) -> None:
    first = make(tmp_path / "first.mp4", source="testsrc2=s=64x64:r=25:d=1")
    sound = make(tmp_path / "sound.wav", source="sine=d=1")
    second = make(tmp_path / "second.mp4", "-t", "1", source="mandelbrot=s=128x96:r=25")
    inputs = [part for path in (sound, first, second) for part in ("-i", str(path))]
    both = mux(tmp_path / "both.mkv", *inputs, "-map", "0", "-map", "1", "-map", "2", "-c:v", "copy")
    video, source = transcode(both, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
    assert source.stream in (1, 2)
    assert (video.width, video.height) == ((64, 64) if source.stream == 1 else (128, 96))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((340, 256), (340, 256)),
        ((1920, 1080), (456, 256)),
        ((427, 240), (426, 240)),
        ((1080, 1920), (256, 456)),
    ],
)
def test_sizes_are_even_and_never_upscaled(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size(*size, 256) == expected


def hostile(folder: Path) -> dict[str, str]:
    """Broken files in `folder`: name -> how the reason must begin."""
    good = make(folder / "good.mp4", "-movflags", "+faststart", source="testsrc2=s=160x120:r=25:d=4")
    matroska = make(folder / "good.mkv", source="testsrc2=s=160x120:r=25:d=4")
    data = good.read_bytes()
    reasons = {"garbage.mp4": "not a video", "page.mp4": "not a video", "declared.mp4": "not a video"}
    (folder / "garbage.mp4").write_bytes(random.Random(0).randbytes(100_000))
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><body>Video unavailable</body></html>" * 50)
    (folder / "declared.mp4").write_bytes((0xFFFFFFF0).to_bytes(4, "big") + b"moov" + data[8:4000])
    for share in (10, 50, 90):
        (folder / f"cut{share}.mp4").write_bytes(data[: len(data) * share // 100])
        (folder / f"cut{share}.mkv").write_bytes(
            matroska.read_bytes()[: matroska.stat().st_size * share // 100]
        )
        reasons |= {f"cut{share}.mp4": "", f"cut{share}.mkv": ""}
    flipped, draw = bytearray(data), random.Random(1)
    for _ in range(30):
        flipped[draw.randrange(len(data) // 10, len(data))] ^= 1 << draw.randrange(8)
    (folder / "flipped.mp4").write_bytes(flipped)
    make(folder / "sound.mp4", source="sine=d=1")
    make(folder / "one.mp4", "-frames:v", "1")
    make(folder / "tiny.mp4", "-vf", "scale=8:8", "-c:v", "mpeg4")
    return reasons | {
        "flipped.mp4": "damaged",
        "sound.mp4": "no video stream",
        "one.mp4": "too short",
        "tiny.mp4": "size: 11x8",
    }


def test_hostile_files_are_rejected_with_the_reason(tmp_path: Path, prober: Prober) -> None:
    for name, reason in hostile(tmp_path).items():
        with pytest.raises(Rejected) as caught:
            transcode(tmp_path / name, tmp_path / "out.mp4", SETTINGS, Limits(), prober)
        text = str(caught.value)
        begins = (reason,) if reason else ("truncated", "damaged", "not a video", "cannot be decoded")
        assert text.startswith(begins), (name, text)
        assert str(tmp_path) not in text, "reasons are grouped: no paths in them"
