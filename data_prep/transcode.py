"""One input file in, one small mp4 that is cheap to decode out: ffmpeg as a subprocess.

Default profile, "droppable": every 16th picture is a reference (I or P), the 15 between are B-pictures that
nothing refers to, so a reader decodes only the references and the pictures it wants. The output does not
depend on the machine's load or core count: one thread everywhere, bit-exact scaling, no dates or versions in
the container.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import IO, Literal

import imageio_ffmpeg
from pydantic import BaseModel, ConfigDict, Field

from data_prep.errors import Interrupted, Rejected, UserError
from data_prep.filters import chain, is_standard_colour
from data_prep.isolation import Limits, Prober, run
from data_prep.probe import CONTAINERS, SourceInfo, VideoInfo

# Lines of ffmpeg's log that mean a picture is missing or was patched up. On healthy files, also old and odd
# ones, none of them appears; a file cut off or hit by bit errors shows at least one.
_DAMAGE = re.compile(
    r"corrupt decoded frame|corrupt input packet|Error submitting packet|ended prematurely|"
    r"Decoding error|Error during demuxing|partial file",
    re.IGNORECASE,
)
_CONTAINER_ARGUMENTS = (
    *("-map_metadata", "-1", "-map_chapters", "-1"),
    *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart", "-f", "mp4", "-y"),
)
# What ffmpeg says if a picture is of another kind than the first.
_CHANGE = re.compile(
    r"filter context - w: (\d+) h: (\d+) fmt: \d+ csp: (\S+) range: (\S+) .*"
    r"incoming frame - w: (\d+) h: (\d+) fmt: \d+ csp: (\S+) range: (\S+) "
)
_SAME_MATRIX = dict.fromkeys(("unknown", "gbr", "reserved", "bt470bg", "smpte170m"), "bt601")
_SAME_SHAPE = 0.02  # of the aspect: sizes are whole pixels
_MAX_REPEATS = 5  # output pictures per source picture, past which most of a clip would stand still

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
]

# Raised whenever the same source and settings give other pictures than before: a data set is made by one alone.
CONVERSION = 2


class TranscodeSettings(BaseModel):
    """How videos are encoded; part of the data set's fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    short_side: int = Field(256, ge=16, le=4096, description="pixels of the shorter side; never upscaled")
    crf: int = Field(20, ge=0, le=51, description="x264 constant rate factor: lower is better and larger")
    gop: int = Field(64, ge=1, le=600, description="pictures from one I-picture to the next")
    bframes: int = Field(15, ge=0, le=16, description="droppable B-pictures between two references")
    preset: Preset = Field("medium", description="x264 preset")
    max_fps: int = Field(60, ge=1, le=240, description="faster sources are thinned to this rate")
    min_frames: int = Field(2, ge=1, description="shorter results are rejected")
    copy_if_compliant: bool = Field(
        False, description="take over videos that are already as the profile wants them, without re-encoding"
    )

    def encoder_arguments(self) -> list[str]:
        """The encoder's part of the ffmpeg command line."""
        x264 = "threads=1:scenecut=0:b-adapt=0:b-pyramid=none:ref=1:pbratio=1.0:open-gop=0"
        colour = ("-colorspace", "smpte170m", "-color_range", "tv", "-color_primaries", "bt709")
        return [
            *("-c:v", "libx264", "-threads", "1", "-preset", self.preset, "-crf", str(self.crf)),
            *("-tune", "fastdecode", "-g", str(self.gop), "-keyint_min", str(self.gop)),
            *("-bf", str(self.bframes), "-x264-params", x264, "-pix_fmt", "yuv420p"),
            *(*colour, "-color_trc", "bt709", "-fps_mode", "passthrough"),
            *_CONTAINER_ARGUMENTS,
        ]


PROFILES: dict[str, dict[str, int]] = {
    "droppable": {},
    "droppable-320": {"short_side": 320, "crf": 23},
    "gop16": {"crf": 23, "gop": 16, "bframes": 0},
}


