"""Checkpoints: state by parameter name, apart from how ZeRO laid it out.

    <run>/checkpoints/step-00000500/
        part-00000-of-00002.safetensors   each rank's fragments: weight/<name>, exp_avg/<name>, exp_avg_sq/<name>
        state.json                        position, optimiser steps, configuration, versions, ...
        manifest.json                     sizes and digests of all of these and where each fragment belongs

A checkpoint becomes visible when `manifest.json` appears, which is written last (`_publish`); without it the
folder is not a checkpoint. Only safetensors and JSON are read back: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from arvideo_dist.data.index import FileEntry
from arvideo_dist.storage import Storage
from arvideo_dist.train import zero_state
from arvideo_dist.train.engine import Engine
from arvideo_dist.train.stop import RunStoppedError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1
KINDS = ("weight", *zero_state.MOMENTS)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is there is damaged; the message says what and where."""


class FragmentEntry(BaseModel):
    """Elements [start, stop) of a flattened parameter stand in `part`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    start: int
    stop: int
    part: str


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format_version: int = FORMAT_VERSION
    shapes: dict[str, list[int]]
    fragments: list[FragmentEntry]
    parts: list[FileEntry]
    state: FileEntry


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def complete_checkpoints(run: Storage) -> list[str]:
    """Names of the complete checkpoints of a run, oldest first."""
    names = [name for name in run.names(FOLDER) if name.startswith("step-")]
    return [name for name in names if run.exists(f"{FOLDER}/{name}/{MANIFEST}")]


def save_checkpoint(
    run: Storage, engine: Engine, step: int, state: dict[str, Any], keep_last: int, control: dist.ProcessGroup
) -> str:
    """Write a checkpoint from all ranks and return its name once it is complete.

    `state`: JSON content kept beside the tensors. `control`: a process group for host objects. After a
    success rank 0 deletes complete checkpoints beyond the newest `keep_last` and what failed saves left.
    Raises CheckpointError on every rank where any rank failed; earlier checkpoints stay as they are.
    """
    name = checkpoint_name(step)
    folder = f"{FOLDER}/{name}"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    part = f"part-{rank:05d}-of-{world_size:05d}.safetensors"
    if rank == 0:
        _discard(run, name)  # what a killed save left or damage made useless, if anything
    dist.barrier(control)
    try:
        result: Any = _write_part(run, folder, part, engine)
    except Exception as error:  # reported on all ranks below; a lone raise would leave the others waiting
        result = f"rank {rank}: {type(error).__name__}: {error}"
    results: list[Any] = [None] * world_size
    dist.all_gather_object(results, result, group=control)
    failures = [r for r in results if isinstance(r, str)]
    if rank == 0 and not failures:
        try:
            _publish(run, folder, engine, results, state)
            _retain(run, keep_last)
        except Exception as error:
            failures = [f"manifest: {type(error).__name__}: {error}"]
    outcome = [failures]
    dist.broadcast_object_list(outcome, src=0, group=control)
    if outcome[0]:
        raise CheckpointError(f"checkpoint {run.uri}/{folder} was not written: {'; '.join(outcome[0])}")
    return name


def _write_part(
    run: Storage, folder: str, part: str, engine: Engine
) -> tuple[FileEntry, list[FragmentEntry]]:
    tensors, entries = {}, []
    for fragment in zero_state.owned_fragments(engine):
        entries.append(FragmentEntry(name=fragment.name, start=fragment.start, stop=fragment.stop, part=part))
        for kind, view in zero_state.state_of(engine, fragment).items():
            tensors[f"{kind}/{fragment.name}"] = view.detach().cpu().contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / part
        save_file(tensors, local)
        entry = FileEntry(name=part, size=local.stat().st_size, sha256=_file_sha256(local))
        run.put_file(local, f"{folder}/{part}")
    return entry, entries


def _publish(
    run: Storage,
    folder: str,
    engine: Engine,
    results: list[tuple[FileEntry, list[FragmentEntry]]],
    state: dict[str, Any],
) -> None:
    state = {**state, "optimizer_steps": zero_state.optimizer_steps(engine)}
    content = json.dumps(state, indent=1).encode()
    manifest = CheckpointManifest(
        shapes={name: _shape(p) for name, p in engine.module.named_parameters()},
        fragments=[fragment for _, fragments in results for fragment in fragments],
        parts=[entry for entry, _ in results],
        state=FileEntry(name=STATE, size=len(content), sha256=hashlib.sha256(content).hexdigest()),
    )
    _check_coverage(manifest)
    run.write_bytes(f"{folder}/{STATE}", content)
    run.write_bytes(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())


def _retain(run: Storage, keep_last: int) -> None:
    """The one place that deletes checkpoints: keep the newest `keep_last` complete ones, drop leftovers."""
    complete = complete_checkpoints(run)
    newest = complete[-1]
    for name in run.names(FOLDER):
        superseded = name in complete[:-keep_last]
        leftover = name not in complete and name < newest
        if superseded or leftover:
            _discard(run, name)


def _discard(run: Storage, name: str) -> None:
    # The manifest goes first, so that a half deleted folder is not taken for a checkpoint.
    run.delete(f"{FOLDER}/{name}/{MANIFEST}")
    run.delete(f"{FOLDER}/{name}")


class Checkpoint:
    """A complete checkpoint, opened for reading by parameter name. Needs no engine and no process group."""

    def __init__(self, run: Storage, name: str) -> None:
        self.name = name
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
            member = f"{self._folder}/{part.name}"
            if not self._run.exists(member):
                raise CheckpointError(f"{self}: {part.name} is missing")
            if self._run.size(member) != part.size or self._run.sha256(member) != part.sha256:
                raise CheckpointError(
                    f"{self}: {part.name} is damaged (size or sha256 differs from the manifest)"
                )

    def load_weights(self, module: torch.nn.Module) -> None:
        """Copy the fp32 weights into `module`, which must have exactly the checkpoint's parameters."""
        parameters = dict(module.named_parameters())
        shapes = {name: _shape(parameter) for name, parameter in parameters.items()}
        if shapes != self.manifest.shapes:
            differing = sorted(
                name
                for name in shapes.keys() | self.manifest.shapes.keys()
                if shapes.get(name) != self.manifest.shapes.get(name)
            )
            raise ValueError(
                f"{self} holds another model than the configuration asks for; parameters that differ: "
                f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}. "
                "Use the run's own model settings, or another run.name"
            )
        with torch.no_grad(), self._opened() as files:
            for entry in self.manifest.fragments:
                values = files[entry.part].get_tensor(f"weight/{entry.name}")
                parameters[entry.name].view(-1)[entry.start : entry.stop].copy_(values)

    def load_optimizer(self, engine: Engine) -> None:
        """Set this rank's AdamW moments and step count."""
        by_name: dict[str, list[FragmentEntry]] = {}
        for entry in self.manifest.fragments:
            by_name.setdefault(entry.name, []).append(entry)
        with self._opened() as files:
            for fragment in zero_state.create_moments(engine, self.state["optimizer_steps"]):
                values = {
                    moment: torch.empty(fragment.stop - fragment.start) for moment in zero_state.MOMENTS
                }
                for entry in by_name[fragment.name]:
                    first, last = max(entry.start, fragment.start), min(entry.stop, fragment.stop)
                    for moment, flat in values.items():
                        if first < last:
                            stored = files[entry.part].get_slice(f"{moment}/{entry.name}")
                            flat[first - fragment.start : last - fragment.start] = stored[
                                first - entry.start : last - entry.start
                            ]
                zero_state.set_moments(engine, fragment, values)

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as scratch:
            files = {}
            for part in self.manifest.parts:
                local = self._run.local_copy(f"{self._folder}/{part.name}", Path(scratch))
                files[part.name] = safe_open(local, framework="pt")
            yield files


