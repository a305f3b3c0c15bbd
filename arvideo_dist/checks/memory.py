"""How much memory one training worker takes, on the host and on its GPU, part by part.

What ZeRO holds follows DeepSpeed 0.19.8 with fp32 parameters (`engine/engine.py`), of P parameters on w workers:

    stage   weights         gradients                       AdamW's moments
    0       P               P, and P sent if w > 1           2 P
    1       P + P / w       P + 2 P / w, and a bucket        2 P / w
    2       P + P / w       2 P / w, and a bucket            2 P / w
    3       P + 2 P / w     P / w, and a bucket              2 P / w

Stages 1 to 3 update a copy of this worker's share; stage 3 gathers whole weights while they are used, of models
below 10^9 parameters all of them. The bucket is DeepSpeed's reduce_bucket_size of 5 x 10^8 numbers: a GPU holds all
of it, on a CPU only what is used is there. Measured against real runs: benchmarks/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_dist.config.commands import RunConfig, TrainingConfig
from arvideo_dist.data.workers import PREFETCH_PER_WORKER
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import Derived, Workload

_FP32 = 4
_BUCKET_NUMBERS = 500_000_000
_STATE_BYTES_PER_PARAMETER = 12  # fp32 weight, exp_avg, exp_avg_sq
# Of the fp32 accounting, what autocast keeps: 0.72 for ARVideo, 0.73 for VideoMAE on an H100
# (benchmarks/results/gpu-2026-11-22.json, less the gradients).
_BF16_SHARE = 0.75
_CUDA_BYTES = 2**30  # context, libraries' workspaces, fragments of the allocator
# Beyond what a worker holds when it looks: DeepSpeed, buffers of the collectives; each decode worker's own pages.
PROCESS_BYTES = 300 * 2**20
_DECODER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at one place."""

    parts: tuple[tuple[str, int], ...]  # what for, how much
    micro_batch: int
    per_clip: int  # of the parts, what each clip of train.micro_batch adds

    @property
    def total(self) -> int:
        return sum(number for _, number in self.parts)

    def largest_micro_batch(self, room: float) -> int:
        """The largest train.micro_batch whose worker takes no more than `room` bytes; 0 if none does."""
        if self.total <= room:
            return self.micro_batch
        fixed = self.total - self.per_clip * self.micro_batch
        return max(0, int((room - fixed) // self.per_clip)) if self.per_clip else 0


NOTHING = Memory((), 1, 0)


def memory_of(config: RunConfig, derived: Workload, *, cuda: bool) -> tuple[Memory, Memory]:
    """What one worker takes on the host, and on its GPU (`NOTHING` without one); `derived`: at the world size."""
    if isinstance(config, TrainingConfig):
        training, per_clip = _training(config, derived, cuda=cuda)
    else:
        training, per_clip = _evaluation(config, derived, cuda=cuda)
    batches, batches_per_clip = _batches(config, derived, cuda=cuda)
    host = list(batches)
    if isinstance(config, TrainingConfig):
        host.append(("the copy that saves take", _saved(config, derived)))
    host.append(("processes", PROCESS_BYTES + _DECODER_BYTES * config.data.workers))
    micro = derived.micro_batch
    if cuda:
        device = (*training, ("CUDA", _CUDA_BYTES))
        return Memory(tuple(host), micro, batches_per_clip), Memory(device, micro, per_clip)
    return Memory((*training, *host), micro, per_clip + batches_per_clip), NOTHING


def _training(config: TrainingConfig, derived: Workload, *, cuda: bool) -> tuple[list[tuple[str, int]], int]:
    """Parts of the device that trains, and how many bytes of them each clip of a micro batch adds."""
    stage, world, whole = config.train.zero_stage, derived.world_size, _FP32 * derived.parameters
    share = whole // world
    bucket = _FP32 * _BUCKET_NUMBERS if cuda else min(_FP32 * _BUCKET_NUMBERS, whole)
    weights = {0: whole, 1: whole + share, 2: whole + share, 3: whole + 2 * share}[stage]
    gradients = {
        0: whole * (2 if world > 1 else 1),
        1: whole + 2 * share + bucket,
        2: 2 * share + bucket,
        3: share + bucket,
    }[stage]
    activations, per_clip = _activations(config, derived, cuda=cuda)
    moments = 2 * (whole if stage == 0 else share)
    parts = [("weights", weights), ("gradients", gradients), ("AdamW's moments", moments), activations]
    return parts, per_clip


def _evaluation(config: RunConfig, derived: Workload, *, cuda: bool) -> tuple[list[tuple[str, int]], int]:
    activations, per_clip = _activations(config, derived, cuda=cuda)
    return [("weights", _FP32 * derived.parameters), activations], per_clip


def _activations(config: RunConfig, derived: Workload, *, cuda: bool) -> tuple[tuple[str, int], int]:
    half = config.precision_on("cuda" if cuda else "cpu") == "bf16"
    factor = 1e6 * (_BF16_SHARE if half else 1)
    per_clip = int(factor * derived.activation_mb_per_clip)
    activations = per_clip * derived.micro_batch + int(factor * derived.activation_mb_per_pass)
    return (f"activations of {derived.micro_batch} clips", activations), per_clip


def batches_at_once(config: RunConfig, derived: Workload) -> int:
    """Micro batches between the decode workers and the training step: in a step's hands, and prefetched."""
    return derived.accumulation_steps + PREFETCH_PER_WORKER * config.data.workers


def clip_bytes(config: RunConfig) -> int:
    """Of one clip as it waits for its step."""
    return config.model.frames * 3 * config.model.image_size**2


def _batches(config: RunConfig, derived: Workload, *, cuda: bool) -> tuple[list[tuple[str, int]], int]:
    prefetched = PREFETCH_PER_WORKER * config.data.workers
    waiting = batches_at_once(config, derived) * derived.micro_batch * clip_bytes(config)
    parts = [("batches", waiting)]
    if cuda:  # pinned copies of a step's batches
        pinned = derived.accumulation_steps * derived.micro_batch * clip_bytes(config)
        parts.append(("their pinned copies", pinned))
    # A step's clips are as many, however they are cut.
    return parts, prefetched * clip_bytes(config)


def checkpoint_bytes(derived: Workload) -> int:
    """Of one checkpoint, on the run's storage."""
    if not isinstance(derived, Derived):  # an evaluation's has no weights
        return 0
    return _STATE_BYTES_PER_PARAMETER * derived.parameters


def _saved(config: RunConfig, derived: Workload) -> int:
    """This worker's share of the state on its way to a checkpoint (`checkpoint/saver.py`)."""
    copy = checkpoint_bytes(derived) // derived.world_size
    return copy if Storage(config.run.storage_path).is_local else 2 * copy
