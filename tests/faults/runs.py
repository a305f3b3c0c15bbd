"""Runs that a fault is done to, and what holds afterwards whatever the fault was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from arvideo_dist.storage import Storage
from arvideo_dist.train.samples.audit import applied_places
from tests.services.mlflow_server import new_database
from tests.train.runs import TINY, PretrainProcess, write_config

STEPS = 60
SAVE_EVERY = 8
# Where a fault is done: five steps after a checkpoint, so that there is something to replay.
FAULT_AT = rf"step 13/{STEPS}"
GLOBAL_BATCH = 16
METRICS = ("loss/train", "gradient_norm", "learning_rate", "loss/val")


@dataclass(frozen=True)
class Layout:
    """Workers and ZeRO stage of a run."""

    workers: int
    stage: int

    def __str__(self) -> str:
        return f"{self.workers}-workers-zero{self.stage}"


LAYOUTS = [Layout(2, 1), Layout(3, 2), Layout(4, 3)]


@dataclass
class Run:
    """One training run, whatever number of commands it takes."""

    name: str
    layout: Layout
    config: Path
    storage: str  # run.storage_path
    tracking: str  # address of its MLflow
    steps: int
    seconds: float = 0.0  # of all its commands
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def folder(self) -> Storage:
        return Storage(self.storage).child(self.name)

    def start(self, *arguments: str) -> Command:
        return Command(self, ["--config", str(self.config), *arguments])

    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.tracking)

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Every point (step, value) of METRICS in the one MLflow run of this name, in the order of steps."""
        client = self.client()
        found = client.get_experiment_by_name("arvideo")
        assert found is not None
        runs = client.search_runs([found.experiment_id], f"attributes.run_name = '{self.name}'")
        assert len(runs) == 1, f"one MLflow run of name {self.name}"
        assert runs[0].info.status == "FINISHED"
        return {
            metric: sorted((p.step, p.value) for p in client.get_metric_history(runs[0].info.run_id, metric))
            for metric in METRICS
        }


class Command(PretrainProcess):
    """One `pretrain` of a run; its time counts as the run's."""

    def __init__(self, run: Run, arguments: list[str]) -> None:
        self._run, self._began = run, time.monotonic()
        super().__init__(arguments)

    def finish(self) -> int:
        code = super().finish()
        self._run.seconds += time.monotonic() - self._began
        return code


def write_run(
    folder: Path,
    data: str,
    name: str,
    layout: Layout,
    *,
    storage: str | None = None,
    tracking: str | None = None,
    steps: int = STEPS,
    save_every: int = SAVE_EVERY,
    **sections: dict[str, Any],
) -> Run:
    """A run on `data`; `sections` are laid over its configuration."""
    storage = storage or str(folder / "runs")
    tracking = tracking or new_database(folder / f"mlflow-{name}.db")
    base: dict[str, dict[str, Any]] = {
        "run": {
            "name": name,
            "storage_path": storage,
            "checkpoint_every_steps": save_every,
            "audit": True,
        },
        "data": {**TINY["data"], "path": data},
        "train": {
            **TINY["train"],
            "steps": steps,
            "global_batch": GLOBAL_BATCH,
            "zero_stage": layout.stage,
        },
        "validation": {"every_steps": steps // 2, "max_clips": 16},
        "cluster": {"workers": layout.workers, "device": "cpu"},
        "tracking": {"uri": tracking},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    config = write_config(folder / f"{name}.yaml", **merged)
    return Run(name, layout, config, storage, tracking, steps)


def check_nothing_was_lost(run: Run, whole: Run) -> None:
    """Each place once in the weights, the losses of an uninterrupted run to the bit, each step logged once."""
    assert applied_places(run.folder) == {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, run.steps + 1)
    }
    points = run.history()
    assert [step for step, _ in points["loss/train"]] == list(range(1, run.steps + 1))
    for metric in METRICS:
        assert points[metric] == whole.points[metric], metric


Fault = Callable[[Command], None]
