"""From a configuration to training workers: checks, Ray, Ray Train, and what the terminal shows at the end."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from arvideo_dist.checks.cluster import worker_resources
from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.config.sources import data_sets
from arvideo_dist.data.index import manifest_name
from arvideo_dist.launch.cluster import collective_timeout_s, connect, use_gpu_of
from arvideo_dist.launch.hangs import HangWatch
from arvideo_dist.launch.nodes import Room
from arvideo_dist.launch.preemption import POLL_S, Background, Signals, stop_if_asked, wait_to_restart
from arvideo_dist.launch.worker import work
from arvideo_dist.storage import lasts, patiently, shown
from arvideo_dist.tasks.derived import Workload
from arvideo_dist.train.checkpoint import seen
from arvideo_dist.train.checkpoint.layout import FOLDER, checkpoint_name, newest_step
from arvideo_dist.train.run.lease import Lease
from arvideo_dist.train.run.stop import (
    RESULT,
    Interruption,
    RunInterruptedError,
    Stopped,
    StoreAwayError,
)

_LEAVING = threading.Lock()


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    metrics: dict[str, float]
    run_folder: str
    checkpoint: str
    mlflow_run_id: str


def launch(config: RunConfig, derived: Workload, lease: Lease, signals: Signals) -> Finished:
    """Run the training on Ray under `lease` and return when it has ended.

    Raises RunStoppedError if the run stopped itself, RunInterruptedError if a signal asked it to end,
    LeaseLostError if another driver took the run, CrashLoopError if workers are lost again and again,
    ValueError if the cluster can never hold them.
    """
    # Read as Ray is imported. Else a thread that still calls Ray after the run has left it would start another Ray.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # MLflow takes seconds to import: after all checks.
    from arvideo_dist.train.tracking import runs as tracking

    run = lease.guard.storage()
    patiently(lease.guard.check)  # else a run that has one would be given a second MLflow run
    run_id = tracking.open_run(config, asdict(derived), run)
    status = "FAILED"
    try:
        uri, grace_s = tracking.tracking_uri(config), config.run.preemption_grace_s
        signals.watch_over(lambda: _fit(config, derived, uri, run_id, lease), lease, grace_s)
        patiently(lease.guard.check)  # else the result below may be another driver's
        result = json.loads(patiently(lambda: run.read_bytes(RESULT)))
        status = "FINISHED"
    except RunInterruptedError:
        status = "KILLED"
        raise
    finally:
        _leave_ray()  # which also ends the workers that did not save in time
        _close(config, run_id, status, lease)
    return Finished(
        metrics=result,
        run_folder=run.uri,
        checkpoint=f"{run.uri}/{FOLDER}/{checkpoint_name(patiently(lambda: newest_step(run)))}",
        mlflow_run_id=run_id,
    )


def _close(config: RunConfig, run_id: str, status: str, lease: Lease) -> None:
    """Set the status in MLflow, unless another driver has the run: then it is that one's to set."""
    from arvideo_dist.train.tracking import outbox
    from arvideo_dist.train.tracking import runs as tracking

    try:
        is_ours = lease.is_held()
    except OSError as error:  # said only: how the run ended is not to be hidden by it
        print(
            f"{lease.guard.run_uri} does not tell whether this run is still ours: {error}\nthe status {status} of "
            f"MLflow's run {run_id} is not set; the same command, given again, sets it",
            flush=True,
        )
        return
    if is_ours:
        tracking.close_run(config, run_id, status)
        outbox.say_unsent(lease.guard.storage())


