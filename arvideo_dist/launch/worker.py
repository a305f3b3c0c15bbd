"""What each Ray Train worker runs: one rank of a run."""

from __future__ import annotations

import contextlib
import datetime
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

from arvideo_dist.config.commands import ROOTS, RunConfig, SequenceConfig
from arvideo_dist.launch.cluster import collective_timeout_s
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import Derived, Viewed
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint import seen
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.health.heartbeat import Heartbeat
from arvideo_dist.train.health.monitor import Beat, Order, seconds_between_beats
from arvideo_dist.train.run.stop import Interruption, RunStoppedError, Stopped

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo


def work(payload: dict[str, Any]) -> Interruption | Stopped | None:
    """Runs in every Ray Train worker, with the process group up; the driver gets what rank 0 returns."""
    import torch.distributed as dist

    root: Any = ROOTS[payload["command"]]
    config, guard = root.model_validate(payload["config"]), payload["lease"]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} workers have started", flush=True)
    with heartbeat(payload["monitor"], guard.storage(), config.run.hung_s, payload["workers"]):
        try:
            return _work(config, payload)
        except RunStoppedError as error:  # returning is what keeps the driver from a restart
            return Stopped.because(error)


def _work(config: RunConfig, payload: dict[str, Any]) -> Interruption | None:
    import torch.distributed as dist
    from ray.train.torch import get_device

    activity.alone("imports libraries")
    from arvideo_dist.checks.start import check_workers_start
    from arvideo_dist.train.compose import train
    from arvideo_dist.train.health.pulse import Pulse
    from arvideo_dist.train.run.watch import Watch
    from arvideo_dist.train.sequence import run_sequence

    # They warn of DeepSpeed's calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    activity.together("connects to the other ranks")
    timeout = datetime.timedelta(seconds=collective_timeout_s(config))
    control = dist.new_group(backend="gloo", timeout=timeout)
    trains = not isinstance(config, SequenceConfig)
    numbers: Any = Derived if trains else Viewed
    assignment: Any = Assignment(
        config=config,
        derived=numbers(**payload["derived"]),
        tracking_uri=payload["tracking_uri"],
        mlflow_run_id=payload["mlflow_run_id"],
        lease=payload["lease"],
        seen=payload["seen"],
    )
    watch = Watch(assignment.lease, control, preemption_notice, payload["workers"])
    activity.together("looks for the run's checkpoints")
    seen.look_from_all_ranks(assignment.lease, assignment.seen, control)
    activity.together("checks its machine")
    check_workers_start(assignment.config, assignment.derived, assignment.lease, control)
    tracker: Any = contextlib.nullcontext()
    pulse: Any = contextlib.nullcontext()
    if dist.get_rank() == 0:
        pulse = Pulse(activity, functools.partial(print, flush=True))
        # MLflow, whose memory and time no other rank needs.
        from arvideo_dist.train.tracking.outbox import QueuedTracker
        from arvideo_dist.train.tracking.runs import Tracker

        to_mlflow = Tracker(assignment.tracking_uri, assignment.mlflow_run_id, assignment.lease.check)
        tracker = QueuedTracker(to_mlflow, assignment.lease.storage())
    with pulse, tracker as queue:
        return (train if trains else run_sequence)(assignment, device, control, watch, queue)


def heartbeat(monitor: Any, run: Storage, hung_s: float, workers: str) -> Heartbeat:
    """Of this rank, to the actor `monitor` (`hangs.py`)."""
    import ray

    timeout = max(5.0, seconds_between_beats(hung_s))

    def tell(beat: Beat) -> Order | None:
        order: Order | None = ray.get(monitor.beat.remote(beat), timeout=timeout)
        return order

    return Heartbeat(tell, run, hung_s, workers, ray.get_runtime_context().get_node_id())


def preemption_notice() -> list[int] | None:
    """Ranks on nodes of which Ray Train has told this worker that they are about to go; to look costs nothing.

    `ray.train.get_preemption_info` gives rank 0's to all, but there all wait for each other in an actor that serves
    1000 calls at a time: of more ranks none would ever return.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    notice = get_train_context().preemption_context.preemption_info
    return None if notice is None else ranks_of(notice)


def ranks_of(notice: PreemptionInfo) -> list[int]:
    """The ranks on the nodes that are about to go."""
    return sorted(rank for ranks in notice.preempted_node_to_ranks.values() for rank in ranks)
