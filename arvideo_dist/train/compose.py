"""From what the driver gives to a worker to a training that runs: the newest checkpoint and what the loop uses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from arvideo_dist.config.commands import TrainingConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.loader import ClipLoader
from arvideo_dist.storage import Storage, patiently, without_credentials
from arvideo_dist.tasks.derived import Derived
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.tasks.task import Task
from arvideo_dist.train.agreement import agree_on_data, agree_to_stop
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.manifest import CheckpointError, versions
from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
from arvideo_dist.train.checkpoint.saver import FAILED_TAG, Saver
from arvideo_dist.train.checkpoint.seen import CHECKPOINT_TAG
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.schedule import Plan, plan_of
from arvideo_dist.train.evaluation import Validator
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.loop import Training
from arvideo_dist.train.measuring import FeatureMeasures
from arvideo_dist.train.parts import Parts, State
from arvideo_dist.train.record import Recorder
from arvideo_dist.train.run import changes
from arvideo_dist.train.run.stop import RESULT, Interruption, RunStoppedError, stops_if_full
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.audit import Audit
from arvideo_dist.train.samples.bad_samples import BadSamples
from arvideo_dist.train.samples.bad_steps import BadSteps
from arvideo_dist.train.tracking.deferred import DeferredWrites
from arvideo_dist.train.trained import read_weights

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs


def train(
    assignment: Assignment[TrainingConfig, Derived],
    device: torch.device,
    control: dist.ProcessGroup,
    watch: Watch,
    tracker: QueuedTracker | None,
) -> Interruption | None:
    """Train from the latest complete checkpoint to the end of the run; leaves the final metrics in `RESULT`.

    Called on every rank with the default process group up; `control` is a gloo group for host values, `tracker` is
    rank 0's. If `watch` says so, the run saves and leaves at a step boundary; the interruption is returned.
    """
    training, notes = compose(assignment, device, control, watch, tracker)
    interruption, state = training.run(), training.state
    if interruption is not None:
        if tracker is not None:
            tracker.leave()
        return interruption
    # What it began from was a checkpoint on the way, not that of a run's end.
    if state.step == state.began_at and "loss/val" not in state.metrics:
        state.metrics |= training.parts.measure(state.step)
    if dist.get_rank() == 0:
        best = {f"best_{name}": value for name, value in (state.best or {}).items()}
        _leave_result(assignment.lease.storage(), notes, {"step": state.step, **state.metrics, **best})
    return None


def compose(
    assignment: Assignment[TrainingConfig, Derived],
    device: torch.device,
    control: dist.ProcessGroup,
    watch: Watch,
    tracker: QueuedTracker | None,
) -> tuple[Training, DeferredWrites]:
    """Collective. The training, from the newest whole checkpoint or its start; and what is still to be written."""
    config, derived = assignment.config, assignment.derived.at_world_size(dist.get_world_size())
    run, task = assignment.lease.storage(), task_of(config)
    say = functools.partial(_say, dist.get_rank())
    activity.alone("builds the model")
    torch.manual_seed(config.run.seed)
    module = task.build()
    digests, precision = changes.data_digests(config.data), config.precision_on(device.type)
    activity.together("compares its data with the other ranks")
    agree_on_data(digests, precision, control)
    start, origin = _start(assignment, task, module, digests, precision, control, say)
    activity.together("builds the engine")
    groups = task.parameter_groups(module)
    engine = Engine(module, task.loss, groups, config.train, config.optim, device, derived.accumulation_steps)
    if start is not None:
        activity.alone("reads the optimiser's state")
        try:
            start.load_optimizer(engine)
        except ValueError as error:  # on all ranks, and a restart would meet the same
            raise RunStoppedError(str(error)) from error
    kept: Mapping[str, Any] = start.state if start is not None else {}
    position, step = kept.get("position", 0), kept.get("step", 0)
    state = State(position, step, kept.get("metrics", {}), kept.get("best"), began_at=step, saved_at=step)
    plan = plan_of(config, derived, start.state if start is not None else None)
    activity.step, activity.total_steps = step, step + plan.steps_left(position)
    say(f"continues from {start}, step {step}" if start else f"starts from {origin}")
    if derived.world_size != assignment.derived.world_size:
        say(derived.batch_line())

    activity.together("opens the data")
    loader = _training_loader(task, plan, position, device)
    try:
        task.check(loader.samples.indexes)
    except ValueError as error:  # on all ranks: they read the same index
        raise RunStoppedError(str(error)) from error
    notes = DeferredWrites(run, [] if tracker is None else [tracker.flush])
    bad = BadSamples(notes, config.data.max_bad_fraction, loader.places_per_epoch, control, tracker)
    bad.restore(kept.get("bad_samples", []), kept.get("bad_validation_samples", []))
    bad_steps = BadSteps(run, notes, config.train, loader.samples.names, control, tracker)
    bad_steps.restore(kept.get("bad_steps"))
    recorder = Recorder(device, control)
    recorder.spikes.restore(kept.get("spikes", {}))
    audit = Audit(assignment.lease, notes, step, control) if config.run.audit else None
    parts = Parts(
        train=config.train,
        validation=config.validation,
        plan=plan,
        control=control,
        watch=watch,
        loader=loader,
        engine=engine,
        saver=_saver(run, engine, config, start, say, notes, tracker),
        bad_samples=bad,
        bad_steps=bad_steps,
        recorder=recorder,
        audit=audit,
        tracker=tracker,
        features=_features(task, engine, control, bad, tracker, say, kept),
        measure=Validator(task, engine, control, bad, notes, tracker, say),
        best_metric=task.best_metric,
        constants={
            "command": config.command,
            "mlflow_run_id": assignment.mlflow_run_id,
            "config": without_credentials(config.model_dump(mode="json")),
            "data_digests": digests,
            "precision": precision,
            "derived": asdict(derived),
            "versions": versions(),
            **task.facts(),
        },
        seen=assignment.seen,
    )
    return Training(parts, state, say), notes


def _start(
    assignment: Assignment[TrainingConfig, Derived],
    task: Task[Any],
    module: nn.Module,
    digests: list[str],
    precision: str,
    control: dist.ProcessGroup,
    say: Callable[[str], None],
) -> tuple[Checkpoint | None, str]:
    """The newest whole checkpoint, with its weights in `module`; without one, where its weights are from."""
    activity.together("verifies and reads the checkpoint")
    start = open_newest_whole(assignment.lease.storage(), control, seen=assignment.seen)
    if start is None:

        def fill() -> str:
            return task.start_from(module, read_weights)

        return None, agree_to_stop(fill, control, ValueError, CheckpointError)
    try:
        for line in changes.refuse_changes(start.state, assignment.config, digests, precision, str(start)):
            say(f"changed by run.allow_change: {line}")
        start.load_weights(module, control)
    except ValueError as error:  # on all ranks, and a restart would meet the same
        raise RunStoppedError(str(error)) from error
    return start, ""


def _training_loader(task: Task[Any], plan: Plan, position: int, device: torch.device) -> ClipLoader:
    config: TrainingConfig = task.config
    return ClipLoader(
        task.sources(),
        clip_frames=config.model.frames,
        image_size=config.model.image_size,
        draw=task.draw(),
        seed=config.run.seed,
        position=position,
        global_batch=plan.global_batch,
        micro_batch=config.train.micro_batch,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        workers=config.data.workers,
        stop_position=plan.total_places,
        unit=task.batch_unit,
        options=loader_options(config.data, pin_memory=device.type == "cuda"),
    )


def _saver(
    run: Storage,
    engine: Engine,
    config: TrainingConfig,
    start: Checkpoint | None,
    say: Callable[[str], None],
    notes: DeferredWrites,
    tracker: QueuedTracker | None,
) -> Saver:
    def report(step: int, failures: int, message: str) -> None:
        if tracker is not None:
            tracker.tag(FAILED_TAG, message if failures else f"none since the checkpoint of step {step}")

    def published(step: int) -> None:
        if tracker is not None:
            tracker.tag(CHECKPOINT_TAG, str(step))

    return Saver(
        run,
        engine,
        config.run,
        say,
        flush=notes.flush,
        report=report,
        published=published,
        last_saved=start.state["step"] if start is not None else 0,
        damaged=start.damaged_newer if start is not None else (),
        failed_before=start.state.get("failed_saves", 0) if start is not None else 0,
    )


def _features(
    task: Task[Any],
    engine: Engine,
    control: dist.ProcessGroup,
    bad: BadSamples,
    tracker: QueuedTracker | None,
    say: Callable[[str], None],
    kept: Mapping[str, Any],
) -> FeatureMeasures | None:
    if (probed := task.probed()) is None:
        return None
    features = FeatureMeasures(probed, task, engine, control, bad, tracker, say)
    features.untrained = dict(kept.get("untrained_features", {}))
    return features


def _leave_result(run: Storage, notes: DeferredWrites, result: Mapping[str, float]) -> None:
    with stops_if_full(run):
        patiently(notes.flush)
        patiently(lambda: run.write_bytes(RESULT, json.dumps(result, indent=1).encode()))


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)
        activity.spoke()
