"""Checkpoints: state by parameter name, apart from how ZeRO laid it out.

    <run>/checkpoints/step-00000500/
        part-00000-of-00002-1f0c9a3e.safetensors   each rank's fragments: weight/, exp_avg/ and exp_avg_sq/<name>
        untrained-1f0c9a3e.safetensors             frozen parameters and persistent buffers, if there are some
        state.json                                 position, optimiser steps, configuration, versions, ...
        manifest.json                              sizes and digests of these, and where each fragment belongs

A checkpoint becomes visible when `manifest.json` appears, which is written last (`saver.py`); without it the
folder is not a checkpoint. Only safetensors and JSON are read back: nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, complete_checkpoints, step_of
from arvideo_dist.train.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointManifest,
    FragmentEntry,
    shape_of,
    type_name,
)
from arvideo_dist.train.checkpoint.parts import Slice, read_slices
from arvideo_dist.train.checkpoint.seen import not_seen_again
from arvideo_dist.train.checkpoint.untrained import broadcast, persistent_buffers
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.lease import GuardedStorage
from arvideo_dist.train.run.stop import RunStoppedError, StoreAwayError

_PIECE_BYTES = 32 * 2**20  # of a part that is verified; a request to an object store


class Checkpoint:
    """A complete checkpoint, opened for reading by parameter name. Needs no engine and no process group."""

    def __init__(self, run: Storage, name: str) -> None:
        self.name = name
        self.damaged_newer: list[str] = []  # names that were passed over on the way to this one
        self._run, self._folder = run, f"{FOLDER}/{name}"
        self.manifest = CheckpointManifest.model_validate_json(run.read_bytes(f"{self._folder}/{MANIFEST}"))
        if self.manifest.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self} has format version {self.manifest.format_version}, not {FORMAT_VERSION}"
            )
        content = run.read_bytes(f"{self._folder}/{STATE}")
        if hashlib.sha256(content).hexdigest() != self.manifest.state.sha256:
            raise CheckpointError(f"{self}: {STATE} is damaged")
        self.state: dict[str, Any] = json.loads(content)

    def __str__(self) -> str:
        return f"{self._run.uri}/{self._folder}"

    def verify(self, parts: list[FileEntry] | None = None) -> None:
        """Compare size and digest of `parts` (default: all) with the manifest; raises CheckpointError."""
        for part in self.manifest.parts if parts is None else parts:
            activity.tick()
            member = f"{self._folder}/{part.name}"
            try:
                size = self._run.size(member)
            except FileNotFoundError:
                raise CheckpointError(f"{self}: {part.name} is missing") from None
            if size != part.size or self._sha256(member, part.size) != part.sha256:
                raise CheckpointError(
                    f"{self}: {part.name} is damaged (size or sha256 differs from the manifest)"
                )

    def _sha256(self, member: str, size: int) -> str:
        """As `Storage.sha256`, which would tell no hang watch that a large part advances."""
        digest = hashlib.sha256()
        for begin in range(0, size, _PIECE_BYTES):
            digest.update(self._run.read_range(member, begin, _PIECE_BYTES))
            activity.tick()
        return digest.hexdigest()

    def load_weights(self, module: torch.nn.Module, control: dist.ProcessGroup | None = None) -> None:
        """Copy weights and buffers into `module`, which must have exactly the checkpoint's tensors.

        With `control`, a gloo group, collective: its rank 0 reads and gives them to the others, so that the store
        is asked once whatever the number of ranks.
        """
        tensors: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **persistent_buffers(module)}
        wanted = {name: (shape_of(tensor), type_name(tensor)) for name, tensor in tensors.items()}
        if wanted != (held := self.manifest.kinds_of_tensors()):
            differing = sorted(n for n in wanted.keys() | held.keys() if wanted.get(n) != held.get(n))
            raise ValueError(
                f"{self} holds another model than the configuration asks for; tensors that differ: "
                f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}. "
                "Use the run's own model settings, or another run.name"
            )
        if control is None or dist.get_rank(control) == 0:
            self._read(("weight", name, 0, tensors[name].detach().view(-1)) for name in self.manifest.shapes)
            self._read_untrained(tensors)
        if control is not None:
            for tensor in tensors.values():
                broadcast(tensor, control)

    def load_optimizer(self, engine: Engine) -> None:
        """Set this rank's AdamW moments and step count, from those parts that hold some of them.

        ValueError, on all ranks, if parameters are trained now that were frozen, which have no moments, or frozen
        that were trained, whose moments would be lost.
        """
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        if differing := sorted(trained ^ self.manifest.shapes.keys()):
            raise ValueError(
                f"{self} was saved with other parameters frozen than are now; those that differ: {differing[:5]}"
            )
        zero_state.create_moments(engine, self.state["optimizer_steps"])
        self._read_held(engine, zero_state.MOMENTS)

    def restore(self, engine: Engine) -> None:
        """All that training changes in an engine becomes this checkpoint's. Collective."""
        with zero_state.weights_change(engine):
            self._read_held(engine, ("weight",))
        self._read_untrained(persistent_buffers(engine.module))
        self.load_optimizer(engine)

    def _read_held(self, engine: Engine, kinds: tuple[str, ...]) -> None:
        self._read(
            (kind, fragment.name, fragment.start, zero_state.state_of(engine, fragment)[kind])
            for fragment in zero_state.held_fragments(engine)
            for kind in kinds
        )

    def _read_untrained(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill those of `targets` (by name) that are not trained."""
        entry = self.manifest.untrained
        if entry is None:
            return
        part, wanted = f"{self._folder}/{entry.part}", entry.tensors.keys() & targets.keys()
        whole = {name: targets[name].detach().contiguous() for name in wanted}
        read_slices(self._run, [Slice(part, name, 0, tensor.view(-1)) for name, tensor in whole.items()])
        for name, tensor in whole.items():
            targets[name].detach().copy_(tensor)

    def _read(self, targets: Iterable[tuple[str, str, int, torch.Tensor]]) -> None:
        """Fill flat `targets` (kind, parameter, its first element there, tensor) with what is stored.

        The digests have been compared before, by `verify`, perhaps on other ranks: of the store it is trusted that
        it gives the same bytes again. No save writes to a name that has been written to.
        """
        by_name: dict[str, list[FragmentEntry]] = {}
        for entry in self.manifest.fragments:
            by_name.setdefault(entry.name, []).append(entry)
        slices = []
        for kind, name, start, target in targets:
            for entry in by_name[name]:
                first, last = max(entry.start, start), min(entry.stop, start + target.numel())
                if first < last:
                    part, tensor = f"{self._folder}/{entry.part}", f"{kind}/{name}"
                    wanted = target[first - start : last - start]
                    slices.append(Slice(part, tensor, first - entry.start, wanted))
        read_slices(self._run, slices)


def open_newest_whole(
    run: Storage,
    control: dist.ProcessGroup,
    is_wanted: Callable[[Checkpoint], bool] = lambda found: True,
    seen: int = 0,
) -> Checkpoint | None:
    """Collective: the newest checkpoint whose content is what its manifest says, the same on all ranks.

    The ranks verify the parts in turn. A damaged checkpoint is named and the one before it is tried; one that
    is not wanted is passed over. None if the run has no wanted checkpoint; RunStoppedError if it has some
    and all are damaged. `seen`: the newest step of which anybody saw a checkpoint here; StoreAwayError on all ranks
    if the store shows none of that step or a later one.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    listed = [patiently(lambda: complete_checkpoints(run)) if rank == 0 else []]
    dist.broadcast_object_list(listed, src=0, group=control)
    if away := not_seen_again(run, step_of(listed[0][-1]) if listed[0] else 0, seen):
        raise StoreAwayError(away)
    damaged: list[tuple[str, str]] = []
    for name in reversed(listed[0]):
        fault = None
        try:
            found = patiently(functools.partial(Checkpoint, run, name))
            patiently(functools.partial(found.verify, found.manifest.parts[rank::world_size]))
        except (CheckpointError, ValidationError, FileNotFoundError) as error:
            fault = f"{error} (rank {rank} on {socket.gethostname()})"
            if isinstance(run, GuardedStorage):
                # What is missing on a machine that has lost the whole store is no damage.
                patiently(run.guard.check)
        faults: list[str | None] = [None] * world_size
        dist.all_gather_object(faults, fault, group=control)
        if not any(faults):
            if is_wanted(found):
                found.damaged_newer = [each for each, _ in damaged]
                return found
            continue
        damaged.append((name, next(filter(None, faults))))
        if rank == 0:
            print(f"not used, the one before it is tried: {damaged[-1][1]}", flush=True)
    if listed[0] and len(damaged) == len(listed[0]):
        raise RunStoppedError(
            f"all checkpoints in {run.uri}/{FOLDER} are damaged, the newest: {damaged[0][1]}. If that machine has "
            "lost the storage, mend that, and the same command continues; else restore a checkpoint from a copy, "
            "or set another run.name to begin anew"
        )
    return None
