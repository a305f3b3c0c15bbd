"""Decode processes that outlive accidents: a torch DataLoader whose pool is replaced when a worker dies.

A worker that dies (killed, out of memory, a decoder's crash) or hangs costs nothing but time: the pool is
started again at the first micro batch that was not delivered. A sample on which workers die twice is a bad
sample.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from arvideo_dist import stacks
from arvideo_dist.data.shared import Parcel, SlotFile, filling

log = logging.getLogger(__name__)

# Imported once in the fork server, so that a worker starts in milliseconds and shares their memory.
_PRELOAD = ["torch.utils.data", "pyarrow.fs", "pyarrow.parquet", "decord", "av", "arvideo_dist.data.loader"]
_PRELOAD_IF_USED = ["arvideo_dist.s3"]  # by the rank
PREFETCH_PER_WORKER = 2  # micro batches; bounds what waits in shared memory (back-pressure)
_STRIKES = 2  # deaths on one place that make it a bad sample
_STARTS_WITHOUT_RESULT = 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_IDLE = -1  # no place is being decoded, or read

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class DecodeWorkersError(RuntimeError):
    """Decode workers die again and again without delivering anything."""


class PlacesToBatch(Protocol[BatchT_co]):
    """What the workers run. Sent to each of them."""

    refused: dict[int, str]  # place -> reason; not to be decoded again

    def __getitem__(self, places: list[int]) -> BatchT_co: ...


class DecodePool(Generic[BatchT]):
    """Maps lists of places to batches, in order, in `workers` processes (0: in this one)."""

    def __init__(
        self, samples: PlacesToBatch[BatchT], workers: int, pin_memory: bool, slot_bytes: int = 0
    ) -> None:
        """`slot_bytes`: what the tensors of a batch from `shared_empty` take; 0 if there are none."""
        self.samples, self.workers, self.pin_memory = samples, workers, pin_memory
        self.slot_bytes = slot_bytes
        self._at = torch.empty(2, 0)

    def at(self) -> list[tuple[int, str, int]]:
        """Where each worker is that reads or decodes a sample: (its number, "reads" or "decodes", place)."""
        decoded, read = self._at.tolist()
        return [
            (number, "reads", int(read[number])) if place == _IDLE else (number, "decodes", int(place))
            for number, place in enumerate(decoded)
            if place != _IDLE or read[number] != _IDLE
        ]

    def run(self, requests: Iterator[list[int]]) -> Generator[BatchT]:
        """Yields the batch of each request. Raises what `samples` raises, and DecodeWorkersError."""
        if not self.workers:
            for request in requests:
                yield self.samples[request]
            return
        undelivered: deque[list[int]] = deque()
        strikes: Counter[int] = Counter()
        starts = 0
        while True:
            self._at = torch.full((2, self.workers), _IDLE).share_memory_()
            progress = self._at[0]
            context = _WorkerContext()
            slots = SlotFile(self.slot_bytes) if self.slot_bytes else None
            numbered = _numbered(_recorded(requests, undelivered), slots)
            dataset = _InWorker(self.samples, self._at, slots)
            batches = iter(self._data_loader(context, dataset, numbered))
            try:
                for batch in batches:
                    undelivered.popleft()
                    starts = 0
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                dead = context.dead_workers()
                if not dead:
                    raise
                starts += 1
                self._note_deaths(dead, progress, strikes, starts, error)
            del batches  # ends the rest of the pool

    def _note_deaths(
        self,
        dead: dict[int, int | None],
        progress: torch.Tensor,
        strikes: Counter[int],
        starts: int,
        error: Exception,
    ) -> None:
        for worker, exit_code in dead.items():
            place = int(progress[worker])
            log.warning(
                "decode worker %d died (exit code %s) %s; its positions are read again",
                worker, exit_code, "idle" if place == _IDLE else f"on place {place}",
            )  # fmt: skip
            if place != _IDLE:
                strikes[place] += 1
                if strikes[place] == _STRIKES:
                    self.samples.refused[place] = f"decode: {_STRIKES} workers died or hung on it"
        if starts == _STARTS_WITHOUT_RESULT:
            raise DecodeWorkersError(
                f"decode workers died {starts} times in a row before they delivered anything (exit codes "
                f"{sorted({str(code) for code in dead.values()})}): check the node's memory, which the "
                "clips on their way to the training process share, or lower data.workers"
            ) from error

    def _data_loader(
        self, context: _WorkerContext, dataset: _InWorker[BatchT], requests: Iterator[_Request]
    ) -> DataLoader[BatchT]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # what comes out of a parcel is the batch
            sampler=requests,
            batch_size=None,  # an index is a whole micro batch
            collate_fn=_as_is,
            num_workers=self.workers,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCH_PER_WORKER,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else the loader draws from the rank's own generator
        )


def _recorded(requests: Iterator[list[int]], undelivered: deque[list[int]]) -> Iterator[list[int]]:
    yield from list(undelivered)
    for request in requests:
        undelivered.append(request)
        yield request


_Request = tuple[int | None, list[int]]  # a slot's number and the places


def _numbered(requests: Iterator[list[int]], slots: SlotFile | None) -> Iterator[_Request]:
    for request in requests:
        yield slots.take() if slots else None, request


def _as_is(parcel: Any) -> Any:
    return parcel


class _InWorker(Dataset[Parcel], Generic[BatchT]):
    """The samples, the table in which workers note what they are at, and where batches go."""

    def __init__(self, samples: PlacesToBatch[BatchT], at: torch.Tensor, slots: SlotFile | None) -> None:
        """`at`: int64 [2, workers], the places that are being decoded, and read."""
        self.samples, self.at, self.slots = samples, at, slots

    def __getitem__(self, request: _Request) -> Parcel:
        number, places = request
        with filling(self.slots, number) as slot:
            return Parcel(self.samples[places], self.slots, number, slot)


@contextmanager
def watched(place: int, limit_seconds: float) -> Iterator[None]:
    """Around the decoding of one sample: notes the place, and ends the worker with a traceback on stderr if
    it takes longer than `limit_seconds`. The watch is a thread of the C library's, so a decoder that hangs with
    Python's lock held ends as well. Does nothing outside a worker."""
    info = get_worker_info()
    if info is None:
        yield
        return
    assert isinstance(info.dataset, _InWorker)
    progress = info.dataset.at[0]
    progress[info.id] = place
    faulthandler.dump_traceback_later(limit_seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        progress[info.id] = _IDLE


@contextmanager
def reading(place: int) -> Iterator[None]:
    """Around the reading of one sample: notes the place, for who asks why a batch does not come."""
    info = get_worker_info()
    if info is None:
        yield
        return
    assert isinstance(info.dataset, _InWorker)
    info.dataset.at[1, info.id] = place
    try:
        yield
    finally:
        info.dataset.at[1, info.id] = _IDLE


def _start_worker(worker_id: int) -> None:
    stacks.keep_ready()
    gc.freeze()  # what was imported is not searched for garbage again and again: 0.1 s each time
    _keep_freed_memory()
    _follow_parent()


def _keep_freed_memory() -> None:
    """Have the C library keep what was freed instead of giving it back: pictures are large enough that each one
    would be mapped, filled with zeros page by page, and unmapped again, a sixth of a clip's CPU time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have no such cost or no such knob
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**28)
        mallopt(_M_TRIM_THRESHOLD, 2**29)


def _follow_parent() -> None:
    """Die with the rank, also when it is killed. torch's own watch looks at the parent process, which for a
    worker from the fork server is the fork server, and that one lives as long as any worker does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


class _WorkerProcess(ForkServerProcess):
    """A process that does not run the parent's main module again."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  # multiprocessing's hook
        with _hidden_main():
            return ForkServerProcess._Popen(process_obj)


class _WorkerContext(ForkServerContext):
    """Processes from a fork server: safe if the rank has threads (Ray, NCCL), cheaper than spawn."""

    def __init__(self) -> None:
        self.processes: list[_WorkerProcess] = []  # in the order of the worker numbers
        self.set_forkserver_preload(_PRELOAD + [name for name in _PRELOAD_IF_USED if name in sys.modules])

    def Process(self, *args: Any, **kwargs: Any) -> _WorkerProcess:  # type: ignore[override]  # noqa: N802
        process = _WorkerProcess(*args, **kwargs)
        self.processes.append(process)
        return process

    def dead_workers(self) -> dict[int, int | None]:
        """Exit code by worker number. Waits a moment: a lost connection shows before the death behind it."""
        wait([process.sentinel for process in self.processes], timeout=2)
        return {i: p.exitcode for i, p in enumerate(self.processes) if not p.is_alive()}


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Hides where `__main__` came from: multiprocessing would import it again in each child, and in a Ray
    worker it is Ray's own worker script."""
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)
