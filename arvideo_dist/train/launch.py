"""From a configuration to training workers: checks, Ray, Ray Train, and what the terminal shows at the end."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import math
import os
import socket
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError

from arvideo_dist.config import RunConfig
from arvideo_dist.data.index import load_manifest, manifest_name
from arvideo_dist.derived import Derived, derive
from arvideo_dist.storage import Storage, lasts, patiently, shown
from arvideo_dist.train import changes, seen
from arvideo_dist.train.activity import activity
from arvideo_dist.train.checkpoint import Checkpoint, CheckpointError
from arvideo_dist.train.data import clips_per_epoch, training_sources
from arvideo_dist.train.engine import resolve_precision
from arvideo_dist.train.heartbeat import Heartbeat
from arvideo_dist.train.lease import Lease
from arvideo_dist.train.monitor import HangWatch
from arvideo_dist.train.nodes import Room, cluster_address, worker_resources
from arvideo_dist.train.preemption import POLL_S, Background, Signals, stop_if_asked, wait_to_restart
from arvideo_dist.train.retention import FOLDER, checkpoint_name, complete_checkpoints, newest_step
from arvideo_dist.train.stop import (
    RESULT,
    Interruption,
    RunInterruptedError,
    RunStoppedError,
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


def derive_checked(config: RunConfig) -> Derived:
    """The derived numbers of a run whose data set exists; ValueError says what is missing and where to set it."""
    clips = clips_per_epoch(config.data)
    if config.data.val_split is not None:
        load_manifest(training_sources(config.data)[0].storage, config.data.val_split)
    return derive(config, clips)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute, since workers have other working directories.

    Inside a Ray job a relative `run.storage_path` would lie in the job's temporary copy of the working
    directory, which disappears: ValueError.
    """
    if not _is_absolute(config.run.storage_path) and _inside_ray_job():
        raise ValueError(
            f"run.storage_path {config.run.storage_path!r} is relative, and this is a Ray job, whose working "
            "directory is temporary: give an absolute path on shared storage or a URI (s3://...), for example "
            "as ARVIDEO__RUN__STORAGE_PATH"
        )
    run = config.run.model_copy(update={"storage_path": Storage(config.run.storage_path).address})
    path = None if config.data.path is None else Storage(config.data.path).address
    mixture = tuple(
        other.model_copy(update={"path": Storage(other.path).address}) for other in config.data.mixture
    )
    data = config.data.model_copy(update={"path": path, "mixture": mixture})
    model = config.model
    if model.init_from is not None:
        model = model.model_copy(update={"init_from": Storage(model.init_from).address})
    return config.model_copy(update={"run": run, "data": data, "model": model})


def check_initial_weights(config: RunConfig) -> None:
    """Read `model.init_from` once, so that weights of another encoder stop the command and not the workers.

    A run that has a checkpoint goes on from that and does not need them.
    """
    if config.model.init_from is not None and not complete_checkpoints(run_folder(config)):
        from arvideo_dist.interchange import load_initial_encoder
        from arvideo_dist.model.vit import ENCODER_SIZES, Encoder

        size, tokens = ENCODER_SIZES[config.model.encoder], math.prod(config.model.token_grid)
        load_initial_encoder(Encoder(size, config.model.tubelet, tokens), config.model.init_from)


