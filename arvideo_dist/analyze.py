"""Look into a model: `python -m arvideo_dist.analyze attention-rank|reconstruct|order ...`."""

from __future__ import annotations

import argparse

from arvideo_dist.analysis import subjects
from arvideo_dist.analysis.results import NotLoggedError, write_results
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.settings import exit_with, read_config
from arvideo_dist.data.reader import DataReadError
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.trained import open_trained

SOURCE = "folder or URI of a run (its newest complete checkpoint) or of one of its checkpoints"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.analyze", description=__doc__)
    parser.add_argument("subject", choices=_SUBJECTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`SUBJECT --help` lists them")
    flags = parser.parse_args(argv)
    own = argparse.ArgumentParser(prog=f"{parser.prog} {flags.subject}")
    own.add_argument(
        "--out", metavar="FOLDER", default="build/analysis", help="folder or URI (build/analysis)"
    )
    own.add_argument(
        "--no-mlflow", action="store_true", help="do not log the files with the MLflow runs of the given runs"
    )
    try:
        found, chosen = _SUBJECTS[flags.subject](own, flags.arguments)
        runs = [] if chosen.no_mlflow else found.runs
        print("\n".join([found.text, *write_results(found.files, Storage(chosen.out), runs)]))
    except ValueError as error:
        exit_with(error, 2)
    except (CheckpointError, DataReadError, NotLoggedError) as error:
        exit_with(error, 1)


def _attention_rank(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[subjects.Found, argparse.Namespace]:
    parser.description = (
        "rank of each layer's attention maps, several encoders in one plot (the paper's Figure 3)"
    )
    parser.add_argument(
        "sources",
        metavar="CHECKPOINT",
        nargs="+",
        help=f"{SOURCE}; a folder of transformers; or a file of encoder weights",
    )
    parser.add_argument("--tolerance", type=float, help="relative to the largest singular value (L x 1.2e-7)")
    flags = _with_clips(parser, argv, clips=8)
    data = subjects.Clips(flags.data, flags.split, flags.stride, flags.clips)
    return subjects.attention_rank(flags.sources, data, flags.tolerance), flags


def _reconstruct(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[subjects.Found, argparse.Namespace]:
    parser.description = (
        "what a pretraining model predicts, step by step: pictures and an animation of each clip"
    )
    parser.add_argument("source", metavar="CHECKPOINT", help=SOURCE)
    flags = _with_clips(parser, argv, clips=4)
    data = subjects.Clips(flags.data, flags.split, flags.stride, flags.clips)
    return subjects.reconstruct(open_trained(flags.source), data), flags


def _order(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[subjects.Found, argparse.Namespace]:
    parser.description = (
        "clusters and prediction orders of a run (RUN as the first argument) or of a configuration (settings)"
    )
    if argv and not argv[0].startswith("-"):
        parser.add_argument("source", metavar="RUN", help=SOURCE)
        flags = parser.parse_args(argv)
        trained = open_trained(flags.source)
        return subjects.order(trained.pretraining, [trained.run]), flags
    config, flags = read_config(PretrainConfig, argv, parser)
    return subjects.order(config, []), flags


def _with_clips(parser: argparse.ArgumentParser, argv: list[str], clips: int) -> argparse.Namespace:
    parser.add_argument("--data", metavar="PATH", help="data set made by data_prep (the run's own)")
    parser.add_argument("--split", help="its split (the run's validation split)")
    parser.add_argument("--stride", type=_positive, help="source frames between a clip's frames (the run's)")
    parser.add_argument("--clips", type=_positive, default=clips, help=f"the first N of the split ({clips})")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 1")
    return int(text)


_SUBJECTS = {"attention-rank": _attention_rank, "reconstruct": _reconstruct, "order": _order}

if __name__ == "__main__":
    main()
