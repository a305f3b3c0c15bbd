"""Asynchronous saves: the training goes on while a checkpoint is copied, written and published.

    step loop    request ── forward, backward ── before_update ── update ── ... ── next request: waits for the save
    background     └─ copy ─────────────────────────▲  write and digest ── gather ── manifest ── old ones deleted

The state changes in the optimiser's update only, so the copy has the next step's forward and backward to itself;
`before_update` holds the update back until the copy is whole, and everything after works on the copy. One save is
in flight at a time. Its outcome is the same on all ranks, and is raised where they meet anyway: at the next save
or at the end.

Memory: every rank holds its share of the state once more on the host, 12 bytes a parameter over the number of
ranks, allocated at start (pinned on a GPU machine, where the allocator rounds up to a power of two). Object
storage may hold as much again in pieces that are on their way.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from arvideo_dist.config import RunConfigSection
from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage
from arvideo_dist.train import zero_state
from arvideo_dist.train.activity import activity
from arvideo_dist.train.checkpoint import (
    FOLDER,
    KINDS,
    MANIFEST,
    STATE,
    CheckpointError,
    CheckpointManifest,
    FragmentEntry,
    check_coverage,
    checkpoint_name,
    discard,
    retain,
    shape_of,
)
from arvideo_dist.train.engine import Engine
from arvideo_dist.train.stop import RunStoppedError

Result = TypeVar("Result")

_CHUNK_BYTES = 8 * 2**20
# Below training and decoding, but not starved by them as 19 would be: a save should also come to its end.
_NICENESS = 10
# How much later than the fastest rank the slowest may have uploaded its part.
_TIMEOUT = timedelta(hours=2)


class Saver:
    """Writes a run's checkpoints from all ranks; except for `due_*` its methods are collective."""

    def __init__(
        self,
        run: Storage,
        engine: Engine,
        options: RunConfigSection,
        say: Callable[[str], None],
    ) -> None:
        """Everything is written and deleted through `run`, which may refuse. `say` gets a line from rank 0 for
        each complete checkpoint.
        """
        self._run, self._engine, self._options = run, engine, options
        self._say = say
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # The step loop uses its groups while the background thread uses this one.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._snapshot = _Snapshot(engine)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._requested_at = time.monotonic()

    def due_by_step(self, step: int) -> bool:
        """Whether a checkpoint is wanted after optimiser step `step`, whatever the clock says."""
        every = (self._options.checkpoint_every_steps, self._options.keep_every)
        return any(step % number == 0 for number in every if number is not None)

    def due_by_time(self) -> bool:
        """Whether `checkpoint_every_minutes` have passed: rank 0's clock alone says so, to be agreed upon."""
        minutes = self._options.checkpoint_every_minutes
        if self._rank or minutes is None:
            return False
        return time.monotonic() - self._requested_at >= 60 * minutes

    def request(self, step: int, state: dict[str, Any]) -> str | None:
        """Begin to save the state as it is after `step`; waits first where the save before is not yet done.

        `state`: JSON content kept beside the tensors. Where the save before failed, this one is waited for, since
        the state in memory is worth one more try: the result is the failure's message then, else None. Raises
        CheckpointError, on all ranks, where this one fails too.
        """
        failure = self._outcome()
        self._requested_at = time.monotonic()
        state = {**state, "optimizer_steps": zero_state.optimizer_steps(self._engine)}
        self._snapshot.begin()
        self._thread = threading.Thread(
            target=self._save, args=(step, state), name=f"save-{step}", daemon=True
        )
        self._thread.start()
        if failure is None:
            return None
        if (again := self._outcome()) is not None:
            raise CheckpointError(f"two saves in a row failed: {failure}; {again}") from again
        return str(failure)

    def before_update(self) -> None:
        """Call it before the weights change: holds back until a save that has begun has its copy."""
        if self._thread is not None:
            activity.alone("waits for the copy of the state that is being saved")
            self._snapshot.hold()

    def finish(self) -> None:
        """Wait for the save in flight; raises CheckpointError on all ranks where it failed."""
        if (failure := self._outcome()) is not None:
            raise failure

    def _outcome(self) -> CheckpointError | None:
        """What became of the save in flight, once it has ended. Raises what must stop the run."""
        if self._thread is not None:
            activity.together("waits for the save in flight")
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None or isinstance(failure, CheckpointError):
            return failure
        raise failure

    # From here on: the background thread.

    def _save(self, step: int, state: dict[str, Any]) -> None:
        if sys.platform == "linux":  # where niceness belongs to a thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._write(step, state)
        except (CheckpointError, RunStoppedError) as error:
            self._failure = error
        except Exception as error:  # the group itself: a rank is gone, and the step loop is about to learn it
            self._failure = CheckpointError(f"save of step {step}: {type(error).__name__}: {error}")

    def _write(self, step: int, state: dict[str, Any]) -> None:
        name = checkpoint_name(step)
        folder = f"{FOLDER}/{name}"

        def prepare() -> str | None:
            self._snapshot.complete()
            if self._rank:
                return None
            discard(self._run, name)  # what a killed save left or damage made useless, if anything
            return secrets.token_hex(4)

        def publish() -> None:
            if self._rank == 0:
                self._publish(folder, written, state)
                self._say(f"step {step}  checkpoint {name} is complete")
                retain(self._run, name, self._options.keep_last, self._options.keep_every)

        token = self._together(folder, prepare)[0]
        # The token makes the names this save's own: no straggler of another attempt can write over its parts.
        part = f"part-{self._rank:05d}-of-{self._world_size:05d}-{token}.safetensors"
        written = self._together(folder, lambda: self._snapshot.write(self._run, folder, part))
        self._together(folder, publish)

    def _together(self, folder: str, action: Callable[[], Result]) -> list[Result]:
        """Each rank's result of `action`; where it failed on some rank, the same error on all ranks.

        A lone raise would leave the others waiting.
        """
        outcome: Any
        try:
            outcome = action(), None
        except RunStoppedError as error:
            outcome = None, error
        except Exception as error:
            outcome = None, f"rank {self._rank}: {type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * self._world_size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = [failure for _, failure in outcomes if failure is not None]
        for failure in failures:
            if isinstance(failure, RunStoppedError):
                raise failure
        if failures:
            raise CheckpointError(f"save of {self._run.uri}/{folder} failed: {'; '.join(failures)}")
        return [result for result, _ in outcomes]

    def _publish(
        self, folder: str, written: list[tuple[FileEntry, list[FragmentEntry]]], state: dict[str, Any]
    ) -> None:
        content = json.dumps(state, indent=1).encode()
        manifest = CheckpointManifest(
            shapes={name: shape_of(p) for name, p in self._engine.module.named_parameters()},
            fragments=[fragment for _, fragments in written for fragment in fragments],
            parts=[entry for entry, _ in written],
            state=FileEntry(name=STATE, size=len(content), sha256=hashlib.sha256(content).hexdigest()),
        )
        check_coverage(manifest)
        self._run.write_bytes(f"{folder}/{STATE}", content)
        self._run.write_bytes(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())


