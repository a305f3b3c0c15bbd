"""Evaluate a classifier: `python -m arvideo_dist.evaluate SOURCE [--data PATH] [--views 5x3]`.

Scores of all views of a video are averaged. What is not given is taken from the run: its data set and held-out
split, its sampling, and a folder beside its checkpoints for the results.
"""

from __future__ import annotations

import argparse

from arvideo_dist.command import start_run
from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.of_run import begin, name_by_default
from arvideo_dist.storage import Storage
from arvideo_dist.train.trained import classifier_of

SEGMENT_VIEWS = "2x3"  # as VideoMAE evaluates SSv2


def main(argv: list[str] | None = None) -> None:
    start_run(EvaluateConfig, __doc__ or "", argv, of_source, add_source)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags that no configuration has."""
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
    given, source = begin(config, source, trained, "evaluations")
    if given["data"].get("sampling") == "segments":
        given.setdefault("evaluation", {}).setdefault("views", SEGMENT_VIEWS)
    given["model"] = model.model_dump() | {"init_from": source}
    views = given.get("evaluation", {}).get("views", config.evaluation.views)
    given["run"].setdefault("name", name_by_default(config, given, trained, "evaluation", views))
    return EvaluateConfig.model_validate(given)


if __name__ == "__main__":
    main()
