"""A real process group between the workers: does it come up, and how fast is it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

GROUP_TIMEOUT_S = 60.0

_ROUNDS = 5
_GPU_BYTES = 2**28
_CPU_BYTES = 2**24


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of one rank."""

    all_reduce: float  # bus bandwidth, 2 (n - 1) / n bytes over the time of one: nccl-tests' figure
    ring: float  # sending to the next rank while receiving from the one before


def measure(rank: int, world: int, address: str, *, cuda: bool) -> Bandwidth:
    """Collective. Join a group at `address` (host:port of rank 0), measure, leave.

    Raises RuntimeError (torch's DistError and its like) if the group does not come up in time.
    """
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")  # Ray shows each actor its own
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
        device_id=device if cuda else None,
    )
    try:
        data = torch.ones((_GPU_BYTES if cuda else _CPU_BYTES) // 4, device=device)
        expected = float(world)
        times = []
        for _ in range(_ROUNDS + 1):  # the first one sets connections up
            data.fill_(1)
            times.append(_timed(lambda: dist.all_reduce(data), device))
            if not bool((data == expected).all()):
                raise RuntimeError(f"an all-reduce of ones over {world} workers did not give {world}")
        reduce_s = sorted(times[1:])[_ROUNDS // 2]
        ring_s = reduce_s
        if world > 1:
            received = torch.empty_like(data)

            def exchange() -> None:
                works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, data, (rank + 1) % world),
                        dist.P2POp(dist.irecv, received, (rank - 1) % world),
                    ]
                )
                for work in works:
                    work.wait()

            ring_s = sorted([_timed(exchange, device) for _ in range(_ROUNDS + 1)][1:])[_ROUNDS // 2]
        return Bandwidth(2 * (world - 1) / world * data.nbytes / reduce_s, data.nbytes / ring_s)
    finally:
        dist.destroy_process_group()


def _timed(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
