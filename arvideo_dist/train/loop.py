"""The step loop of one worker: what is waited for, agreed, computed, applied, recorded, measured and saved.

The run's state is one number, the *position*: how many places of the sample sequence are consumed, that is applied
to the weights, but for the steps that `bad_steps.py` lists. Step s consumes places [s G, (s + 1) G), G the global
batch, unless `run.allow_change` let G change on the way. Nothing else decides what comes next, what the learning
rate is and where the run ends (`schedule.py`). What the loop uses is put together in `compose.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from arvideo_dist.data.loader import Batch
from arvideo_dist.train.agreement import StepFacts, agree
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.engine.engine import Update
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.parts import Parts, State
from arvideo_dist.train.record import Done
from arvideo_dist.train.run.stop import Interruption, RunStoppedError


class Training:
    """A run while it trains; its methods stand in the order in which the loop comes to them."""

    def __init__(self, parts: Parts, state: State, say: Callable[[str], None]) -> None:
        """`say`: a line for the terminal, from rank 0 alone."""
        self.parts, self.state, self._say = parts, state, say
        self.total_steps = state.step + parts.plan.steps_left(state.position)

    def run(self) -> Interruption | None:
        """Collective. Train to the end of the run, or until `watch` says that it shall leave: why, then.

        All that was learned is in a whole checkpoint when this returns. Raises RunStoppedError on all ranks.
        """
        parts, state = self.parts, self.state
        batches, interruption = iter(parts.loader), None
        while state.step < self.total_steps:
            micro_batches = self._wait_for(batches)
            with self._save_in_flight_ends():
                facts = self._agree(micro_batches)
                if facts.look and (interruption := parts.watch.look(state.step)) is not None:
                    break
                parts.bad_samples.account(micro_batches, facts.bad_samples, state.position)
            rate = parts.plan.rate(state.position)
            loss_sum = self._compute(micro_batches, facts)
            update = parts.engine.apply(rate)
            self._advance(micro_batches, update)
            if self._is_due(parts.train.log_every_steps):
                self._record(loss_sum, rate, update, facts)
            if self._is_due(parts.validation.every_steps):
                self._validate()
            if parts.features is not None and self._is_due(parts.features.every_steps):
                self._measure(parts.features)
            self._save_if_due(facts)
        if interruption is not None and state.step > state.saved_at:
            self._save()
        parts.saver.finish(self._save)
        return interruption

    def _is_due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0 or self.state.step == self.total_steps

    def _wait_for(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        activity.alone("waits for batches", self.parts.loader.busy_with)
        began = time.perf_counter()
        micro_batches = next(batches)
        self.parts.recorder.meter.waited(time.perf_counter() - began)
        return micro_batches

    @contextlib.contextmanager
    def _save_in_flight_ends(self) -> Iterator[None]:
        """What stops the run comes to all ranks, so that they can still end the save in flight."""
        try:
            yield
        except RunStoppedError:
            with contextlib.suppress(CheckpointError):
                self.parts.saver.finish()
            raise

    def _agree(self, micro_batches: list[Batch]) -> StepFacts:
        parts = self.parts
        activity.together("agrees on the step with the other ranks")
        look = parts.watch.due(saves_fail=parts.saver.failing)
        return agree(micro_batches, parts.control, save_due=parts.saver.due_by_time(), look=look)

    def _compute(self, micro_batches: list[Batch], facts: StepFacts) -> torch.Tensor:
        """Forward and backward; this rank's weighted sum of losses. The weights may change when this returns."""
        parts = self.parts
        loss_sum = parts.engine.accumulate(micro_batches, facts.total_weight)
        parts.recorder.meter.forward(parts.engine.forward_time)
        parts.saver.before_update()
        return loss_sum

    def _advance(self, micro_batches: list[Batch], update: Update) -> None:
        """The step is done, applied or not: it counts, and too many bad ones in a row give up their weights."""
        parts, state = self.parts, self.state
        position = parts.plan.next_position(state.position)
        parts.recorder.meter.consumed(position - state.position)
        state.position, state.step = position, state.step + 1
        activity.step = state.step
        if update.applied:
            parts.bad_steps.good()
            if parts.audit is not None:
                parts.audit.applied(state.step, micro_batches)
            return
        parts.bad_steps.add(state.step, micro_batches, parts.engine.sample_losses)
        if parts.bad_steps.too_many:
            with contextlib.suppress(CheckpointError):  # the checkpoint before it is as good
                parts.saver.finish()
            activity.together("goes back to earlier weights")
            seen = max(parts.seen, parts.saver.last_saved)
            weights_step = parts.bad_steps.go_back(state.step, parts.engine, seen=seen)
            state.save_owed = True
            if parts.audit is not None:
                parts.audit.go_back(weights_step)

    def _record(self, loss_sum: torch.Tensor, rate: float, update: Update, facts: StepFacts) -> None:
        parts, state = self.parts, self.state
        activity.together("joins the metrics of all ranks")
        parts.bad_samples.collect()
        left = parts.plan.total_places - state.position
        done = Done(state.step, self.total_steps, left, rate, update.gradient_norm, facts.total_weight)
        counts = {
            "epoch": state.position / parts.loader.places_per_epoch,
            "bad_samples": parts.bad_samples.places,
            "bad_steps": len(parts.bad_steps),
            "failed_saves": parts.saver.failures_in_all,
        }
        record = parts.recorder.record(done, loss_sum, counts)
        state.metrics = record.metrics
        activity.alone("writes metrics")
        if parts.tracker is not None:
            parts.tracker.log(state.step, record.metrics)
        for line in record.lines:
            self._say(line)

    def _validate(self) -> None:
        state = self.state
        self._measure(self.parts.measure)
        value = state.metrics.get(self.parts.best_metric or "")
        if value is not None and (state.best is None or value > state.best["value"]):
            state.best, state.save_owed = {"step": state.step, "value": value}, True

    def _measure(self, measure: Callable[[int], dict[str, float]]) -> None:
        """Take over what `measure` finds of the weights as they are."""
        state = self.state
        try:
            state.metrics |= measure(state.step)
        except RunStoppedError:  # on all ranks; what was learned is none of its fault
            self._save()
            with contextlib.suppress(CheckpointError):
                self.parts.saver.finish()
            raise
        self.parts.recorder.meter.reset()

    def _save_if_due(self, facts: StepFacts) -> None:
        state = self.state
        state.save_owed |= facts.save_due or self.parts.saver.due_by_step(state.step)
        if (state.save_owed and not self.parts.bad_steps.in_stretch) or state.step == self.total_steps:
            self._save()
            state.saved_at, state.save_owed = state.step, False

    def _save(self) -> None:
        """Begin a checkpoint; the training goes on while it is written."""
        parts, state = self.parts, self.state
        activity.together("begins a save")
        parts.bad_samples.collect()
        # No random states: every draw is keyed by (seed, place), so seed and position are all there is to them.
        # The model draws nothing while it trains (tests/train/checkpoint/test_saver.py).
        content = {
            **parts.constants,
            "position": state.position,
            "step": state.step,
            "total_places": parts.plan.total_places,
            "bad_samples": parts.bad_samples.listed(),
            "bad_validation_samples": parts.bad_samples.listed_of_validation(),
            "bad_steps": parts.bad_steps.listed(),
            "spikes": parts.recorder.spikes.listed(),
            "failed_saves": parts.saver.failures_in_all,
            "metrics": state.metrics,
            "best": state.best,
            "untrained_features": parts.features.untrained if parts.features is not None else {},
        }
        parts.saver.request(state.step, content)