class _Snapshot:
    """A copy on the host of what this rank writes, in the byte order of its safetensors part."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._fragments = zero_state.owned_fragments(engine)
        sizes = {f"{kind}/{f.name}": f.stop - f.start for f in self._fragments for kind in KINDS}
        self._header = _safetensors_header(sizes)
        cuda = engine.device.type == "cuda"
        # Zeros are written so that the pages exist: their first touch costs more than the copy.
        self._values = torch.empty(sum(sizes.values()), pin_memory=cuda).zero_()
        self._targets = self._values.split(list(sizes.values()))
        self._sources: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(engine.device) if cuda else None
        self._copied_on_device = torch.cuda.Event() if cuda else None
        self._copied_on_host = threading.Event()

    def begin(self) -> None:
        """Step loop: note what to copy; on a GPU the copy is queued beside the steps' kernels."""
        states = (zero_state.state_of(self._engine, fragment) for fragment in self._fragments)
        self._sources = [state[kind].detach() for state in states for kind in KINDS]
        self._copied_on_host.clear()
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
            else:
                for target, source in zip(self._targets, self._sources, strict=True):
                    np.copyto(target.numpy(), source.numpy())  # one thread, and not Python's lock
        finally:
            self._sources = []
            self._copied_on_host.set()

    def write(self, run: Storage, folder: str, part: str) -> tuple[FileEntry, list[FragmentEntry]]:
        """Background: the copy as member `part`, its digest taken on the way."""
        digest, size = hashlib.sha256(), 0
        with run.streaming(f"{folder}/{part}") as file:
            for piece in self._pieces():
                digest.update(piece)
                size += file.write(piece)
        entries = [FragmentEntry(name=f.name, start=f.start, stop=f.stop, part=part) for f in self._fragments]
        return FileEntry(name=part, size=size, sha256=digest.hexdigest()), entries

    def _pieces(self) -> Iterator[bytes | memoryview]:
        yield self._header
        content = self._values.view(torch.uint8).numpy()
        for begin in range(0, len(content), _CHUNK_BYTES):
            activity.tick()  # a slow store is no hang while it takes pieces
            yield content[begin : begin + _CHUNK_BYTES].data


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
