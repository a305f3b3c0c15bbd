"""Command line: `python -m data_prep SOURCE ... --out DIR --split NAME`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from typing import NoReturn

from pydantic import ValidationError

from arvideo_dist.storage import Storage
from data_prep import folder, synthetic
from data_prep.errors import UserError
from data_prep.isolation import Limits
from data_prep.items import Inputs, Item
from data_prep.prepare import existing, prepare, run_settings, sole_writer, summary
from data_prep.transcode import TranscodeSettings
from data_prep.worker import LocalPool


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="output folder, local or s3://bucket/folder")
    common.add_argument("--split", default="train", help="name of the split (default: train)")
    common.add_argument("--shard-size", type=int, default=None, help="inputs a shard (default: by the count)")
    common.add_argument("--workers", type=int, default=None, help="videos at a time (default: CPU cores)")
    common.add_argument("--shuffle-seed", type=int, default=0, help="of the order of inputs (default: 0)")
    for name, info in TranscodeSettings.model_fields.items():
        kind = type(info.default)
        flag = f"--{name.replace('_', '-')}"
        common.add_argument(
            flag, type=kind, default=info.default, help=f"{info.description} (default: {info.default})"
        )
    common.add_argument("--cpu-limit", type=float, default=120, help="CPU seconds a video, beside its length")
    common.add_argument("--memory-limit", type=float, default=4, help="GiB of memory a video (default: 4)")

    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Turn videos into WebDataset shards with a Parquet index."
    )
    sources = parser.add_subparsers(dest="source", required=True)
    tree = sources.add_parser("folder", parents=[common], help="a tree of video files")
    tree.add_argument("--videos", required=True, help="top of the tree")
    tree.add_argument("--labels-from-folders", action="store_true", help="first folder below the top = label")
    made = sources.add_parser("synthetic", parents=[common], help="rendered clips of labelled motion")
    made.add_argument("--num-videos", type=int, required=True)
    made.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    made.add_argument("--width", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--height", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--frames", type=int, default=40, help="pictures a clip (default: 40)")
    made.add_argument("--fps", type=int, default=25, help="pictures a second (default: 25)")
    return parser


def _read_inputs(arguments: argparse.Namespace) -> Inputs:
    if arguments.source == "folder":
        return folder.read(arguments.videos, arguments.labels_from_folders)
    return synthetic_inputs(arguments)


def synthetic_inputs(arguments: argparse.Namespace) -> Inputs:
    """The clips that the arguments of `synthetic` ask for."""
    for name, low in (
        ("num_videos", 1),
        ("seed", 0),
        ("width", 16),
        ("height", 16),
        ("frames", 2),
        ("fps", 1),
    ):
        if getattr(arguments, name) < low:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {low} is needed"
            )
    if arguments.width % 2 or arguments.height % 2:
        raise UserError(f"--width {arguments.width} --height {arguments.height}: both must be even")
    shape = {name: getattr(arguments, name) for name in ("width", "height", "frames", "fps")}
    clips = (
        synthetic.Clip(arguments.seed, arguments.split, index, **shape)
        for index in range(arguments.num_videos)
    )
    items = [
        Item(source=clip.source, clip=clip, label=clip.label, label_name=synthetic.CLASSES[clip.label])
        for clip in clips
    ]
    return Inputs(items, list(synthetic.CLASSES), {"source": "synthetic", "seed": arguments.seed, **shape})


def _shard_size(asked: int | None, inputs: int) -> int:
    if asked is None:
        return min(256, max(16, -(-inputs // 8)))  # small sets still make a few shards for loaders to share
    if asked < 1:
        raise UserError(f"--shard-size {asked}: at least 1 is needed")
    return asked


def run(arguments: argparse.Namespace) -> int:
    """Prepare one split; returns the exit code."""
    started = time.monotonic()
    if not re.fullmatch(r"[A-Za-z0-9_]+", arguments.split):
        raise UserError(f"--split {arguments.split!r}: letters, digits and underscores only")
    workers = arguments.workers if arguments.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    transcode = TranscodeSettings(
        **{name: getattr(arguments, name) for name in TranscodeSettings.model_fields}
    )
    storage = Storage(arguments.out)
    inputs = _read_inputs(arguments)
    shard_size = _shard_size(arguments.shard_size, len(inputs.items))
    settings = run_settings(inputs, transcode, shard_size, arguments.shuffle_seed)
    limits = Limits(arguments.cpu_limit, int(arguments.memory_limit * 2**30))
    with sole_writer(storage, arguments.split):
        manifest = existing(storage, arguments.split, settings)
        seconds = None
        if manifest is None:
            with LocalPool(workers, storage, arguments.split, transcode, limits) as pool:
                manifest = prepare(inputs, storage, arguments.split, settings, pool)
            seconds = time.monotonic() - started
    print(summary(storage, manifest, inputs, seconds))
    return 0 if manifest.samples else 1


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        _fail(f"--{flag} {first['input']}: {first['msg']}", 2)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error}; finished shards are kept: run the same command again once this is mended", 1)
    except KeyboardInterrupt:
        _fail("interrupted; finished shards are kept: the same command continues", 130)


if __name__ == "__main__":
    sys.exit(main())
