"""The training loop of one worker, from its start weights to the last checkpoint.

The run's state is one number, the *position*: how many places of the sample sequence are consumed, that is applied
to the weights, but for the steps that `bad_steps.py` lists. Step s consumes places [s G, (s + 1) G), G the global
batch, unless `run.allow_change` let G change on the way. Nothing else decides what comes next, what the learning
rate is and where the run ends (`schedule.py`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.sources import (
    loader_options,
    training_sources,
    validation_options,
    validation_source,
)
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import ClipLoader
from arvideo_dist.model.interchange import load_initial_encoder
from arvideo_dist.model.kinds import build_model
from arvideo_dist.storage import Storage, is_full, patiently, without_credentials
from arvideo_dist.tasks.derived import Derived
from arvideo_dist.tasks.picture import png
from arvideo_dist.train.agreement import agree, agree_on_data
from arvideo_dist.train.checkpoint import reader as checkpoints
from arvideo_dist.train.checkpoint.manifest import CheckpointError, versions
from arvideo_dist.train.checkpoint.saver import FAILED_TAG, Saver
from arvideo_dist.train.checkpoint.seen import CHECKPOINT_TAG
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.engine.schedule import plan_of
from arvideo_dist.train.evaluation import validate, validation_line
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.progress import Meter, Stragglers, progress_line
from arvideo_dist.train.run import changes
from arvideo_dist.train.run.lease import Guard
from arvideo_dist.train.run.stop import RESULT, Interruption, RunStoppedError
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.audit import Audit
from arvideo_dist.train.samples.bad_samples import BadSamples
from arvideo_dist.train.samples.bad_steps import BadSteps
from arvideo_dist.train.spikes import Spikes, spike_line
from arvideo_dist.train.tracking.deferred import DeferredWrites

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs


@dataclass(frozen=True)
class Task:
    """What the driver gives to every worker."""

    config: RunConfig
    derived: Derived
    tracking_uri: str
    mlflow_run_id: str
    lease: Guard
    seen: int = 0  # the newest step of which anybody saw a checkpoint of the run


def train(
    task: Task,
    device: torch.device,
    control: dist.ProcessGroup,
    watch: Watch,
    tracker: QueuedTracker | None,
) -> Interruption | None:
    """Train from the latest complete checkpoint to the end of the run; leaves the final metrics in `RESULT`.

    Called on every rank with the default process group up; `control` is a gloo group for host values, `tracker` is
    rank 0's. Where `watch` says so, the run saves and leaves at a step boundary; the interruption is returned.
    """
    config, derived = task.config, task.derived.at_world_size(dist.get_world_size())
    rank = dist.get_rank()
    run = task.lease.storage()
    notes = DeferredWrites(run)

    activity.alone("builds the model")
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, config.decoder)
    sequence = model.sequences.draw_sequence
    digests, precision = changes.data_digests(config.data), config.train.precision_on(device.type)
    activity.together("compares its data with the other ranks")
    agree_on_data(digests, precision, control)
    activity.together("verifies and reads the checkpoint")
    start = checkpoints.open_newest_whole(run, control, seen=task.seen)
    origin = "random weights"
    if start is not None:
        try:
            for line in changes.refuse_changes(start.state, config, digests, precision, str(start)):
                _say(rank, f"changed by run.allow_change: {line}")
            start.load_weights(model, control)
        except ValueError as error:  # on all ranks, and a restart would meet the same
            raise RunStoppedError(str(error)) from error
    elif config.model.init_from is not None:
        origin = load_initial_encoder(model.encoder, config.model.init_from)
    activity.together("builds the engine")
    engine = Engine(model, config.train, config.optim, device, derived.accumulation_steps)
    if start is not None:
        activity.alone("reads the optimiser's state")
        start.load_optimizer(engine)
    position = start.state["position"] if start is not None else 0
    step = activity.step = start.state["step"] if start is not None else 0
    plan = plan_of(config, derived, start.state if start is not None else None)
    total_steps = activity.total_steps = step + plan.steps_left(position)
    _say(rank, f"continues from {start}, step {step}" if start else f"starts from {origin}")
    if derived.world_size != task.derived.world_size:
        _say(rank, derived.batch_line())

    activity.together("opens the data")
    pin_memory = device.type == "cuda"
    make_loader = functools.partial(
        ClipLoader,
        clip_frames=config.model.frames,
        image_size=config.model.image_size,
        sequence=sequence,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=dist.get_world_size(),
    )
    train_loader = make_loader(
        training_sources(config.data),
        position=position,
        global_batch=plan.global_batch,
        workers=config.data.workers,
        stop_position=plan.total_places,
        options=loader_options(config.data, pin_memory=pin_memory),
    )
    bad = BadSamples(notes, config.data.max_bad_fraction, train_loader.places_per_epoch, control, tracker)
    if start is not None:
        bad.restore(start.state["bad_samples"], start.state.get("bad_validation_samples", []))
    bad_steps = BadSteps(run, notes, config.train, train_loader.samples.names, control, tracker)
    spikes = Spikes()
    if start is not None:
        bad_steps.restore(start.state.get("bad_steps"))
        spikes.restore(start.state.get("spikes", {}))
    audit = Audit(task.lease, step, control) if config.run.audit else None

    def flush() -> None:
        for kept in (notes, audit, tracker):
            if kept is not None:
                kept.flush()

    def report_failed_save(step: int, failures: int, message: str) -> None:
        if tracker is not None:
            tracker.tag(FAILED_TAG, message if failures else f"none since the checkpoint of step {step}")

    def note_checkpoint(step: int) -> None:
        if tracker is not None:
            tracker.tag(CHECKPOINT_TAG, str(step))

    saver = Saver(
        run,
        engine,
        config.run,
        functools.partial(_say, rank),
        flush=flush,
        report=report_failed_save,
        published=note_checkpoint,
        last_saved=step,
        damaged=start.damaged_newer if start is not None else (),
        failed_before=start.state.get("failed_saves", 0) if start is not None else 0,
    )

    def validation() -> dict[str, float]:
        if config.data.val_split is None:
            return {}
        source = validation_source(config.data)
        clips = min(load_manifest(source.storage, source.split).samples, config.validation.max_clips)
        loader = make_loader(
            [source],
            position=0,
            global_batch=config.train.micro_batch * dist.get_world_size(),
            workers=min(config.data.workers, 2),
            stop_position=clips,
            shuffle=False,
            options=validation_options(config.data, pin_memory=pin_memory),
        )
        result = validate(engine, loader, config.model, control)
        activity.alone("writes the validation")
        if tracker is not None:
            tracker.log(step, result.metrics)
            if result.picture is not None:
                name, picture = f"pictures/step-{step:08d}.png", png(result.picture)
                tracker.log_bytes(name, picture)
                notes.put(name, picture)
        _say(rank, f"step {step}  {validation_line(result.metrics)}")
        activity.together("joins the bad samples of the validation")
        bad.validated(result.bad, clips)
        return result.metrics

    def save() -> None:
        activity.together("begins a save")
        bad.collect()
        # No random states: every draw is keyed by (seed, place), so seed and position are all there is to them.
        # The model draws nothing while it trains (tests/train/test_saver.py).
        state: dict[str, Any] = {
            "position": position,
            "step": step,
            "total_places": plan.total_places,
            "bad_samples": bad.listed(),
            "bad_validation_samples": bad.listed_of_validation(),
            "bad_steps": bad_steps.listed(),
            "spikes": spikes.listed(),
            "failed_saves": saver.failures_in_all,
            "metrics": metrics,
            "mlflow_run_id": task.mlflow_run_id,
            "config": without_credentials(config.model_dump(mode="json")),
            "data_digests": digests,
            "precision": precision,
            "derived": asdict(derived),
            "versions": versions(),
        }
        saver.request(step, state)

    batches = iter(train_loader)
    meter = Meter(device, control)
    stragglers = Stragglers()
    metrics: dict[str, float] = start.state.get("metrics", {}) if start is not None else {}
    began_at = saved_at = step
    save_owed = False
    interruption: Interruption | None = None
    while step < total_steps and interruption is None:
        activity.alone("waits for batches", train_loader.busy_with)
        began = time.perf_counter()
        micro_batches = next(batches)
        meter.waited(time.perf_counter() - began)
        activity.together("agrees on the step with the other ranks")
        facts = agree(
            micro_batches, control, save_due=saver.due_by_time(), look=watch.due(saves_fail=saver.failing)
        )
        try:
            if facts.look and (interruption := watch.look(step)) is not None:
                break
            bad.account(micro_batches, facts.bad_samples, position)
        except RunStoppedError:  # on all ranks, so that they can still end the save in flight
            with contextlib.suppress(CheckpointError):
                saver.finish()
            raise

        rate, places = plan.rate(position), plan.next_position(position) - position
        meter.consumed(places)
        loss_sum = engine.accumulate(micro_batches, facts.total_weight)
        meter.forward(engine.forward_time)
        saver.before_update()
        update = engine.apply(rate)
        position += places
        step += 1
        activity.step = step
        if update.applied:
            bad_steps.good()
            if audit is not None:
                audit.applied(step, micro_batches)
        else:
            bad_steps.add(step, micro_batches, engine.sample_losses)
            if bad_steps.too_many:
                with contextlib.suppress(CheckpointError):  # the checkpoint before it is as good
                    saver.finish()
                activity.together("goes back to earlier weights")
                weights_step = bad_steps.go_back(step, engine, seen=max(task.seen, saver.last_saved))
                save_owed = True
                if audit is not None:
                    audit.go_back(weights_step)

        if step % config.train.log_every_steps == 0 or step == total_steps:
            activity.together("joins the metrics of all ranks")
            point = meter.point(loss_sum, facts.total_weight)
            bad.collect()
            metrics = {
                "loss/train": point.loss,
                "learning_rate": rate,
                "gradient_norm": float(update.gradient_norm) if facts.total_weight else math.nan,
                "epoch": position / train_loader.places_per_epoch,
                "clips_per_second": point.clips_per_second,
                "clips_per_second_per_worker": point.clips_per_second / derived.world_size,
                "data_wait_share": point.data_wait_share,
                "memory_gib": point.memory_gib,
                "bad_samples": bad.places,
                "bad_steps": len(bad_steps),
                "failed_saves": saver.failures_in_all,
                "step_time/max": point.slowest_s,
                "step_time/median": point.median_s,
                "slowest_rank": point.slowest_rank,
            }
            # Of a bad step, and of one without a usable sample, there is a gap: MLflow would make 1.8e308 of Inf,
            # and the curve a line.
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            found = spikes.look(metrics)
            metrics |= found
            activity.alone("writes metrics")
            if tracker is not None:
                tracker.log(step, metrics)
            _say(rank, progress_line(step, total_steps, rate, point, plan.total_places - position))
            if found:
                _say(rank, spike_line(step, found))
            if (straggler := stragglers.line(point)) is not None:
                _say(rank, f"step {step}  {straggler}")
        if step % config.validation.every_steps == 0 or step == total_steps:
            try:
                metrics |= validation()
            except RunStoppedError:  # on all ranks; what was learned is none of its fault
                save()
                with contextlib.suppress(CheckpointError):
                    saver.finish()
                raise
            meter.reset()
        save_owed |= facts.save_due or saver.due_by_step(step)
        if (save_owed and not bad_steps.in_stretch) or step == total_steps:
            save()
            saved_at, save_owed = step, False
    if interruption is not None and step > saved_at:
        save()
    saver.finish(save)

    if interruption is not None:
        if tracker is not None:
            tracker.leave()
        return interruption
    if step == began_at and "loss/val" not in metrics:  # the checkpoint was not the end of a run then
        metrics |= validation()
    if rank == 0:
        _leave_result(run, notes, {"step": step, **metrics})
    return None


def _leave_result(run: Storage, notes: DeferredWrites, result: Mapping[str, float]) -> None:
    try:
        patiently(notes.flush)
        patiently(lambda: run.write_bytes(RESULT, json.dumps(result, indent=1).encode()))
    except OSError as error:
        if not is_full(error):
            raise
        raise RunStoppedError(
            f"the run is trained and saved, but {run.uri} takes no result: {error}. Make room there; the same "
            "command ends the run"
        ) from error


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)
        activity.spoke()
