"""SIGKILL at any moment, also within a save: what looks complete is, and the newest complete one is the start."""

from __future__ import annotations

import multiprocessing as mp
import random
import time
import uuid
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints, step_of
from arvideo_dist.train.checkpoint.reader import Checkpoint
from tests import warm
from tests.services.s3 import S3
from tests.train.killed_ranks import MOMENTS, SAVE_EVERY, train_until_killed

WORLD_SIZE = 2


@dataclass
class Lives:
    """One run that is killed again and again: each life's start and losses, checked against what stands there."""

    run: Storage
    scratch: Path
    stage: int = 1
    losses: dict[int, float] = field(default_factory=dict)
    complete: list[str] = field(default_factory=list)

    def live(self, stop_at_save: int, moment: str | None, delay: float) -> None:
        """Start, check where it starts from, and kill: at `moment` of save number `stop_at_save` of this life, or
        without a moment `delay` seconds after that save was asked for."""
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.train.killed_ranks", "deepspeed"])
        ends = [context.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
        store = str(self.scratch / uuid.uuid4().hex)
        ranks = [
            context.Process(
                target=train_until_killed,
                args=(rank, WORLD_SIZE, store, self.run.address, self.stage, sender, stop_at_save, moment),
            )
            for rank, (_, sender) in enumerate(ends)
        ]
        with warm.for_multiprocessing():
            for process in ranks:
                process.start()
        try:
            for _, sender in ends:
                sender.close()
            readers = [reader for reader, _ in ends]
            kind, step, name = readers[0].recv()
            assert (kind, name) == ("start", self.complete[-1] if self.complete else None)
            assert step == (step_of(name) if name else 0)
            last = step + stop_at_save * SAVE_EVERY
            if moment is None:
                while step < last:
                    step = self._follow(readers[0].recv())
                time.sleep(delay)
            else:
                while self._until_there(readers):
                    pass
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        self._look()

    def _until_there(self, readers: list) -> bool:
        for reader in wait(readers):
            message = reader.recv()  # type: ignore[call-arg]
            if message == "there":
                return False
            if reader is readers[0]:
                self._follow(message)
        return True

    def _follow(self, message: tuple) -> int:
        """A step that is run again gives the same loss, to the bit: it began from what it should."""
        kind, step, loss = message
        assert kind == "step"
        assert self.losses.setdefault(step, loss) == loss, f"step {step} after another life"
        return step

    def _look(self) -> None:
        """Whatever looks complete is, and nothing complete was lost."""
        complete = complete_checkpoints(self.run)
        for name in complete:
            Checkpoint(self.run, name).verify()
        assert complete[-1:] >= self.complete[-1:]
        self.complete = complete


def _many_lives(run: Storage, scratch: Path, seed: int, kills: int) -> Lives:
    """Every third kill within a save, at each of its moments in turn; the others at random."""
    draw, lives = random.Random(seed), Lives(run, scratch)
    moments = list(MOMENTS)
    draw.shuffle(moments)
    for number in range(kills):
        within = number % 3 == 0
        moment = moments[number // 3 % len(moments)] if within else None
        lives.live(draw.randint(1, 4), moment, draw.uniform(0, 0.2))
    return lives


def test_killed_within_a_save_and_beside_it(tmp_path: Path) -> None:
    """The short form of the test below."""
    lives = Lives(Storage(str(tmp_path / "run")), tmp_path)
    lives.live(2, "part half", 0)
    assert lives.complete == ["step-00000002"]
    assert (tmp_path / "run" / FOLDER / "step-00000004").exists()
    lives.live(1, "published", 0)
    assert lives.complete == ["step-00000002", "step-00000004"]
    lives.live(1, None, 0)


@pytest.mark.slow
def test_twenty_kills_on_disk(tmp_path: Path) -> None:
    assert _many_lives(Storage(str(tmp_path / "run")), tmp_path, seed=1, kills=24).complete


@pytest.mark.slow
def test_twenty_kills_on_s3(tmp_path: Path, s3: S3) -> None:
    s3.make_bucket("kills")
    assert _many_lives(Storage(s3.uri("kills/run")), tmp_path, seed=2, kills=24).complete
