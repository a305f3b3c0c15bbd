"""Steps whose loss or gradient norm is not finite: never applied, listed with their samples, bounded in a row.

    <run>/bad_steps/step-00000123.parquet      a row for each sample of the step that was left out (_SCHEMA)

A bad step raises step and position, and nothing else: weights, moments and the optimiser's step count are as if it
had not been. After `train.max_bad_steps` of them in a row the weights are suspected as well. Then the run stops, or
it goes back to the weights of its newest good checkpoint while step and position go on past the samples at fault.
What was learned since that checkpoint is given up; the audit counts it as lost.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from arvideo_dist.config.optim import TrainConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER as CHECKPOINTS
from arvideo_dist.train.checkpoint.layout import step_of
from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
from arvideo_dist.train.checkpoint.retention import weights_step
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.tracking.deferred import DeferredWrites

if TYPE_CHECKING:
    from arvideo_dist.train.tracking.outbox import QueuedTracker  # imports MLflow, which only rank 0 needs

FOLDER = "bad_steps"
ROLLBACKS_TAG = "arvideo.rollbacks"
# Between two checkpoints the samples can be at fault in a few places; if it goes on, the weights are.
_MAX_ROLLBACKS_TO_SAME_WEIGHTS = 3
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # as in the log: the first step is 1
        ("place", pa.int64()),
        ("rank", pa.int32()),  # that computed it
        ("host", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("weight", pa.float32()),  # 0: a bad sample, whose clip is all zeros
        ("loss", pa.float32()),  # if all of a step are finite, the gradient was not
    ]
)
_NAMED_IN_LINE = 3
_TAGGED_ROLLBACKS = 50  # newest ones; a tag holds some thousand characters


class BadSteps:
    """The run's bad steps, the same list on every rank."""

    def __init__(
        self,
        run: Storage,
        notes: DeferredWrites,
        options: TrainConfig,
        name_samples: Callable[[Sequence[int]], list[tuple[str, str]]],
        control: dist.ProcessGroup,
        tracker: QueuedTracker | None,
    ) -> None:
        """`name_samples`: shard and key of what stands at places. `tracker`: on rank 0, else None."""
        self._run, self._notes = run, notes
        self._options, self._name_samples = options, name_samples
        self._control, self._tracker = control, tracker
        self._steps: list[int] = []
        self._in_a_row = 0  # newest steps without a good one; a rollback sets it to 0
        self._rollbacks: list[dict[str, int]] = []  # {"step": 503, "to_step": 500}

    def __len__(self) -> int:
        return len(self._steps)

    def restore(self, listed: dict[str, Any] | None) -> None:
        """Begin from what a checkpoint lists; None: it was made before there was such a list."""
        if listed is not None:
            self._steps, self._in_a_row = listed["steps"], listed["in_a_row"]
            self._rollbacks = listed["rollbacks"]

    def listed(self) -> dict[str, Any]:
        """JSON form, for the checkpoint."""
        return {"steps": self._steps, "in_a_row": self._in_a_row, "rollbacks": self._rollbacks}

    @property
    def in_stretch(self) -> bool:
        """Whether the newest step was bad, so that a checkpoint had better wait for a good one."""
        return self._in_a_row > 0

    @property
    def too_many(self) -> bool:
        """Whether the run must `go_back` before its next step."""
        return self._in_a_row >= self._options.max_bad_steps

    def good(self) -> None:
        """The step was applied."""
        self._in_a_row = 0

    def add(self, step: int, batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> None:
        """Collective. Step `step` was not applied. `batches`: this rank's; `losses`: [B] of each of them."""
        self._steps.append(step)
        self._in_a_row += 1
        gathered: list[Any] = [None] * dist.get_world_size()
        leads = dist.get_rank() == 0
        rows = self._rows(step, batches, losses)
        dist.gather_object(rows, gathered if leads else None, group=self._control)
        if leads:
            self._write(
                step, sorted((row for each in gathered for row in each), key=lambda row: row["place"])
            )

    def go_back(self, step: int, engine: Engine, seen: int) -> int:
        """Collective. Give `engine` the weights and moments of the newest good checkpoint; returns its step.

        Good is one that is whole and was not made directly after a bad step, by a run told to leave: its weights
        are those that are suspected. `seen`: the newest step of which anybody saw a checkpoint.

        Call it after step `step` if `too_many`, with no save in flight, and save right after: later restarts
        begin behind the rollback then. Raises RunStoppedError on all ranks if the configuration or reason
        forbid to go on.
        """
        number = f"{self._in_a_row} steps in a row had a loss or gradient norm that is not finite"
        listed = f"Their samples are listed in {self._run.uri}/{FOLDER}"
        if self._options.on_bad_steps == "stop":
            raise RunStoppedError(
                f"{number} (train.max_bad_steps, train.on_bad_steps stop). {listed}. The same command with "
                "--train.on_bad_steps rollback goes back to the newest checkpoint's weights and past these samples"
            )
        remedy = (
            "Look at loss and gradient norm before these steps and at the GPUs of the ranks listed. To go on, "
            "lower optim.base_lr or set optim.clip_grad_norm (and name it in --run.allow_change); for older "
            f"weights copy the folder that you want from {self._run.uri}/{CHECKPOINTS} to the same place under "
            "another run.name, and start that run"
        )
        if self._rollbacks and step - self._in_a_row == self._rollbacks[-1]["step"]:
            raise RunStoppedError(
                f"{number}, directly after the weights had gone back to those of step "
                f"{self._rollbacks[-1]['to_step']}: these samples are not at fault alone. {listed}. {remedy}"
            )
        if self._rollbacks_to_same_weights() >= _MAX_ROLLBACKS_TO_SAME_WEIGHTS:
            raise RunStoppedError(
                f"{number}, and the run has gone back {_MAX_ROLLBACKS_TO_SAME_WEIGHTS} times without a checkpoint "
                f"of newer weights in between. {listed}. {remedy}"
            )
        checkpoint = open_newest_whole(self._run, self._control, _is_good, seen)
        if checkpoint is None:
            raise RunStoppedError(
                f"{number}, and there is no checkpoint to go back to. {listed}. Check optim.base_lr, "
                "model.init_from and the machines, or set run.checkpoint_every_steps below the step that fails"
            )
        checkpoint.restore(engine)
        to_step = step_of(checkpoint.name)
        self._rollbacks.append({"step": step, "to_step": to_step})
        self._in_a_row = 0
        if dist.get_rank() == 0:
            print(
                f"step {step}  {number}: the weights are those of {checkpoint} again, what steps {to_step + 1} to "
                f"{step} learned is given up, and the run goes on with the samples after them",
                flush=True,
            )
        if self._tracker is not None:
            lines = [f"step {r['step']}: weights of {r['to_step']}" for r in self._rollbacks]
            self._tracker.tag(ROLLBACKS_TAG, "; ".join(lines[-_TAGGED_ROLLBACKS:]))
        return to_step

    def _rollbacks_to_same_weights(self) -> int:
        """Newest rollbacks of which each went back to the checkpoint that the one before had made."""
        number = len(self._rollbacks[-1:])
        pairs = zip(reversed(self._rollbacks[:-1]), reversed(self._rollbacks[1:]), strict=True)
        for before, after in pairs:
            if after["to_step"] != before["step"]:
                break
            number += 1
        return number

    def _rows(
        self, step: int, batches: Sequence[Batch], losses: Sequence[torch.Tensor]
    ) -> list[dict[str, Any]]:
        places = torch.cat([batch.places for batch in batches])
        real = places >= 0
        weights = torch.cat([batch.weights for batch in batches])[real].tolist()
        loss = torch.cat([each.cpu() for each in losses])[real].tolist()
        own = places[real].tolist()
        return [
            {
                **{"step": step, "place": place, "rank": dist.get_rank(), "host": socket.gethostname()},
                **{"shard": shard, "key": key, "weight": weights[i], "loss": loss[i]},
            }
            for i, (place, (shard, key)) in enumerate(zip(own, self._name_samples(own), strict=True))
        ]

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        name = f"{FOLDER}/step-{step:08d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
        content = sink.getvalue().to_pybytes()
        self._notes.put(name, content)
        culprits = [row for row in rows if not math.isfinite(row["loss"])]
        reason = "all losses are finite, the gradient norm is not"
        if culprits:
            named = "; ".join(
                f"{row['shard']} {row['key']} on rank {row['rank']} ({row['host']})"
                for row in culprits[:_NAMED_IN_LINE]
            )
            more = "; ..." if len(culprits) > _NAMED_IN_LINE else ""
            reason = f"the loss of {len(culprits)} of {len(rows)} samples is not finite: {named}{more}"
        print(
            f"step {step}  not applied, number {self._in_a_row} in a row: {reason}. "
            f"All are listed in {self._run.uri}/{name}",
            flush=True,
        )
        if self._tracker is not None:
            self._tracker.log_bytes(name, content)


def _is_good(checkpoint: Checkpoint) -> bool:
    return weights_step(checkpoint.state, step_of(checkpoint.name)) is not None