@functools.cache
def ffmpeg() -> tuple[str, str]:
    """Path and version line of the ffmpeg binary that the package imageio-ffmpeg ships."""
    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
        answer = subprocess.run([path, "-version"], capture_output=True, text=True, check=True, timeout=60)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"ffmpeg does not run: {error}; reinstall the package imageio-ffmpeg") from error
    return path, answer.stdout.splitlines()[0]


def output_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even width and height with the aspect of `width` x `height`, shorter side at most `short_side`."""
    scale = min(Fraction(1), Fraction(short_side, min(width, height)))
    return tuple(max(2, 2 * round(side * scale / 2 - Fraction(1, 10**6))) for side in (width, height))  # type: ignore[return-value]


def output_rate(source: SourceInfo, max_fps: int) -> Fraction:
    """The source's rate, halved until it is at most `max_fps`: whole pictures are dropped, evenly."""
    rate = Fraction(source.fps_num, source.fps_den)
    while rate > max_fps:
        rate /= 2
    return rate


def transcode(
    path: Path, target: Path, settings: TranscodeSettings, limits: Limits, prober: Prober
) -> tuple[VideoInfo, SourceInfo]:
    """Encode the file `path` to the mp4 `target`; what was written and what was read.

    Raises Rejected with the reason, or Interrupted if a helper was ended by a signal or limit.
    """
    source = prober.source(str(path))
    rate = output_rate(source, settings.max_fps)
    expected = max(1, round(source.duration * rate))
    if min(source.packets, expected) < settings.min_frames:
        raise Rejected(f"too short: {source.packets} picture(s), at least {settings.min_frames} are wanted")
    if expected > _MAX_REPEATS * source.packets:
        raise Rejected(f"timestamps: {source.packets} pictures spread over {source.duration:.0f} s")
    copied = settings.copy_if_compliant and compliant(source, settings)
    # A raw stream's pictures have no times. If time goes on after a gap ffmpeg must not mend it in its own way.
    clock = [] if source.timed else ["-r", f"{source.fps_num}/{source.fps_den}"]
    clock += ["-copyts"] if source.max_hold else []
    command = [
        *(ffmpeg()[0], "-hide_banner", "-nostats", "-nostdin", "-loglevel", "repeat+level+warning"),
        *("-filter_threads", "1", "-threads", "1", "-protocol_whitelist", "file"),
        *("-reinit_filter", "0", "-noautorotate", "-format_whitelist", CONTAINERS, *clock),
        *("-i", f"file:{path}", "-map", f"0:{source.stream}"),
    ]
    if copied:  # decoded too, into nothing: a damaged video must not pass because nobody looked
        command += ["-c", "copy", *_CONTAINER_ARGUMENTS, f"file:{target}"]
        command += ["-map", f"0:{source.stream}", "-fps_mode", "passthrough", "-f", "null", "-"]
    else:
        filters = chain(source, settings.short_side, rate)
        command += ["-vf", filters, *settings.encoder_arguments(), f"file:{target}"]
    # Decoding and encoding a picture costs some 10 ms at 720p: a hundred times that is a hang.
    cpu_s = limits.cpu_s + source.packets + expected * 0.25
    returncode, log = run(command, Limits(cpu_s, limits.memory))
    if _out_of_space(log):
        raise OSError(f"no space left for {target}")
    damage = [line for line in log.splitlines() if _DAMAGE.search(line)]
    # Streams joined one after the other: the demuxer takes the join for a loss, the decoder misses nothing.
    joins_only = len(damage) <= source.joins and all("corrupt input packet" in line for line in damage)
    if damage and not joins_only:
        raise Rejected(f"damaged: {len(damage)} decoding errors, first: {_message(damage[0])}")
    _check_changes(log)
    if returncode:
        if "Cannot allocate memory" in log:
            raise Interrupted(f"takes more than {limits.memory / 2**30:.0f} GiB of memory")
        raise Rejected(f"cannot be decoded ({source.codec}): {_first_error(log)}")
    if copied and _CHANGE.search(log):  # pictures of several sizes
        settings = settings.model_copy(update={"copy_if_compliant": False})
        return transcode(path, target, settings, limits, prober)
    return accept(target, settings, prober, expected), source


