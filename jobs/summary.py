"""What a pipeline ends with: a table of its evaluations, and one MLflow run above those of its stages."""

from __future__ import annotations

import json
import re
from typing import Any

from arvideo_dist.storage import Storage, shown
from jobs.compare import METRICS
from jobs.stages import Ledger, Pipeline

TABLE = "table.md"


def summarise(pipeline: Pipeline, ledger: Ledger) -> str:
    """The table as Markdown, which is also written to the pipeline's folder and logged in MLflow."""
    results = {}
    for stage in pipeline.stages:
        if stage.command == "evaluate":
            output = Storage(ledger.made[stage.name].output)
            results[stage.name] = json.loads(output.read_bytes("result.json"))
    text = table(results)
    (pipeline.folder / TABLE).write_text(text)
    try:
        _tell_mlflow(pipeline, ledger, results, text)
    except Exception as error:  # of whatever database or server: the stages have ended all the same
        text += f"\nMLflow has not been told: {shown(error)}\n"
    return text


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each evaluation, and for those that differ in the number at the end of their name the mean."""
    if not results:
        return "no stage evaluates anything\n"
    results = results | means(results)
    lines = [f"| stage | {' | '.join(METRICS)} | videos | bad views |", "|---" * (len(METRICS) + 3) + "|"]
    for name, result in results.items():
        shares = [f"{result[metric]:.2%}" if metric in result else "-" for metric in METRICS.values()]
        lines.append(
            f"| {name} | {' | '.join(shares)} | {result['videos']:.0f} | {result['bad_samples']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def means(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of `fold-1`, `fold-2`, ... the mean of each metric that all have, as `mean of fold`; numbers are summed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        if match := re.fullmatch(r"(.+)-\d+", name):
            groups.setdefault(match[1], []).append(result)
    found = {}
    for name, group in groups.items():
        if len(group) > 1:
            shared = [m for m in METRICS.values() if all(m in result for result in group)]
            found[f"mean of {name}"] = {m: sum(r[m] for r in group) / len(group) for m in shared} | {
                count: sum(r[count] for r in group) for count in ("videos", "bad_samples")
            }
    return found


def _tell_mlflow(pipeline: Pipeline, ledger: Ledger, results: dict[str, dict[str, Any]], text: str) -> None:
    """The runs of the stages become children of the pipeline's, which has the table and its figures."""
    children = [
        json.loads(Storage(ledger.made[stage.name].output).read_bytes("run.json"))
        for stage in pipeline.stages
        if stage.command != "data_prep"
    ]
    if not children:
        return
    from mlflow.tracking import MlflowClient  # seconds

    client = MlflowClient(tracking_uri=children[0]["tracking_uri"])
    parent = ledger.get("mlflow_run_id")
    if parent is None:
        experiment = client.get_run(children[0]["mlflow_run_id"]).info.experiment_id
        parent = client.create_run(experiment, run_name=pipeline.name).info.run_id
        ledger.set("mlflow_run_id", parent)
    for child in children:
        if child["tracking_uri"] == children[0]["tracking_uri"]:
            client.set_tag(child["mlflow_run_id"], "mlflow.parentRunId", parent)
    for name, result in (results | means(results)).items():
        for title, metric in METRICS.items():
            if metric in result:
                client.log_metric(parent, f"{name}/{title}", result[metric])
    client.log_text(parent, text, TABLE)
    client.set_terminated(parent, "FINISHED")