def _fit(config: RunConfig, derived: Workload, uri: str, run_id: str, lease: Lease) -> None:
    """One set of workers after another until the run has ended.

    Ray Train restarts none of them. What is lost starts again here, since only a checkpoint tells progress from a
    crash loop: over weeks any number of machines may be lost.
    """
    import ray.train

    from arvideo_dist.launch.restarts import Restarts, cause_of, uncounted
    from arvideo_dist.train.tracking.runs import tracker_of

    api: Any = ray.train
    run = run_folder(config)
    restarts, patience = Restarts(config.run.max_restarts, run.uri), seen.Patience()
    connect(config)
    try:
        # Once: if all GPU nodes are gone later, new workers wait for a GPU instead of falling back to CPUs.
        use_gpu = use_gpu_of(config, ray.cluster_resources())
        with (
            Room(config, use_gpu, lease.guard.name) as room,
            HangWatch(config.run.hung_s, lease.guard, lambda *tag: tracker_of(run).tag(*tag)) as hangs,
        ):
            payload = {
                "command": config.command,
                "config": config.model_dump(mode="json"),
                "derived": asdict(derived),
                "tracking_uri": uri,
                "mlflow_run_id": run_id,
                "lease": lease.guard,
                "monitor": hangs.monitor,
            }
            while True:
                _hear_of_checkpoints(uri, run_id, lease)
                _newest_once_stores_answer(config, lease)
                number = room.wait(lambda: stop_if_asked(lease))
                payload["workers"], payload["seen"] = hangs.new_workers(), lease.saw(0)
                try:
                    interruption = _fit_once(config, payload, lease, hangs, room, number, use_gpu)
                except (api.TrainingFailedError, ray.exceptions.RayActorError) as error:
                    stop_if_asked(lease)
                    if (line := uncounted(error)) is not None:
                        print(line, flush=True)
                        continue
                    cause = hangs.reason() or cause_of(error)
                    line, pause = restarts.lost(cause, _newest_once_stores_answer(config, lease))
                    print(line, flush=True)
                    wait_to_restart(lease, pause)
                    continue
                except StoreAwayError as error:
                    patience.left_again(error, lease.saw(0))
                    wait_to_restart(lease, seen.PAUSE_S)
                    continue
                if interruption is None:
                    return
                print(f"interrupted after step {interruption.step}: {interruption.reason}", flush=True)
                if not interruption.goes_on:
                    raise RunInterruptedError(
                        f"{interruption.reason}: the run is saved up to step {interruption.step}; the same "
                        "command continues it"
                    )
    except Exception:
        with contextlib.suppress(OSError):
            lease.guard.check()  # workers without their lease fail in many ways; this names the one reason
        raise
    finally:
        # Here and not in the main thread alone: a Ray that was started here dies with the thread that started it.
        _leave_ray()


def _leave_ray() -> None:
    import ray

    with _LEAVING:  # if a run is given up, both threads come here
        ray.shutdown()


def _hear_of_checkpoints(uri: str, run_id: str, lease: Lease) -> None:
    """Hear of the newest checkpoint that the workers told MLflow of: the lease's heartbeat may not have seen it."""
    from arvideo_dist.train.tracking import runs as tracking

    lease.saw(tracking.newest_checkpoint_of(uri, run_id, seen.CHECKPOINT_TAG))


def _newest_once_stores_answer(config: RunConfig, lease: Lease) -> str | None:
    """The name of the newest complete checkpoint of a run that is still ours; waits for a store of run or data that
    is away, or that shows less than was seen there, since new workers would need it too.

    OSError if it stays away for an hour or if time alone does not mend it; LeaseLostError and
    RunInterruptedError as soon as the lease is known to be lost or the run is asked to stop.
    """
    run, until, said = run_folder(config), time.monotonic() + seen.AWAY_S, False
    while True:
        try:
            lease.guard.check()
            newest = newest_step(run)
            seen.look(run, lease.saw(newest))
            for storage, split in data_sets(config.data):
                if not storage.exists(name := manifest_name(split)):
                    raise OSError(f"{storage.uri} has no {name} any more: is its mount there?")
            return checkpoint_name(newest) if newest else None
        except OSError as error:
            if lasts(error) or time.monotonic() + seen.PAUSE_S > until:
                raise
            if not said:
                minutes = seen.AWAY_S / 60
                print(
                    f"new workers wait for storage, for up to {minutes:g} minutes: {shown(error)}", flush=True
                )
                said = True
        wait_to_restart(lease, seen.PAUSE_S)


def _fit_once(
    config: RunConfig,
    payload: dict[str, Any],
    lease: Lease,
    hangs: HangWatch,
    room: Room,
    number: int,
    use_gpu: bool,
) -> Interruption | None:
    """One set of `number` workers, from its start to its end."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    api: Any = ray.train  # Ray Train V2; what a type checker sees there is V1
    trainer: Any = TorchTrainer(
        work,  # type: ignore[arg-type]
        train_loop_config=payload,
        scaling_config=api.ScalingConfig(
            num_workers=number,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(config, use_gpu),
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=collective_timeout_s(config)
        ),
        run_config=api.RunConfig(
            # Ray's own bookkeeping; what a restart continues from are the run's checkpoints alone.
            name=datetime.datetime.now(datetime.UTC).strftime("attempt-%Y%m%dT%H%M%S"),
            storage_path=run_folder(config).child("ray").address,
            # Of lost workers, also of such as never came up, `_fit` decides.
            failure_config=api.FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    fitting = Background(trainer.fit, "Ray Train")
    widening = room.widening(number)
    while not fitting.done.wait(POLL_S):
        if lease.stop_reason and not hangs.have_begun():
            stop_if_asked(lease)  # there is nothing to save, and until they begin they would hear nothing
        if (wider := widening.due(time.monotonic())) is not None:
            print(
                f"the cluster has room for {wider} workers: the {number} that run save and make way",
                flush=True,
            )
            lease.ask_to_widen(payload["workers"])
    result = fitting.result().return_value
    if isinstance(result, Stopped):
        raise result.error()
    return result
