"""Command line: `python -m data_prep SOURCE ... --out DIR --split NAME`, `verify`, `stats`."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from arvideo_dist.storage import Storage
from data_prep import datasets, folder, synthetic
from data_prep.errors import UserError
from data_prep.isolation import Limits
from data_prep.items import Inputs, Item
from data_prep.prepare import prepare, run_settings, sole_writer, summary
from data_prep.transcode import PROFILES, TranscodeSettings
from data_prep.worker import LocalPool

Arguments = argparse.Namespace


def _common() -> argparse.ArgumentParser:
    """What all sources take."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="output folder, local or s3://bucket/folder")
    common.add_argument("--split", default="train", help="name of the split (default: train)")
    common.add_argument("--shard-size", type=int, help="inputs a shard (default: an eighth, 16 to 256)")
    common.add_argument("--shuffle-seed", type=int, default=0, help="of the order of inputs (default: 0)")
    common.add_argument(
        "--retry-rejects",
        action="store_true",
        help="try the rejects of a finished split again; adds shards",
    )
    run = common.add_argument_group("running")
    run.add_argument("--workers", type=int, help="videos at a time on this machine (default: CPU cores)")
    run.add_argument("--ray-address", help="run as Ray tasks on this cluster instead: its address, or auto")
    run.add_argument("--cpu-limit", type=float, default=120, help="CPU seconds a video, beside its length")
    run.add_argument("--memory-limit", type=float, default=4, help="GiB of memory a video (default: 4)")
    encoding = common.add_argument_group("encoding (default: as the profile says)")
    encoding.add_argument(
        "--profile", choices=sorted(PROFILES), default="droppable", help="(default: droppable)"
    )
    for name, info in TranscodeSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if info.annotation is bool:
            encoding.add_argument(flag, action="store_const", const=True, help=info.description)
        else:
            text = f"{info.description} (droppable: {info.default})"
            encoding.add_argument(flag, type=type(info.default), help=text)
    return common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Turn videos into WebDataset shards with a Parquet index."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = _common()

    def source(name: str, text: str, read: Callable[[Arguments], Inputs]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(read=read)
        return sub

    tree = source(
        "folder",
        "a tree of video files",
        lambda given: folder.read(given.videos, given.labels_from_folders),
    )
    tree.add_argument("--videos", required=True, help="top of the tree")
    tree.add_argument("--labels-from-folders", action="store_true", help="first folder below the top = label")
    made = source("synthetic", "rendered clips of labelled motion", synthetic_inputs)
    made.add_argument("--num-videos", type=int, required=True)
    made.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    made.add_argument("--width", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--height", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--frames", type=int, default=40, help="pictures a clip (default: 40)")
    made.add_argument("--fps", type=int, default=25, help="pictures a second (default: 25)")

    def annotated(
        name: str, text: str, what: str, read: Callable[[Arguments], Inputs]
    ) -> argparse.ArgumentParser:
        sub = source(name, text, read)
        sub.add_argument("--annotations", required=True, help=what)
        sub.add_argument("--videos", required=name != "list", help="folder of the videos, searched whole")
        if name != "hmdb51":
            sub.add_argument("--label-map", help="file that numbers the labels")
        return sub

    for name in datasets.KINETICS_LABELS:
        annotated(
            name,
            f"Kinetics-{name.removeprefix('kinetics')}",
            "the publishers' CSV",
            lambda given: datasets.kinetics(given.command, given.annotations, given.videos, given.label_map),
        )
    ssv2 = annotated(
        "ssv2",
        "Something-Something V2",
        "the publishers' JSON",
        lambda given: datasets.ssv2(given.annotations, given.videos, given.label_map, given.answers),
    )
    ssv2.add_argument("--answers", help="the test set's `id;label` CSV")
    hmdb51 = annotated(
        "hmdb51",
        "HMDB51",
        "folder of the official split files",
        lambda given: datasets.hmdb51(given.annotations, given.videos, given.fold, given.split),
    )
    hmdb51.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="official split (default: 1)")
    ava = annotated(
        "ava",
        "AVA actions: boxes go into the samples' JSON",
        "the publishers' box CSV",
        lambda given: datasets.ava(given.annotations, given.videos, given.label_map, given.video_start),
    )
    ava.add_argument(
        "--video-start",
        type=float,
        default=0.0,
        help="movie second at which the files begin (15-minute cuts: 900)",
    )
    annotated(
        "list",
        "lists `path label`, as VideoMAE's",
        "the list",
        lambda given: datasets.listed(given.annotations, given.videos, given.label_map),
    )
    check = commands.add_parser("verify", help="read a finished data set again and check all it promises")
    look = commands.add_parser("stats", help="figures and pictures of what a data set holds")
    for sub in (check, look):
        sub.add_argument("out", help="the data set's folder, local or s3://bucket/folder")
        sub.add_argument("--split", help="one split (default: all that are there)")
    check.add_argument(
        "--decode", default="16", help="samples of each split to decode: a number or all (default: 16)"
    )
    check.add_argument("--workers", type=int, default=2, help="shards at a time (default: 2)")
    check.add_argument("--report", help="write the report as JSON to this file")
    return parser


