"""What commands that measure a trained model take from its run, and where their results lie by default."""

from __future__ import annotations

import hashlib
from typing import Any

from arvideo_dist.config.commands import SequenceConfig, TrainingConfig
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.trained import Trained

Given = dict[str, dict[str, Any]]


def begin(config: SequenceConfig, source: str, trained: Trained | None, results: str) -> tuple[Given, str]:
    """What is set in `config`, completed by what the run of `trained` says; and the address of the weights.

    `trained`: what stands at `source`, None if that is no run. `results`: folder of the run for the results.
    """
    given: Given = {"data": {}, "run": {}, "tracking": {}}
    given |= config.model_dump(exclude_unset=True)
    if trained is None:
        return given, Storage(source).address
    _take_over(trained.config, given)
    given["run"].setdefault("storage_path", trained.run.child(results).address)
    return given, trained.run.child(FOLDER).child(trained.checkpoint.name).address


def name_by_default(
    config: SequenceConfig, given: Given, trained: Trained | None, alone: str, *choices: str
) -> str:
    """A folder's name: checkpoint (without a run: `alone`), split, `choices`, and the data set if not the run's."""
    parts = [alone if trained is None else trained.checkpoint.name]
    parts += [given["data"].get("split", config.data.split), *choices]
    path = given["data"].get("path")
    if trained is not None and path is not None and trained.config.data.path not in (None, path):
        parts.append(hashlib.sha256(path.encode()).hexdigest()[:8])
    return "-".join(parts)


def _take_over(trained: TrainingConfig, given: Given) -> None:
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
