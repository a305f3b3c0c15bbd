"""Export a run's encoder: `python -m arvideo_dist.export RUN_OR_CHECKPOINT --format hf|safetensors|torch`."""

from __future__ import annotations

import argparse
import sys

from arvideo_dist.config import DecoderConfig, ModelConfig
from arvideo_dist.interchange import export_encoder
from arvideo_dist.model.kinds import build_model
from arvideo_dist.settings import exit_with
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint import FOLDER, Checkpoint, CheckpointError, complete_checkpoints


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
    """Write the encoder of `source` and return the folder it stands in; ValueError, CheckpointError."""
    if head and format != "hf":
        raise ValueError(f"--head belongs to --format hf, not {format}")
    if labels is not None and not head:
        raise ValueError("--labels belongs to --head")
    if labels is not None and labels < 1:
        raise ValueError(f"--labels {labels}: give the number of classes, 1 or more")
    run, name = _find(source)
    checkpoint = Checkpoint(run, name)
    checkpoint.verify()
    model = ModelConfig.model_validate(checkpoint.state["config"]["model"])
    decoder = DecoderConfig.model_validate(checkpoint.state["config"]["decoder"])
    trained = build_model(model, decoder)
    checkpoint.load_weights(trained)
    to = Storage(out) if out else run.child("exports").child(f"{name}-{format}{'-head' if head else ''}")
    export_encoder(trained.encoder, model, to, format, (labels or 400) if head else None)  # type: ignore[arg-type]
    return to


def _find(source: str) -> tuple[Storage, str]:
    """The run and the name of the checkpoint that `source` names."""
    *above, folder, name = ["", "", *source.rstrip("/").split("/")]
    if folder == FOLDER:
        run = Storage("/".join(above[2:]) or ("/" if source.startswith("/") else "."))
        if name not in complete_checkpoints(run):
            raise ValueError(f"{source} is not a complete checkpoint; {run.uri} has {_listed(run)}")
        return run, name
    run = Storage(source)
    if not complete_checkpoints(run):
        raise ValueError(
            f"{source} has no complete checkpoint: give a run's folder or one of its checkpoints"
        )
    return run, complete_checkpoints(run)[-1]


def _listed(run: Storage) -> str:
    return ", ".join(complete_checkpoints(run)) or "none"


if __name__ == "__main__":
    main()
