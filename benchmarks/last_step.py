"""What it costs to learn the last step of a metric from MLflow: `python benchmarks/last_step.py --json FILE`.

A run's process asks for it once after each start and after each request that failed. Compared are reading the
metric's whole history, which the tracker did until 2026-11-28, and what it does now: each in a process of its own,
with a local sqlite database, CPU seconds and the growth of the largest resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from arvideo_dist.hardware import environment, write_json
from arvideo_dist.train.tracking.runs import Tracker

_BATCH = 1000  # the most that MLflow takes in a request
_METRICS = 14  # that a run logs at each point


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ask", nargs=3, metavar=("HOW", "URI", "RUN"), help="one measurement, as JSON")
    flags = parser.parse_args()
    if flags.ask:
        print(json.dumps(ask(*flags.ask)))
        return
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        run_id = fill(uri, flags.points)
        result = {"subject": "last step of a metric", **environment(), "points": flags.points}
        result["rounds"] = rounds = []
        for _ in range(flags.rounds):
            rounds.append({how: _in_a_process(how, uri, run_id) for how in ("history", "run")})
    for how in ("history", "run"):
        figures = {key: median(r[how][key] for r in rounds) for key in ("cpu_s", "wall_s", "mib")}
        result[how] = figures
        print(how, figures)
    assert {r[how]["last_step"] for r in rounds for how in r} == {flags.points}
    if flags.json:
        write_json(flags.json, result)


def fill(uri: str, points: int) -> str:
    """A run with `points` of one metric and the newest point of the others; its id.

    All but the newest points of the metric are written to MLflow's table at once: through its client they take
    minutes. The newest ones go through the client, which keeps the newest of all beside the table.
    """
    client = MlflowClient(tracking_uri=uri)
    run_id = client.create_run(client.create_experiment("benchmark")).info.run_id
    rows = [("loss/train", 1 / step, step, run_id, step, False) for step in range(1, points - _BATCH + 1)]
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        names = "key, value, timestamp, run_uuid, step, is_nan"
        database.executemany(f"INSERT INTO metrics ({names}) VALUES (?, ?, ?, ?, ?, ?)", rows)
    steps = range(points - _BATCH + 1, points + 1)
    client.log_batch(run_id, metrics=[Metric("loss/train", 1 / step, step, step) for step in steps])
    client.log_batch(run_id, metrics=[Metric(f"m{i}", 1.0, points, points) for i in range(_METRICS - 1)])
    return str(run_id)


def _in_a_process(how: str, uri: str, run_id: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--ask", how, uri, run_id]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def ask(how: str, uri: str, run_id: str) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments()  # connects, and imports what it needs
    before, cpu, began = _resident_mib(), time.process_time(), time.perf_counter()
    if how == "history":
        last = max(point.step for point in client.get_metric_history(run_id, "loss/train"))
    else:
        last = Tracker(uri, run_id, lambda: None)._last_steps_there()["loss/train"]
    return {
        "last_step": last,
        "cpu_s": round(time.process_time() - cpu, 3),
        "wall_s": round(time.perf_counter() - began, 3),
        "mib": round(_resident_mib() - before, 1),
    }


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
