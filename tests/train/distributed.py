"""Run a function on several gloo ranks of this machine, without Ray."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.saver import Saver
from arvideo_dist.train.engine.engine import Engine
from tests import warm


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on each rank with a gloo process group; the ranks' results, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        with warm.for_multiprocessing():
            mp.spawn(_rank, args=(world_size, Path(folder), function, args), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, results: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    store = _store(rank, world_size, results / "port")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    (results / str(rank)).write_bytes(pickle.dumps(function(*args)))
    dist.barrier()
    dist.destroy_process_group()


def _store(rank: int, world_size: int, port: Path) -> dist.TCPStore:
    """Rank 0 takes a port and says which: one that was looked for before may be another test's by now."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        said = port.with_suffix(".new")
        said.write_text(str(store.port))
        said.rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world_size, is_master=False)


def make_saver(run: Storage, engine: Engine, **options: Any) -> Saver:
    """A silent saver with fields of RunConfigSection as `options`."""
    return Saver(run, engine, RunConfigSection(**options), say=lambda line: None)


def save_checkpoint(run: Storage, engine: Engine, step: int, state: dict[str, Any], **options: Any) -> None:
    """One checkpoint, waited for."""
    saver = make_saver(run, engine, **options)
    saver.request(step, state)
    saver.finish()
