"""What the driver gives to every worker of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from arvideo_dist.config.commands import RunConfig
from arvideo_dist.tasks.derived import Workload
from arvideo_dist.train.run.lease import Guard

Config = TypeVar("Config", bound=RunConfig)
Numbers = TypeVar("Numbers", bound=Workload)


@dataclass(frozen=True)
class Assignment(Generic[Config, Numbers]):
    """The same for all workers of a set."""

    config: Config
    derived: Numbers
    tracking_uri: str
    mlflow_run_id: str
    lease: Guard
    seen: int = 0  # the newest step of which anybody saw a checkpoint of the run
