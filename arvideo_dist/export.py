"""Export what was trained: `python -m arvideo_dist.export RUN_OR_CHECKPOINT --format hf|safetensors|torch`."""

from __future__ import annotations

import argparse
import sys

from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.config.settings import exit_with
from arvideo_dist.model.classifier import Classifier
from arvideo_dist.model.interchange import export_classifier, export_encoder
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.trained import open_trained


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.export", description=__doc__)
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="folder or URI of a run (its newest complete checkpoint) or of one of its checkpoints",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "safetensors", "torch"),
        required=True,
        help="hf: a folder for transformers; safetensors: one file; torch: a .pth of the original repository",
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="hf: a VideoMAEForVideoClassification with a fresh head, not a VideoMAEModel",
    )
    parser.add_argument("--labels", type=int, metavar="N", help="classes of the head (400)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder or URI to write to (RUN/exports/CHECKPOINT-FORMAT)"
    )
    flags = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        print(export(flags.source, flags.format, flags.head, flags.labels, flags.out).uri)
    except ValueError as error:
        exit_with(error, 2)
    except CheckpointError as error:
        exit_with(error, 1)


def export(source: str, format: str, head: bool, labels: int | None, out: str | None) -> Storage:
    """Write the encoder of `source`, or its classifier if it was fine-tuned; the folder it stands in.

    Raises ValueError, CheckpointError.
    """
    if head and format != "hf":
        raise ValueError(f"--head belongs to --format hf, not {format}")
    if labels is not None and not head:
        raise ValueError("--labels belongs to --head")
    if labels is not None and labels < 1:
        raise ValueError(f"--labels {labels}: give the number of classes, 1 or more")
    trained = open_trained(source)
    name = f"{trained.checkpoint.name}-{format}{'-head' if head else ''}"
    to = Storage(out) if out else trained.run.child("exports").child(name)
    if isinstance(trained.config, FinetuneConfig):
        if head:
            raise ValueError(
                "--head makes a fresh head, and this run has trained its own, which is written with it"
            )
        names = trained.checkpoint.state["class_names"]
        module = trained.load_module()
        assert isinstance(module, Classifier)
        export_classifier(module, trained.config.model, to, format, names)  # type: ignore[arg-type]
        return to
    encoder, classes = trained.load_encoder(), (labels or 400) if head else None
    export_encoder(encoder, trained.config.model, to, format, classes)  # type: ignore[arg-type]
    return to


if __name__ == "__main__":
    main()
