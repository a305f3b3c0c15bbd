"""The chain of ffmpeg filters that makes a source's pictures what the data set holds: evenly timed, progressive,
upright, of square pixels, at most so large, 8-bit 4:2:0 of BT.601 in limited range.

The chain is made once for a file (`-reinit_filter 0`), so that time runs on when a stream changes its size.
"""

from __future__ import annotations

import re
from fractions import Fraction

from data_prep.errors import Rejected
from data_prep.probe import SourceInfo, rotation

_SCALE = "flags=bicubic+accurate_rnd+bitexact"
# Matrix coefficients of ITU-T H.273. What states none, or RGB for what is not RGB, is taken for BT.601, as
# swscale and small pictures have it; HDR that states none for BT.2020.
_UNSTATED = (0, 2, 3)  # RGB, unspecified, reserved; of primaries: reserved, unspecified, reserved
_BT601 = (5, 6)
_BT2020, _ICTCP = 9, 14
_INTEGER_MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
}
_PQ, _HLG = 16, 18  # transfer characteristics that mean HDR
# Linear light at 100 nits reference white, BT.709 primaries, Hable's curve.
_TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=170m:r=limited"
)
_PLANAR_YUV = re.compile(r"yuvj?4\d\dp(\d\dle)?$")
_YUV = re.compile(r"yuv|yuyv|yvyu|uyvy|uyyvyy|nv\d|p\d1\d|y21\d|vuy|xv\d|ayuv")


def chain(source: SourceInfo, short_side: int, rate: Fraction) -> str:
    """The filters for `source`, shorter side at most `short_side` pixels, at `rate` pictures a second."""
    before, scaler, after = _colour(source)
    steps = [*_times(source, rate), *before, *_progressive(source)]
    steps += [f"scale={_size(short_side)}:{_SCALE}{scaler}", *after, *_upright(source.transform)]
    return ",".join([*steps, "setsar=1", "format=yuv420p"])


def is_hdr(source: SourceInfo) -> bool:
    return source.transfer in (_PQ, _HLG)


def is_standard_colour(source: SourceInfo) -> bool:
    """Whether the colours are BT.601 of limited range, stated or assumed for want of a statement."""
    return source.matrix in (2, *_BT601) and not source.full_range and not is_hdr(source)


def _times(source: SourceInfo, rate: Fraction) -> list[str]:
    clock = "setpts=PTS-STARTPTS"
    if source.max_hold:
        interval = f"round({source.fps_den}/{source.fps_num}/TB)"
        step = f"if(lt(PTS,PREV_INPTS),{interval},min(PTS-PREV_INPTS,round({source.max_hold}/TB)))"
        clock = f"setpts='if(isnan(PREV_INPTS),0,PREV_OUTPTS+{step})'"
    return [clock, f"fps={rate.numerator}/{rate.denominator}:round=near"]


def _progressive(source: SourceInfo) -> list[str]:
    """Pictures that are flagged as interlaced are made whole, others pass as they are.

    The scaler before does nothing as long as the size stays the same; the deinterlacer must see no other.
    """
    if source.interlaced or _PLANAR_YUV.match(source.pixel_format):
        return [f"scale={_SCALE}", "bwdif=mode=send_frame:deint=interlaced"]
    return []


def _size(short_side: int) -> str:
    """Even width and height in square pixels, never larger than the source; `transcode.output_size` in ffmpeg's
    words, which know of the crop that a container asks for."""
    shrink = f"min(1,{short_side}/min(iw*sar,ih))"
    sides = [f"'max(2,2*round({side}*{shrink}/2-1e-6))'" for side in ("round(iw*sar)", "ih")]
    return ":".join(sides)


def _colour(source: SourceInfo) -> tuple[list[str], str, list[str]]:
    """One colour matrix and range for the whole data set, the one that decoders assume for small pictures: what
    is to be done before scaling, in it, and after it. Scaling YUV keeps the codes, whatever they mean.

    swscale's own change of matrix makes pictures two codes darker, and its change of range from 10 bits up to
    two; the filter `colorspace` is exact to half a code, in integers, and cheaper.
    """
    limits = "pc" if source.full_range else "tv"
    # The scaler refuses matrices that it does not know, and need not know any.
    before = [f"setparams=colorspace=unknown:range={limits}"]
    if is_hdr(source):
        matrix = _BT2020 if source.matrix in _UNSTATED else source.matrix
        _refuse_unless(matrix in {*_INTEGER_MATRICES, _ICTCP}, matrix)
        primaries = _BT2020 if source.primaries in _UNSTATED else source.primaries
        return before, "", [f"setparams=colorspace={matrix}:color_primaries={primaries}", _TONE_MAP]
    if not _YUV.match(source.pixel_format):  # RGB, palettes, grey
        return [], ":out_color_matrix=smpte170m:out_range=tv", []
    matrix = 6 if source.matrix in _UNSTATED else source.matrix
    _refuse_unless(matrix in _INTEGER_MATRICES, matrix)
    if matrix in _BT601 and not source.full_range:
        return before, "", []
    of = f"ispace={_INTEGER_MATRICES[matrix]}:irange={limits}:iprimaries=bt709:itrc=bt709"
    to = "space=smpte170m:range=tv:primaries=bt709:trc=bt709:format=yuv420p"
    return before, "", ["format=yuv420p|yuv420p10|yuv420p12", f"colorspace={of}:{to}:fast=1"]


def _refuse_unless(known: bool, matrix: int) -> None:
    if not known:
        raise Rejected(f"colour: matrix coefficients {matrix} of ITU-T H.273 are not supported")


def _upright(transform: list[int]) -> list[str]:
    """What ffmpeg does with a display matrix, after scaling rather than before: a turn by another angle than a
    quarter's keeps the sides and fills the corners with black."""
    if not transform:
        return []
    angle = -rotation(transform) % 360
    m00, _, m10, m11 = transform
    if angle == 90:
        turn = ["transpose=cclock_flip" if m10 > 0 else "transpose=clock"]
    elif angle == 270:
        turn = ["transpose=clock_flip" if m10 < 0 else "transpose=cclock"]
    elif angle == 180:
        turn = ["hflip"] * (m00 < 0) + ["vflip"] * (m11 < 0)
    elif angle == 0:
        turn = ["vflip"] * (m11 < 0)
    else:
        turn = [f"rotate={angle}*PI/180"]
    return [*turn, "sidedata=mode=delete:type=DISPLAYMATRIX"]
