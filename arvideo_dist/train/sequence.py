"""The loop of one worker of a run without updates, over the places of a split: (video, view) pairs.

What is computed is the task's (`tasks/sequence.py`). A save (sequence_saves.py) is what a checkpoint is to a
training: any number of workers goes on from the newest one. Each place is computed once, in batches that are cut
alike whatever the number of workers, so the results are the same to the bit.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from arvideo_dist.config.commands import SequenceConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.loader import Batch, ClipLoader
from arvideo_dist.storage import patiently, without_credentials
from arvideo_dist.tasks.derived import Viewed
from arvideo_dist.tasks.draws import label_of
from arvideo_dist.tasks.kinds import sequence_of
from arvideo_dist.train.agreement import agree, agree_on_data, agree_to_stop
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.checkpoint.manifest import CheckpointError, versions
from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
from arvideo_dist.train.checkpoint.saver import FAILED_TAG
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run import changes
from arvideo_dist.train.run.stop import RESULT, Interruption, RunStoppedError, stops_if_full
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.samples.bad_samples import BadSamples
from arvideo_dist.train.sequence_saves import SequenceSaves
from arvideo_dist.train.tracking.deferred import DeferredWrites
from arvideo_dist.train.trained import READERS

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs


def run_sequence(
    assignment: Assignment[SequenceConfig, Viewed],
    device: torch.device,
    control: dist.ProcessGroup,
    watch: Watch,
    tracker: QueuedTracker | None,
) -> Interruption | None:
    """Compute all views from the newest save on; leaves the metrics in `RESULT`. Collective, as `compose.train`."""
    sequence = SequenceRun(assignment, device, control, tracker)
    interruption = sequence.run(watch)
    if interruption is not None:
        if tracker is not None:
            tracker.leave()
        return interruption
    if dist.get_rank() == 0:
        sequence.leave_result()
    return None


class SequenceRun:
    """A run over the views of a split, while it runs."""

    def __init__(
        self,
        assignment: Assignment[SequenceConfig, Viewed],
        device: torch.device,
        control: dist.ProcessGroup,
        tracker: QueuedTracker | None,
    ) -> None:
        """Collective. Raises RunStoppedError on all ranks if the run cannot go on from its newest save."""
        self._assignment, self._control, self._tracker = assignment, control, tracker
        self._config, self._device = assignment.config, device
        self._task, self._folder = sequence_of(self._config), assignment.lease.storage()
        digests, self._precision = (
            changes.data_digests(self._config.data),
            self._config.precision_on(device.type),
        )
        activity.together("compares its data with the other ranks")
        agree_on_data(digests, self._precision, control)
        activity.alone("builds the model")
        self._module = self._task.build()
        agree_to_stop(self._load, control, ValueError, CheckpointError)
        try:
            start = self._start(digests)
            self._loader = self._make_loader()
            self._task.check(self._loader.samples.indexes)
        except ValueError as error:  # on all ranks, and a restart would meet the same
            raise RunStoppedError(str(error)) from error
        self._module.to(device).eval()
        self._notes = DeferredWrites(self._folder)
        fraction, epoch = self._config.data.max_bad_fraction, self._loader.places_per_epoch
        self._bad = BadSamples(self._notes, fraction, epoch, control, tracker)
        self._bad.restore(start.state["bad_samples"] if start is not None else [], [])
        self._saves = SequenceSaves(
            self._folder,
            self._task.parts_folder,
            self._config.run,
            control,
            self._say,
            flush=functools.partial(patiently, self._notes.flush),
            report=self._report_save,
            start=None if start is None else start.state,
        )
        self._constants = {
            "command": self._config.command,
            "config": without_credentials(self._config.model_dump(mode="json")),
            "data_digests": digests,
            "precision": self._precision,
            "derived": asdict(assignment.derived),
            "mlflow_run_id": assignment.mlflow_run_id,
            "versions": versions(),
        }

    def _load(self) -> None:
        self._task.load(self._module, READERS)

    def _start(self, digests: list[str]) -> Checkpoint | None:
        activity.together("looks for the newest save")
        start = open_newest_whole(self._folder, self._control, seen=self._assignment.seen)
        self._position = 0
        if start is not None:
            for line in changes.refuse_changes(
                start.state, self._config, digests, self._precision, str(start)
            ):
                self._say(f"changed by run.allow_change: {line}")
            self._position = start.state["position"]
            self._say(f"continues from {start}, view {self._position}")
        return start

    def _make_loader(self) -> ClipLoader:
        derived, config = self._assignment.derived, self._config
        options = loader_options(config.data, pin_memory=self._device.type == "cuda")
        return ClipLoader(
            [self._task.source()],
            clip_frames=config.model.frames,
            image_size=config.model.image_size,
            draw=label_of,
            seed=config.run.seed,
            position=self._position,
            global_batch=derived.micro_batch * dist.get_world_size(),
            micro_batch=derived.micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            workers=config.data.workers,
            stop_position=derived.total_places,
            shuffle=False,
            options=replace(options, repeats=derived.views),
        )

    def run(self, watch: Watch) -> Interruption | None:
        """Collective. Score to the end, or until `watch` says that the workers shall leave: why, then."""
        total, interruption = self._assignment.derived.total_places, None
        assert total is not None
        activity.total_steps = -(-total // self._loader.global_batch)
        batches, computed, began = iter(self._loader), 0, time.perf_counter()
        waiting: tuple[Batch, torch.Tensor] | None = None  # the device computes while its host reads on
        while self._position < total:
            activity.alone("waits for batches", self._loader.busy_with)
            step = next(batches)
            activity.together("agrees on the step with the other ranks")
            look = watch.due(saves_fail=self._saves.failing)
            facts = agree(step, self._control, save_due=self._saves.due(), look=look)
            if facts.look and (interruption := watch.look(self._step())) is not None:
                break
            self._bad.account(step, facts.bad_samples, self._position)
            activity.alone("computes")
            values = self._computed(step[0])
            self._take(waiting)
            waiting = step[0], values
            self._position = min(self._position + self._loader.global_batch, total)
            computed += int(facts.total_weight)
            activity.step += 1
            if activity.step % self._config.sequence.log_every_steps == 0 or self._position == total:
                rate = computed / (time.perf_counter() - began)
                left = int((total - self._position) / rate) if rate else 0
                self._say(
                    f"view {self._position}/{total}  {rate:.1f} views/s  left "
                    f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
                )
            if facts.save_due or activity.step % self._config.run.checkpoint_every_steps == 0:
                self._take(waiting)
                waiting = None
                self._saves.save(self._position, self._step(), self._state())
        self._take(waiting)
        if self._position > self._saves.position:
            self._saves.finish(self._position, self._step(), self._state())
        return interruption

    def _computed(self, host: Batch) -> torch.Tensor:
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._precision == "bf16":
            autocast = torch.autocast(self._device.type, torch.bfloat16)
        with torch.inference_mode(), autocast:
            return self._task.compute(self._module, host.to(self._device))

    def _take(self, waiting: tuple[Batch, torch.Tensor] | None) -> None:
        if waiting is not None:
            batch, values = waiting
            self._saves.add(self._task.rows(batch, values.float().cpu().numpy()))

    def _step(self) -> int:
        """Batches of one worker up to the position: unlike steps, the same for any number of workers."""
        return -(-self._position // self._assignment.derived.micro_batch)

    def _state(self) -> dict[str, Any]:
        """Collective. What a save tells beside its position and its parts."""
        self._bad.collect()
        return {**self._constants, "bad_samples": self._bad.listed()}

    def _report_save(self, message: str) -> None:
        if self._tracker is not None:
            self._tracker.tag(FAILED_TAG, message)

    def leave_result(self) -> None:
        """Rank 0: write what follows from all rows, and the result last."""
        activity.alone("joins the results")
        with stops_if_full(self._folder):
            found = self._task.finish(self._saves.read_parts(), self._loader.samples.indexes[0], self._write)
            for name, content in found.files.items():
                patiently(functools.partial(self._folder.write_bytes, name, content))
                if self._tracker is not None:
                    self._tracker.log_bytes(name, content)
            metrics = {**found.metrics, "bad_samples": float(self._bad.places)}
            if self._tracker is not None:
                self._tracker.log(0, metrics)
            content = json.dumps({"step": self._step(), **metrics}, indent=1).encode()
            patiently(functools.partial(self._folder.write_bytes, RESULT, content))

    def _write(self, name: str, fill: Callable[[Path], None]) -> None:
        def publish() -> None:
            with self._folder.writing(name) as file:
                fill(file)

        patiently(publish)

    def _say(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)
            activity.spoke()
