"""Evaluate a classifier: `python -m arvideo_dist.evaluate SOURCE [--data PATH] [--views 5x3]`.

Scores of all views of a video are averaged. What is not given is taken from the run: its data set and held-out
split, its sampling, and a folder beside its checkpoints for the results.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from arvideo_dist.command import start_run
from arvideo_dist.config.commands import EvaluateConfig, FinetuneConfig
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.trained import classifier_of

SEGMENT_VIEWS = "2x3"  # as VideoMAE evaluates SSv2


def main(argv: list[str] | None = None) -> None:
    start_run(EvaluateConfig, __doc__ or "", argv, of_source, _add_source)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run of finetune (its newest checkpoint), one of its checkpoints, or a folder of transformers' "
        "VideoMAEForVideoClassification",
    )


def of_source(config: EvaluateConfig, flags: argparse.Namespace) -> EvaluateConfig:
    """The configuration with what the classifier at `flags.source` says. Raises ValueError if there is none."""
    if changed := config.model.model_fields_set:
        fields = ", ".join(f"model.{name}" for name in sorted(changed))
        raise ValueError(f"{fields}: the classifier says its own; leave these unset")
    source = Storage(flags.source).address
    model, trained = classifier_of(source)
    given: dict[str, dict[str, Any]] = {"data": {}, "run": {}, "tracking": {}}
    given |= config.model_dump(exclude_unset=True)
    name, own_path = "evaluation", None
    if trained is not None:
        name, own_path = trained.checkpoint.name, trained.finetuning.data.path
        source = trained.run.child(FOLDER).child(name).address
        _take_over(trained.finetuning, given)
        given["run"].setdefault("storage_path", trained.run.child("evaluations").address)
    if given["data"].get("sampling") == "segments":
        given.setdefault("evaluation", {}).setdefault("views", SEGMENT_VIEWS)
    given["model"] = model.model_dump() | {"init_from": source}
    split = given["data"].get("split", type(config.data).model_fields["split"].default)
    views = given.get("evaluation", {}).get("views", config.evaluation.views)
    other = ""
    if (path := given["data"].get("path")) is not None and own_path is not None and path != own_path:
        other = f"-{hashlib.sha256(path.encode()).hexdigest()[:8]}"  # another data set has another folder
    given["run"].setdefault("name", f"{name}-{split}-{views}{other}")
    return EvaluateConfig.model_validate(given)


def _take_over(trained: FinetuneConfig, given: dict[str, dict[str, Any]]) -> None:
    """What the configuration of a run says of its data and of MLflow, if it is not `given`."""
    from arvideo_dist.train.tracking.runs import tracking_uri

    own, data = trained.data, given["data"]
    if data.get("path", own.path) == own.path:
        data.setdefault("path", own.path)
        data.setdefault("split", own.val_split or own.split)
    data.setdefault("sampling", own.sampling)
    if data["sampling"] == own.sampling == "window":
        data.setdefault("stride", own.stride)
    if "uri" not in given["tracking"]:
        given["tracking"]["uri"] = tracking_uri(trained)
    given["tracking"].setdefault("experiment", trained.tracking.experiment)


if __name__ == "__main__":
    main()
