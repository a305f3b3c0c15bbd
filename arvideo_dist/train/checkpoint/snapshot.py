"""A copy on the host of what a rank saves, so that training goes on while it is written."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.manifest import KINDS, FragmentEntry, UntrainedEntry
from arvideo_dist.train.checkpoint.untrained import Untrained
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity

_CHUNK_BYTES = 8 * 2**20


class Snapshot:
    """A copy on the host of what this rank writes: its fragments in the byte order of its safetensors part, and
    what the optimiser does not update."""

    def __init__(self, engine: Engine) -> None:
        """Collective."""
        self._engine = engine
        self.untrained = Untrained(engine)
        self._fragments = zero_state.owned_fragments(engine)
        # Kind by kind, so that who wants weights alone reads one stretch.
        sizes = {f"{kind}/{f.name}": f.stop - f.start for kind in KINDS for f in self._fragments}
        self._header = _safetensors_header(sizes)
        cuda = engine.device.type == "cuda"
        # Zeros are written so that the pages exist: their first touch costs more than the copy.
        self._values = torch.empty(sum(sizes.values()), pin_memory=cuda).zero_()
        self._targets = self._values.split(list(sizes.values()))
        self._sources: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(engine.device) if cuda else None
        self._copied_on_device = torch.cuda.Event() if cuda else None
        self._copied_on_host = threading.Event()
        # Set while an object store's client is at work. It queues the pieces and waits at the end until all are
        # stored: that may take longer than run.hung_s and is no hang, since its own limits (3 s of silence, a few
        # attempts) end each request that is not answered. Nothing ends a write to a disk that hangs, or the ranks'
        # waiting for one of them that hangs: it is not set then.
        self.uploading = threading.Event()

    def begin(self) -> None:
        """Step loop: note what to copy; on a GPU the copy is queued beside the steps' kernels."""
        states = [zero_state.state_of(self._engine, fragment) for fragment in self._fragments]
        self._sources = [state[kind].detach() for kind in KINDS for state in states]
        self._copied_on_host.clear()
        self.untrained.begin()
        if self._stream is not None:
            assert self._copied_on_device is not None
            self._stream.wait_stream(torch.cuda.current_stream(self._engine.device))
            with torch.cuda.stream(self._stream):
                for target, source in zip(self._targets, self._sources, strict=True):
                    target.copy_(source, non_blocking=True)
            self._copied_on_device.record(self._stream)

    def hold(self) -> None:
        """Step loop: nothing after this changes the state before the copy is whole."""
        if self._copied_on_device is not None:
            torch.cuda.current_stream(self._engine.device).wait_event(self._copied_on_device)
        else:
            self._copied_on_host.wait()

    def complete(self) -> None:
        """Background: returns when the copy is whole."""
        try:
            if self._copied_on_device is not None:
                self._copied_on_device.synchronize()
                with torch.cuda.stream(self._stream):
                    self.untrained.complete()
            else:
                for target, source in zip(self._targets, self._sources, strict=True):
                    np.copyto(target.numpy(), source.numpy())  # one thread, and not Python's lock
        finally:
            self._sources = []
            self._copied_on_host.set()

    def write(self, run: Storage, folder: str, part: str) -> tuple[FileEntry, list[FragmentEntry]]:
        """Background: the fragments as member `part`."""
        values = self._values.view(torch.uint8).numpy()
        written = self._stream_out(run, folder, part, [self._header, values.data])
        entries = [FragmentEntry(name=f.name, start=f.start, stop=f.stop, part=part) for f in self._fragments]
        return written, entries

    def write_untrained(self, run: Storage, folder: str, part: str) -> tuple[FileEntry, UntrainedEntry]:
        """Background, on rank 0: frozen parameters and buffers as member `part`."""
        content = memoryview(self.untrained.content())
        return self._stream_out(run, folder, part, [content]), self.untrained.entry(part)

    def _stream_out(
        self, run: Storage, folder: str, part: str, content: Sequence[bytes | memoryview]
    ) -> FileEntry:
        """Write a member piece by piece, its digest taken on the way."""
        digest, size = hashlib.sha256(), 0
        if not run.is_local:
            self.uploading.set()
        try:
            with run.streaming(f"{folder}/{part}") as file:
                for piece in _pieces(content):
                    digest.update(piece)
                    size += file.write(piece)
        finally:
            self.uploading.clear()
        return FileEntry(name=part, size=size, sha256=digest.hexdigest())


def _pieces(content: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for whole in content:
        for begin in range(0, len(whole), _CHUNK_BYTES):
            activity.tick()  # a slow disk is no hang while it takes pieces
            yield whole[begin : begin + _CHUNK_BYTES]


def _safetensors_header(sizes: dict[str, int]) -> bytes:
    """What stands before the values of flat fp32 tensors of `sizes` elements, one after the other.

    The format (https://github.com/huggingface/safetensors#format) is a header's length in 8 bytes, the header as
    JSON padded to 8 bytes, the values. The library writes it from tensors only, without digest and not to a stream.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 4 * size
        entries[name] = {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
