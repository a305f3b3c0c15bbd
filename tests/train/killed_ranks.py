"""Ranks that train and save until they are killed, for test_kills.py; started from a fork server, in a second."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import IO, Any

import torch
import torch.distributed as dist

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
from tests.train.distributed import make_saver
from tests.train.keyed import GLOBAL_BATCH, new_engine, new_model, state_at, train_steps

SAVE_EVERY = 2
TOTAL_STEPS = 10_000  # of the schedule; every run is killed long before
# Where a save can be when it is killed: before anything, within and after each rank's part, around state and
# manifest, and while older checkpoints are deleted.
MOMENTS = ("discard", "part begun", "part half", "part written", "state", "manifest", "published", "retained")


class StoppingStorage(Storage):
    """Tells the parent at one moment of the save of `step`, and stays there until it is killed."""

    def __init__(self, uri: str, pipe: Connection, step: int, moment: str | None) -> None:
        super().__init__(uri)
        self._pipe, self._moment = pipe, moment
        self._name = f"{FOLDER}/step-{step:08d}"
        self._published = False

    def _reached(self, moment: str, name: str) -> None:
        if moment == self._moment and (name.startswith(self._name) or self._published):
            self._pipe.send("there")
            time.sleep(3600)

    def delete(self, name: str) -> None:
        super().delete(name)
        self._reached("retained" if self._published else "discard", name)

    @contextmanager
    def streaming(self, name: str) -> Iterator[IO[bytes]]:
        with super().streaming(name) as file:
            self._reached("part begun", name)
            yield _Half(file, lambda: self._reached("part half", name))
        self._reached("part written", name)

    def write_bytes(self, name: str, data: bytes) -> None:
        if name.endswith("manifest.json"):
            self._reached("manifest", name)
        super().write_bytes(name, data)
        if name.endswith("manifest.json"):
            self._published |= name.startswith(self._name)
            self._reached("published", name)
        elif name.endswith("state.json"):
            self._reached("state", name)


class _Half:
    """A file that has half of each piece when it reports."""

    def __init__(self, file: IO[bytes], report: Any) -> None:
        self._file, self._report = file, report

    def write(self, piece: bytes) -> int:
        half = len(piece) // 2
        self._file.write(memoryview(piece)[:half])
        self._report()
        self._file.write(memoryview(piece)[half:])
        return len(piece)


def train_until_killed(
    rank: int,
    world_size: int,
    store: str,
    uri: str,
    stage: int,
    pipe: Connection,
    stop_at_save: int,
    moment: str | None,
) -> None:
    """Sends ("start", step, checkpoint), then ("step", step, loss) for each step. Where `moment` is set, stays at
    it in save number `stop_at_save` and sends "there".
    """
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    control = dist.group.WORLD
    assert control is not None
    model = new_model()
    found = open_newest_whole(Storage(uri), control)
    step = 0
    if found is not None:
        found.load_weights(model, control)
        step = found.state["position"] // GLOBAL_BATCH
    engine = new_engine(model, stage)
    if isinstance(found, Checkpoint):
        found.load_optimizer(engine)
    pipe.send(("start", step, found and found.name))
    run = StoppingStorage(uri, pipe, step + stop_at_save * SAVE_EVERY, moment)
    saver = make_saver(run, engine, keep_last=2)
    while True:
        (loss,) = train_steps(engine, step, step + 1, TOTAL_STEPS, saver)
        step += 1
        pipe.send(("step", step, loss))
        if step % SAVE_EVERY == 0:
            saver.request(step, state_at(step))
