"""How much of each resource a run takes on a machine, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_dist.checks.memory import Memory, batches_at_once, clip_bytes, memory_of
from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.sources import loader_options
from arvideo_dist.data.shared import SLOTS, SMALL_BYTES
from arvideo_dist.tasks.derived import Workload

# NCCL's shared-memory segment of one connection ("Error while creating shared memory segment ... (size
# 9637888)" in its issues 290, 342, 525) times two channels and two directions.
_NCCL_BYTES = 4 * 9_637_888
_FLOOR_BYTES = 2**20  # queues' semaphores and the decode workers' progress table

_INDEX_BYTES_PER_SAMPLE = 200  # an Arrow index of 10^8 rows takes 20 GB


@dataclass(frozen=True)
class Needs:
    """In bytes; `shm`, `memory` and `device_memory` of one training worker, the others of a node or the run."""

    shm: int
    shm_for_large_batches: int  # what passes through /dev/shm if device_transforms underrates a batch
    memory: Memory  # of the host
    device_memory: Memory  # of the worker's GPU
    index: int  # the mapped index, once a node
    shard_cache: int


def needs_of(config: RunConfig, derived: Workload, *, cuda: bool) -> Needs:
    """`derived`: at the world size that is meant.

    Batches wait in slots of a memfd (`data/shared.py`), which the size of /dev/shm does not bound. Through
    /dev/shm go a batch that finds no slot, and index tensors too large for the pipe.
    """
    data, options = config.data, loader_options(config.data, pin_memory=cuda)
    clips_bytes, batches = derived.micro_batch * clip_bytes(config), batches_at_once(config, derived)
    ids = [8 * derived.micro_batch * tokens for tokens in (derived.encoder_tokens, derived.decoder_queries)]
    shared_ids = sum(size for size in ids if size > SMALL_BYTES)
    shm = _FLOOR_BYTES
    if data.workers:
        shm += batches * shared_ids + max(0, batches - SLOTS) * clips_bytes
    memory, device_memory = memory_of(config, derived, cuda=cuda)
    return Needs(
        shm=shm + (_NCCL_BYTES if cuda else 0),
        shm_for_large_batches=batches * clips_bytes if data.workers and options.device_transforms else 0,
        memory=memory,
        device_memory=device_memory,
        index=_INDEX_BYTES_PER_SAMPLE * (derived.samples or 0),
        shard_cache=int(options.shard_cache_gib * 2**30),
    )