def _check_changes(log: str) -> None:
    """Raises Rejected if the pictures' shape or colours change within the stream; another size is scaled."""
    for change in _CHANGE.findall(log):
        (width, height, *old), (new_width, new_height, *new) = change[:4], change[4:]
        wide, tall = int(width) * int(new_height), int(new_width) * int(height)
        if abs(wide - tall) > _SAME_SHAPE * wide:
            raise Rejected(
                f"size: it changes from {width}x{height} to {new_width}x{new_height}, which is another shape, "
                "within the stream; cut the file there"
            )
        before, after = (f"{_SAME_MATRIX.get(m, m)} {'tv' if r == 'unknown' else r}" for m, r in (old, new))
        if before != after:
            raise Rejected(
                f"colour: it changes from {before} to {after} within the stream; cut the file there"
            )


def compliant(source: SourceInfo, settings: TranscodeSettings) -> bool:
    """Whether a file already is what these settings would make of it, up to its bit rate."""
    rate = Fraction(source.fps_num, source.fps_den)
    groups = -(-source.packets // settings.gop)
    return (
        source.codec == "h264"
        and "mp4" in source.container
        and source.pixel_format == "yuv420p"
        and is_standard_colour(source)
        and not (source.transform or source.discarded or source.cropped or source.interlaced)
        and source.square_pixels
        and source.max_hold is None
        and source.constant_rate
        and rate <= settings.max_fps
        and (source.width, source.height) == output_size(source.width, source.height, settings.short_side)
        and source.key_interval <= settings.gop
        # Each group of pictures may end in one reference more than every 16th, and begin with one.
        and source.references <= source.packets // (settings.bframes + 1) + 2 * groups
    )


def accept(target: Path, settings: TranscodeSettings, prober: Prober, expected: int) -> VideoInfo:
    """Read back a written file and refuse it if it is not the `expected` pictures."""
    video = prober.video(str(target))
    if video.frames < max(settings.min_frames, expected * 0.98 - 2):
        raise Rejected(f"damaged: only {video.frames} of {expected} pictures decode")
    return video


def encode_raw(
    target: Path,
    size: tuple[int, int],
    fps: int,
    settings: TranscodeSettings,
    limits: Limits,
    feed: Callable[[IO[bytes]], object],
) -> None:
    """Encode RGB24 pictures of `size` (width, height), which `feed` writes to a pipe, to the mp4 `target`."""
    width, height = size
    command = [
        *(ffmpeg()[0], "-hide_banner", "-nostats", "-loglevel", "repeat+level+warning"),
        *("-filter_threads", "1", "-threads", "1", "-f", "rawvideo", "-pix_fmt", "rgb24"),
        *("-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"),
        *("-vf", "scale=flags=bicubic+accurate_rnd+bitexact:out_color_matrix=smpte170m:out_range=tv"),
        *(*settings.encoder_arguments(), f"file:{target}"),
    ]
    returncode, log = run(command, limits, feed)
    if returncode:
        if _out_of_space(log):
            raise OSError(f"no space left for {target}")
        raise Rejected(f"encoding failed: {_first_error(log)}")


def _out_of_space(log: str) -> bool:
    return "No space left on device" in log or "Disk quota exceeded" in log


def _first_error(log: str) -> str:
    """What went wrong: the lines after it tell of what that led to."""
    lines = log.strip().splitlines()
    errors = [line for line in lines if "[error]" in line or "[fatal]" in line]
    return _message((errors or lines[-1:] or ["no message"])[0])


def _message(line: str) -> str:
    """A line of ffmpeg's log without the addresses and levels around the words."""
    return re.sub(r"\[[^\]]*\]\s*", "", line).strip()[:200]