def check_resume(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that the run goes on from; ValueError for what `run.resume` and `run.allow_change` refuse."""
    changes.check_allowed_names(config)
    run = run_folder(config)
    found = complete_checkpoints(run)
    if config.run.resume == "must" and not found:
        raise ValueError(
            f"run.resume is 'must' but {run.uri} has no complete checkpoint: check run.storage_path and "
            "run.name, or set run.resume to 'auto'"
        )
    if config.run.resume == "never" and found:
        raise ValueError(
            f"run.resume is 'never' but {run.uri} has checkpoint {found[-1]}: choose another run.name, or "
            "set run.resume to 'auto' to continue it"
        )
    digests, precision = changes.data_digests(config.data), _precision_if_known(config)
    for name in reversed(found):
        try:
            checkpoint = Checkpoint(run, name)
        except (CheckpointError, ValidationError, FileNotFoundError):
            continue  # the workers name what is damaged and use the one before it, and so does this check
        changes.refuse_changes(checkpoint.state, config, digests, precision, str(checkpoint))
        return checkpoint
    return None


def _precision_if_known(config: RunConfig) -> str | None:
    """What the workers will compute in, where the cluster's kind does not decide it."""
    if config.cluster.device == "auto" and config.train.precision == "auto":
        return None
    return resolve_precision(config.train, torch.device("cuda" if config.cluster.device == "cuda" else "cpu"))


def run_folder(config: RunConfig) -> Storage:
    return Storage(config.run.storage_path).child(config.run.name)


def wait_for_checkpoints(config: RunConfig) -> int:
    """Wait, before anything is written, for a store that shows less of this run than its lease or MLflow tells.

    Returns and raises what `seen.wait_until_seen_again` does.
    """

    def seen_by_mlflow() -> int:
        from arvideo_dist import tracking  # imports MLflow, which takes seconds

        return tracking.newest_checkpoint(config, run_folder(config), seen.CHECKPOINT_TAG)

    return seen.wait_until_seen_again(run_folder(config), seen_by_mlflow)


def launch(config: RunConfig, derived: Derived, lease: Lease, signals: Signals) -> Finished:
    """Run the training on Ray under `lease` and return when it has ended.

    Raises RunStoppedError if the run stopped itself, RunInterruptedError if a signal asked it to end,
    LeaseLostError if another driver took the run, CrashLoopError if workers are lost again and again,
    ValueError if the cluster can never hold them.
    """
    # Read as Ray is imported. Else a thread that still calls Ray after the run has left it would start another Ray.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    from arvideo_dist import tracking  # MLflow and Ray take seconds to import: only after all checks

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
    from arvideo_dist import tracking
    from arvideo_dist.train import outbox

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


def _fit(config: RunConfig, derived: Derived, uri: str, run_id: str, lease: Lease) -> None:
    """One set of workers after another until the run has ended.

    Ray Train restarts none of them. What is lost starts again here, since only a checkpoint tells progress from a
    crash loop: over weeks any number of machines may be lost.
    """
    import ray.train

    from arvideo_dist.tracking import tracker_of
    from arvideo_dist.train.restarts import Restarts, cause_of, uncounted

    api: Any = ray.train
    run = run_folder(config)
    restarts, patience = Restarts(config.run.max_restarts, run.uri), seen.Patience()
    connect(config)
    try:
        # Once: where all GPU nodes are away for a while, the next workers wait for them and do not go on on CPUs.
        use_gpu = use_gpu_of(config, ray.cluster_resources())
        with (
            Room(config, use_gpu, lease.guard.name) as room,
            HangWatch(config.run.hung_s, lease.guard, lambda *tag: tracker_of(run).tag(*tag)) as hangs,
        ):
            payload = {
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

    with _LEAVING:  # where a run is given up, both threads come here
        ray.shutdown()


def _hear_of_checkpoints(uri: str, run_id: str, lease: Lease) -> None:
    """Hear of the newest checkpoint that the workers told MLflow of: the lease's heartbeat may not have seen it."""
    from arvideo_dist import tracking

    lease.saw(tracking.newest_checkpoint_of(uri, run_id, seen.CHECKPOINT_TAG))


def _newest_once_stores_answer(config: RunConfig, lease: Lease) -> str | None:
    """The name of the newest complete checkpoint of a run that is still ours; waits for a store of run or data that
    is away, or that shows less than was seen there, since new workers would need it too.

    OSError if it stays away for an hour or where time alone does not mend it; LeaseLostError and
    RunInterruptedError as soon as the lease is known to be lost or the run is asked to stop.
    """
    run, until, said = run_folder(config), time.monotonic() + seen.AWAY_S, False
    while True:
        try:
            lease.guard.check()
            newest = newest_step(run)
            seen.look(run, lease.saw(newest))
            for source in training_sources(config.data):
                if not source.storage.exists(name := manifest_name(source.split)):
                    raise OSError(f"{source.storage.uri} has no {name} any more: is its mount there?")
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
        _worker,  # type: ignore[arg-type]
        train_loop_config=payload,
        scaling_config=api.ScalingConfig(
            num_workers=number,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(config, use_gpu),
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=_collective_timeout_s(config)
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


def connect(config: RunConfig) -> None:
    """Join the named or surrounding cluster, or start Ray on this machine.

    Workers are told which cluster theirs is. Else Ray Train asks the one that `ray start` left a note of on the
    machine whether its controller lives, for 12 s at each end of its workers where that one is gone, and removes
    the workers where it is another.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else each worker line shows twice
    # Room was there when the driver looked (`Room.wait`); where it is gone again, the driver looks again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    # It would set a handler of its own for SIGTERM, and says that it cannot do so outside the main thread.
    logging.getLogger("ray._private.worker").addFilter(
        lambda record: not str(record.msg).startswith("SIGTERM handler is not set")
    )
    # The second line of defence behind the run's own monitor: a worker that does not answer, and Ray's collectives.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(_collective_timeout_s(config))
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(_collective_timeout_s(config))
    if (address := cluster_address(config)) is not None:
        here = {} if address == "auto" else {"env_vars": {"RAY_ADDRESS": address}}
        ray.init(address=address, runtime_env=here)
        return
    # All on this machine: as many slots as asked for, so that a small machine queues nothing for ever.
    slots = max(os.cpu_count() or 1, config.cluster.max_workers * config.cluster.cpus_per_worker)
    port = _free_port(8265)
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    ray.init(address="local", num_cpus=slots, dashboard_port=port)


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            found: int = probe.getsockname()[1]
            return found
    raise OSError("no port of 127.0.0.1 is free for Ray's dashboard")


def _collective_timeout_s(config: RunConfig) -> int:
    """When torch gives a collective up: later than the monitor, which knows who is to blame."""
    return math.ceil(2 * config.run.hung_s + 60)


def use_gpu_of(config: RunConfig, resources: dict[str, float]) -> bool:
    """Whether the workers train on GPUs; `resources`: the cluster's (`ray.cluster_resources`)."""
    if config.cluster.device != "auto":
        return config.cluster.device == "cuda"
    return resources.get("GPU", 0) > 0


def _worker(payload: dict[str, Any]) -> Interruption | Stopped | None:
    """Runs in every Ray Train worker, with the process group up; the driver gets what rank 0 returns."""
    import torch.distributed as dist

    config, guard = RunConfig.model_validate(payload["config"]), payload["lease"]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} workers have started", flush=True)
    with Heartbeat(payload["monitor"], guard.storage(), config.run.hung_s, payload["workers"]):
        try:
            return _train(config, payload)
        except RunStoppedError as error:  # returning is what keeps the driver from a restart
            return Stopped.because(error)


def _train(config: RunConfig, payload: dict[str, Any]) -> Interruption | None:
    import torch.distributed as dist
    from ray.train.torch import get_device

    activity.alone("imports libraries")
    from arvideo_dist.checks.start import check_workers_start
    from arvideo_dist.train.loop import Task, train
    from arvideo_dist.train.pulse import Pulse
    from arvideo_dist.train.watch import Watch, ray_notice

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # DeepSpeed's calls
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    activity.together("connects to the other ranks")
    timeout = datetime.timedelta(seconds=_collective_timeout_s(config))
    control = dist.new_group(backend="gloo", timeout=timeout)
    task = Task(
        config=config,
        derived=Derived(**payload["derived"]),
        tracking_uri=payload["tracking_uri"],
        mlflow_run_id=payload["mlflow_run_id"],
        lease=payload["lease"],
        seen=payload["seen"],
    )
    watch = Watch(task.lease, control, ray_notice, payload["workers"])
    activity.together("looks for the run's checkpoints")
    seen.look_from_all_ranks(task.lease, task.seen, control)
    activity.together("checks its machine")
    check_workers_start(task.config, task.derived, task.lease, control)
    tracker: Any = contextlib.nullcontext()
    pulse: Any = contextlib.nullcontext()
    if dist.get_rank() == 0:
        pulse = Pulse(activity, functools.partial(print, flush=True))
        from arvideo_dist.tracking import Tracker  # imports MLflow, whose memory and time no other rank needs
        from arvideo_dist.train.outbox import QueuedTracker

        to_mlflow = Tracker(task.tracking_uri, task.mlflow_run_id, task.lease.check)
        tracker = QueuedTracker(to_mlflow, task.lease.storage())
    with pulse, tracker as queue:
        return train(task, device, control, watch, queue)


def _inside_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _is_absolute(path: str) -> bool:
    return "://" in path or os.path.isabs(os.path.expanduser(path))