def _splits(storage: Storage, asked: str | None) -> list[str]:
    if asked:
        return [asked]
    stems = (re.fullmatch(r"dataset-(\w+)\.json", name) for name in storage.names())
    splits = [stem[1] for stem in stems if stem]
    if not splits:
        raise UserError(f"{storage.uri} holds no finished split (dataset-<split>.json)")
    return splits


def run_verify(arguments: Arguments) -> int:
    """Check splits; 0 where every promise holds, 1 where not."""
    from data_prep.verify import verify

    if arguments.decode != "all" and not arguments.decode.isdigit():
        raise UserError(f"--decode {arguments.decode}: a number or all")
    storage = Storage(arguments.out)
    decode = None if arguments.decode == "all" else int(arguments.decode)
    reports = [
        verify(storage, split, decode, arguments.workers) for split in _splits(storage, arguments.split)
    ]
    for report in reports:
        for problem in report.problems[:50]:
            print(f"{report.split}: {problem}")
        if len(report.problems) > 50:
            print(f"{report.split}: ... and {len(report.problems) - 50} more (--report FILE has all)")
        read = f"{report.shards} shards, {report.samples} samples, {report.decoded} decoded"
        print(f"{report.split}: {read}: {len(report.problems) or 'no'} problem(s)")
    if arguments.report:
        Path(arguments.report).write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.problems for report in reports) else 0


def run_stats(arguments: Arguments) -> int:
    """Print the figures of splits and write their pictures."""
    from data_prep.stats import stats

    storage = Storage(arguments.out)
    for split in _splits(storage, arguments.split):
        print(stats(storage, split))
    return 0


def synthetic_inputs(arguments: Arguments) -> Inputs:
    """The clips that the arguments of `synthetic` ask for."""
    least = {"num_videos": 1, "seed": 0, "width": 16, "height": 16, "frames": 2, "fps": 1}
    for name, low in least.items():
        value = getattr(arguments, name)
        if value < low:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {low} is needed")
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


def _transcode_settings(arguments: Arguments) -> TranscodeSettings:
    given = {name: getattr(arguments, name) for name in TranscodeSettings.model_fields}
    return TranscodeSettings(
        **PROFILES[arguments.profile] | {name: value for name, value in given.items() if value is not None}
    )


def run(arguments: Arguments) -> int:
    """Prepare one split; returns the exit code."""
    started = time.monotonic()
    if not re.fullmatch(r"[A-Za-z0-9_]+", arguments.split):
        raise UserError(f"--split {arguments.split!r}: letters, digits and underscores only")
    workers = arguments.workers if arguments.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    transcode = _transcode_settings(arguments)
    limits = Limits(arguments.cpu_limit, int(arguments.memory_limit * 2**30))
    storage = Storage(arguments.out)
    inputs = arguments.read(arguments)
    settings = run_settings(
        inputs, transcode, _shard_size(arguments.shard_size, len(inputs.items)), arguments.shuffle_seed
    )

    def executor() -> AbstractContextManager[Any]:
        if arguments.ray_address:
            from data_prep.cluster import RayPool  # Ray takes a second to import

            return RayPool(arguments.ray_address, storage, arguments.split, transcode, limits)
        return LocalPool(workers, storage, arguments.split, transcode, limits)

    with sole_writer(storage, arguments.split):
        manifest, worked = prepare(
            inputs, storage, arguments.split, settings, executor, arguments.retry_rejects
        )
    print(summary(storage, manifest, inputs.remarks, time.monotonic() - started if worked else None))
    return 0 if manifest.samples else 1


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return {"verify": run_verify, "stats": run_stats}.get(arguments.command, run)(arguments)
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
