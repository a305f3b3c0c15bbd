"""The nearest videos: `python -m arvideo_dist.neighbours FEATURES --query KEY|VIDEO_FILE`, as table and picture.

FEATURES is what `embed` wrote. Nearest is the largest cosine between the means of the videos' views.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arvideo_dist.analysis import neighbours as near
from arvideo_dist.analysis.query import QueryVideo
from arvideo_dist.config.settings import exit_with
from arvideo_dist.data.reader import DataReadError
from arvideo_dist.tasks.feature_files import VideoFeatures, read_features
from arvideo_dist.tasks.picture import gif, png
from arvideo_dist.train.checkpoint.manifest import CheckpointError

_SECONDS_A_FRAME = 0.12


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.neighbours", description=__doc__)
    parser.add_argument("features", metavar="FEATURES", help="file of features, or folder or URI of its run")
    parser.add_argument(
        "--query",
        required=True,
        metavar="KEY|VIDEO_FILE",
        help="key of a video with features, or any video file",
    )
    parser.add_argument("--count", type=_positive, default=12, help="nearest videos (12)")
    parser.add_argument("--data", metavar="PATH", help="data set that was embedded, if not where it was")
    parser.add_argument("--source", help="encoder for a video file, if not where it was")
    parser.add_argument(
        "--out", metavar="FILE", default="build/neighbours.png", help="(build/neighbours.png)"
    )
    parser.add_argument("--animate", action="store_true", help="also an animated GIF beside the sheet")
    flags = parser.parse_args(argv)
    try:
        _find(read_features(flags.features), flags)
    except ValueError as error:
        exit_with(error, 2)
    except (CheckpointError, DataReadError) as error:
        exit_with(error, 1)


def _find(features: VideoFeatures, flags: argparse.Namespace) -> None:
    """Print what is nearest, then write the sheet. Raises ValueError, CheckpointError, DataReadError."""
    file = Path(flags.query)
    if flags.query in features.keys or not file.is_file():
        row = near.row_of(features, flags.query)
        found = near.nearest(features.values_nd, features.values_nd[row], flags.count, leave_out=row)
        print(near.table(features, found), flush=True)
        storage, _ = near.data_set(features.about["data"], flags.data)
        clips = near.Clips(features, storage)
        query = near.shown_as("query", features, row, clips)
    else:
        storage, manifest = near.data_set(features.about["data"], flags.data)
        video = QueryVideo(file, features.about, manifest)
        found = near.nearest(features.values_nd, video.features(flags.source), flags.count)
        print(near.table(features, found), flush=True)
        clips = near.Clips(features, storage)
        size = min(near.CELL, features.about["model"]["image_size"])
        query = near.Shown("query", file.name, "", near.frames_of(video.clips(near.ONE_VIEW, size)[0]))
    rows = [query, *near.shown(features, found, clips)]
    _write(Path(flags.out), png(near.sheet(rows)))
    if flags.animate:
        _write(Path(flags.out).with_suffix(".gif"), gif(list(near.pages(rows)), _SECONDS_A_FRAME))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    print(file)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 1")
    return int(text)


if __name__ == "__main__":
    main()
