"""Memory in which decode workers leave their batches for the training process, used again and again.

A fresh page of shared memory costs several times what writing it does: the kernel clears it, and both processes
map it. So the training process makes one file of many slots. A request to a worker names a free slot, the
batch's large tensors are written there, and the slot is free again when the last tensor over it is gone. Slots
that were never used take no memory. If no slot is free, or one is too small, a batch travels as torch's
loader sends it, in memory of its own.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

SLOTS = 256  # more than are in flight and held by an optimiser step
_ALIGNMENT = 64
SMALL_BYTES = 2**20  # cheaper through the pipe than in shared memory of their own


class SlotFile:
    """The slots, in the training process and, sent there, in its workers."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        fd = os.memfd_create("batches")
        os.ftruncate(fd, SLOTS * self.slot_bytes)
        self._map(fd)
        self._free = list(range(SLOTS))[::-1]  # what was freed last is taken first: its pages are there
        _FILES[id(self)] = self

    def _map(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self._bytes = np.frombuffer(mmap.mmap(fd, SLOTS * self.slot_bytes), np.uint8)

    def __getstate__(self) -> tuple[int, int, Any]:
        return id(self), self.slot_bytes, DupFd(self._fd)

    def __setstate__(self, state: tuple[int, int, Any]) -> None:
        self.key, self.slot_bytes, fd = state
        self._map(fd.detach())

    def take(self) -> int | None:
        """The number of a free slot, or None."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def slot(self, number: int) -> torch.Tensor:
        """The bytes of slot `number`. In the training process it is free again when no tensor over it is left."""
        array = self._bytes[number * self.slot_bytes : (number + 1) * self.slot_bytes]
        if id(self) in _FILES:
            weakref.finalize(array, self._free.append, number).atexit = False
        return torch.from_numpy(array)  # holds `array`


# In the training process: batches come out of a queue of torch's, which knows nothing of where they belong.
_FILES: weakref.WeakValueDictionary[int, SlotFile] = weakref.WeakValueDictionary()


class Parcel:
    """A batch on its way out of a worker; what arrives is the batch itself."""

    def __init__(
        self, batch: Any, slots: SlotFile | None, number: int | None, used: torch.Tensor | None
    ) -> None:
        self.batch, self.slots, self.number, self.used = batch, slots, number, used

    def __reduce__(self) -> Any:
        buffer = io.BytesIO()
        _Pickler(buffer, self.used).dump(self.batch)
        return _open, (self.slots.key if self.slots else None, self.number, buffer.getvalue())


class _Pickler(ForkingPickler):
    def __init__(self, buffer: io.BytesIO, slot: torch.Tensor | None) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.slot = None if slot is None else slot.untyped_storage().data_ptr()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self.slot:
            return value.shape, value.stride(), value.storage_offset()
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.nbytes <= SMALL_BYTES:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    slot: torch.Tensor | None = None

    def persistent_load(self, place: Any) -> torch.Tensor:
        assert self.slot is not None
        return self.slot.as_strided(*place)


def _open(key: int | None, number: int | None, data: bytes) -> Any:
    reader = _Unpickler(io.BytesIO(data))
    if key is not None and number is not None:
        reader.slot = _FILES[key].slot(number)
    return reader.load()


_current: list[Any] | None = None  # in a worker: the slot being filled and how much of it is taken


@contextmanager
def filling(slots: SlotFile | None, number: int | None) -> Iterator[torch.Tensor | None]:
    """While it lasts, `shared_empty` gives out parts of that slot."""
    global _current
    slot = None if slots is None or number is None else slots.slot(number)
    _current = None if slot is None else [slot, 0]
    try:
        yield slot
    finally:
        _current = None


def shared_empty(*shape: int) -> torch.Tensor:
    """uint8 of any content; in a worker it lies where the training process sees it, which saves a copy."""
    count = math.prod(shape)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    if _current is not None and _current[1] + count <= len(_current[0]):
        slot, start = _current
        _current[1] = start + -(-count // _ALIGNMENT) * _ALIGNMENT
        return slot[start : start + count].view(shape)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(max(1, count))
    return torch.tensor([], dtype=torch.uint8).set_(storage)[:count].view(shape)
