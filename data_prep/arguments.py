"""What the command line of `python -m data_prep` takes, and what its values mean."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvideo_dist.storage import Storage
from data_prep import datasets, folder, lists, synthetic
from data_prep.errors import UserError
from data_prep.isolation import Limits
from data_prep.items import Computed, Inputs, Item
from data_prep.transcode import PROFILES, TranscodeSettings

Arguments = argparse.Namespace
_LEAST_MEMORY_GIB = 0.5  # of address space, of which ffmpeg takes a part before it reads anything


def _finite(text: str) -> float:
    """A number from the command line; argparse tells the user if this raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_finite.__name__ = "finite number"  # argparse's word for it


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
    run.add_argument("--cpu-limit", type=_finite, default=120, help="CPU seconds a video, beside its length")
    run.add_argument("--memory-limit", type=_finite, default=4, help="GiB of memory a video (default: 4)")
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


def parser() -> argparse.ArgumentParser:
    """Of all commands; those that prepare leave in `read` how their inputs are found."""
    top = argparse.ArgumentParser(
        prog="python -m data_prep", description="Turn videos into WebDataset shards with a Parquet index."
    )
    commands = top.add_subparsers(dest="command", required=True)
    common = _common()

    def source(name: str, text: str, read: Callable[[Arguments], Inputs]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(read=read)
        return sub

    tree = source("folder", "a tree of video files", _folder_inputs)
    tree.add_argument("--videos", required=True, help="top of the tree")
    tree.add_argument("--labels-from-folders", action="store_true", help="first folder below the top = label")
    made = source("synthetic", "rendered clips of labelled motion", _synthetic_inputs)
    made.add_argument("--num-videos", type=int, required=True)
    made.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    made.add_argument("--width", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--height", type=int, default=96, help="pixels (default: 96)")
    made.add_argument("--frames", type=int, default=40, help="pictures a clip (default: 40)")
    made.add_argument("--fps", type=int, default=25, help="pictures a second (default: 25)")
    made.add_argument(
        "--plain", action="store_true", help="grey behind all scenes, in place of a colour field"
    )

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
        type=_finite,
        default=0.0,
        help="movie second at which the files begin (15-minute cuts: 900)",
    )
    annotated(
        "list",
        "lists `path label`, as VideoMAE's",
        "the list",
        lambda given: lists.listed(given.annotations, given.videos, given.label_map),
    )
    _add_commands_that_read(commands)
    return top


def _add_commands_that_read(commands: Any) -> None:
    """`verify` and `stats`, which look at a data set that is finished. `commands`: argparse's sub-parsers."""
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


def _folder_inputs(arguments: Arguments) -> Inputs:
    out = Storage(arguments.out)
    if out.is_local and Path(out.path()).is_relative_to(Path(arguments.videos).expanduser().resolve()):
        raise UserError(
            f"--out {arguments.out} is inside --videos: what is written there would be found as input; choose "
            "a folder beside it"
        )
    return folder.read(arguments.videos, arguments.labels_from_folders)


def _synthetic_inputs(arguments: Arguments) -> Inputs:
    """The clips that the arguments of `synthetic` ask for."""
    least = {"num_videos": 1, "seed": 0, "width": 16, "height": 16, "frames": 2, "fps": 1}
    for name, low in least.items():
        value = getattr(arguments, name)
        if value < low:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {low} is needed")
    if arguments.width % 2 or arguments.height % 2:
        raise UserError(f"--width {arguments.width} --height {arguments.height}: both must be even")
    shape = {name: getattr(arguments, name) for name in ("width", "height", "frames", "fps")}
    if arguments.plain:  # named only then, so that a data set from before the flag goes on
        shape["plain"] = True

    def item(index: int) -> Item:
        clip = synthetic.Clip(arguments.seed, arguments.split, index, **shape)
        return Item(source=clip.source, clip=clip, label=clip.label, label_name=synthetic.CLASSES[clip.label])

    items = Computed(arguments.num_videos, item)
    return Inputs(items, list(synthetic.CLASSES), {"source": "synthetic", "seed": arguments.seed, **shape})


@dataclass(frozen=True)
class Options:
    """The values of a command that prepares a split, checked."""

    split: str
    workers: int
    transcode: TranscodeSettings
    limits: Limits
    asked_shard_size: int | None

    def shard_size(self, inputs: int) -> int:
        """Inputs a shard, if there are `inputs` of them."""
        # Small sets still make a few shards for loaders to share.
        return self.asked_shard_size or min(256, max(16, -(-inputs // 8)))


def options(given: Arguments) -> Options:
    """Raises UserError, or pydantic's ValidationError for what belongs to the encoding."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", given.split):
        raise UserError(f"--split {given.split!r}: letters, digits and underscores only")
    workers = given.workers if given.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    if given.shard_size is not None and given.shard_size < 1:
        raise UserError(f"--shard-size {given.shard_size}: at least 1 is needed")
    if given.cpu_limit < 1:
        raise UserError(f"--cpu-limit {given.cpu_limit:g}: at least 1 second is needed")
    if given.memory_limit < _LEAST_MEMORY_GIB:
        raise UserError(f"--memory-limit {given.memory_limit:g}: at least {_LEAST_MEMORY_GIB} GiB is needed")
    encoding = {name: getattr(given, name) for name in TranscodeSettings.model_fields}
    chosen = {name: value for name, value in encoding.items() if value is not None}
    return Options(
        given.split,
        workers,
        TranscodeSettings(**PROFILES[given.profile] | chosen),
        Limits(given.cpu_limit, int(given.memory_limit * 2**30)),
        given.shard_size,
    )
