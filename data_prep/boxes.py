"""AVA's boxes carried into a sample: movie seconds become pictures of the transcoded video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.errors import Rejected
from data_prep.probe import VideoInfo


def placed(
    lines: list[str],
    video_start: float,
    source_start: float,
    video: VideoInfo,
    cuts: Sequence[Sequence[float]] = (),
) -> dict[str, list[dict[str, Any]] | int]:
    """The sample's JSON fields for box lines `time,x1,y1,x2,y2,action[,person]`.

    `video_start`: movie second at which the source file begins; `source_start`: second of the file at which
    its first picture stands; `cuts`: holes in the file, (from, to) in seconds from there, that are left out.
    Boxes are fractions of the picture, which cropping-free transcoding leaves
    valid. `frame` counts the transcoded pictures from 0. Boxes outside the video are counted, not kept;
    raises Rejected if none lies inside.
    """
    boxes, outside = [], 0
    for line in lines:
        time, *numbers = line.split(",")
        second = float(time) - video_start - source_start
        in_hole = any(begin < second < end for begin, end in cuts)
        left_out = sum(end - begin for begin, end in cuts if end <= second)
        frame = round((second - left_out) * video.fps)
        if in_hole or not 0 <= frame < video.frames:
            outside += 1
            continue
        x1, y1, x2, y2 = map(float, numbers[:4])
        action = int(numbers[4]) if numbers[4] else None
        person = int(numbers[5]) if len(numbers) > 5 and numbers[5] else None
        boxes.append(
            {
                "movie_second": float(time),
                "frame": frame,
                "box": [x1, y1, x2, y2],
                "action": action,
                "person": person,
            }
        )
    if lines and not boxes:
        times = [float(line.split(",")[0]) - video_start for line in lines]
        raise Rejected(
            f"boxes: all at {min(times):.0f} to {max(times):.0f} s, the video lasts {video.duration:.0f} s; "
            "does --video-start fit these files?"
        )
    return {"boxes": boxes, "boxes_outside": outside}
