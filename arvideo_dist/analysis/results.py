"""Where an analysis goes: a folder, and the MLflow runs of the training runs that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arvideo_dist.storage import Storage

ARTIFACTS = "analysis"  # folder of the MLflow run's artifacts


class NotLoggedError(RuntimeError):
    """The files are written, but not logged."""


def write_results(files: Mapping[str, bytes], out: Storage, runs: Sequence[Storage]) -> list[str]:
    """Write `files` (content by name) into `out` and log them with the MLflow run of each of `runs`, which are
    training runs' folders. Returns where they went, a line each.

    Raises NotLoggedError, once all is written, if an MLflow run cannot be reached.
    """
    for name, content in files.items():
        out.write_bytes(name, content)
    lines = [f"{out.uri}/{name}" for name in files]
    if runs:
        from arvideo_dist.train.tracking.runs import tracker_of  # MLflow takes seconds to import

        for run in {run.uri: run for run in runs}.values():
            try:
                tracker = tracker_of(run)
            except ValueError as error:
                raise NotLoggedError(
                    f"{error}. The files are written all the same: {', '.join(lines)}; --no-mlflow logs nothing"
                ) from error
            for name, content in files.items():
                tracker.log_bytes(f"{ARTIFACTS}/{name}", content)
            lines.append(f"logged with the MLflow run of {run.uri}, folder {ARTIFACTS}/")
    return lines