def open_newest_whole(run: Storage, control: dist.ProcessGroup) -> Checkpoint | None:
    """Collective: the newest checkpoint whose content is what its manifest says, the same on all ranks.

    The ranks verify the parts in turn. A damaged checkpoint is named and the one before it is tried. None
    where the run has no checkpoint yet; RunStoppedError where it has some and all are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    listed = [complete_checkpoints(run) if rank == 0 else []]
    dist.broadcast_object_list(listed, src=0, group=control)
    for name in reversed(listed[0]):
        fault = None
        try:
            found = Checkpoint(run, name)
            found.verify(found.manifest.parts[rank::world_size])
        except (CheckpointError, ValidationError, FileNotFoundError) as error:
            fault = str(error)
        faults: list[str | None] = [None] * world_size
        dist.all_gather_object(faults, fault, group=control)
        if not any(faults):
            return found
        if rank == 0:
            print(f"not used, the one before it is tried: {next(filter(None, faults))}", flush=True)
    if listed[0]:
        raise RunStoppedError(
            f"all checkpoints in {run.uri}/{FOLDER} are damaged ({', '.join(listed[0])}): restore one from a "
            "copy, or set another run.name to begin anew"
        )
    return None


def versions() -> dict[str, str]:
    """Releases that wrote a checkpoint, kept in its state."""
    packages = ("arvideo-dist", "torch", "deepspeed", "ray", "mlflow")
    return {name: metadata.version(name) for name in packages}


def _check_coverage(manifest: CheckpointManifest) -> None:
    ends = dict.fromkeys(manifest.shapes, 0)
    for fragment in sorted(manifest.fragments, key=lambda f: (f.name, f.start)):
        assert fragment.start == ends[fragment.name], f"{fragment} overlaps or leaves a gap"
        ends[fragment.name] = fragment.stop
    for name, shape in manifest.shapes.items():
        assert ends[name] == torch.Size(shape).numel(), f"{name} is written up to {ends[name]} of {shape}"


def _shape(parameter: torch.nn.Parameter) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the parameter itself


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
