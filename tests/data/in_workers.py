"""What the tests send into worker processes: apart, so that a worker imports nothing heavy for it."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arvideo_dist.data.decode import decode_rgb
from arvideo_dist.data.index import SampleRow
from arvideo_dist.data.order import Stream, sample_generator
from arvideo_dist.data.workers import watched


def draw_ids(seed: int, place: int, row: SampleRow) -> dict[str, np.ndarray]:
    """A stand-in for the model's prediction sequence: 6 context and 10 target ids."""
    order = sample_generator(seed, place, Stream.SEQUENCE).permutation(16)
    return {"context_ids": order[:6], "target_ids": order[6:]}


class Accidents:
    """Gives back the places; at some of them an accident happens, `times` times in all."""

    def __init__(self, folder: Path, place: int, times: int, accident: Callable[[], None]) -> None:
        self.folder, self.place, self.times, self.accident = folder, place, times, accident
        self.refused: dict[int, str] = {}

    def __getitem__(self, places: list[int]) -> list[tuple[int, str]]:
        for place in places:
            if place == self.place and place not in self.refused:
                with watched(place, limit_seconds=0.5):
                    happened = len(list(self.folder.iterdir()))
                    if happened < self.times:
                        (self.folder / str(happened)).touch()
                        self.accident()
        return [(place, self.refused.get(place, "fine")) for place in places]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_with_the_lock_held() -> None:
    ctypes.PyDLL(None).sleep(600)


def hang_in_a_library() -> None:
    ctypes.CDLL(None).sleep(600)


class WaitingDecoder:
    """Says through a pipe that it has begun, and decodes once another pipe is closed."""

    def __init__(self, folder: Path) -> None:
        self.begun, self.go_on = folder / "begun", folder / "go-on"
        os.mkfifo(self.begun)
        os.mkfifo(self.go_on)

    def __call__(self, video: bytes, frames: np.ndarray) -> list[np.ndarray]:
        if self.begun.exists():
            self.begun.write_text("decodes")
            self.go_on.read_text()
        return decode_rgb(video, frames)


class AlwaysDead:
    refused: dict[int, str] = {}  # noqa: RUF012

    def __getitem__(self, places: list[int]) -> None:
        kill_self()
