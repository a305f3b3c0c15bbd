"""A run's checkpoints on storage: names, and which of them are complete.

<run>/checkpoints/step-00000500/manifest.json      without it the folder is no checkpoint
"""

from __future__ import annotations

import re

from arvideo_dist.storage import Storage

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-\d{8}")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The optimiser step of a checkpoint's name."""
    return int(name.removeprefix("step-"))


def complete_checkpoints(run: Storage) -> list[str]:
    """Names of the complete checkpoints of a run, oldest first."""
    return [name for name in step_names(run) if run.exists(f"{FOLDER}/{name}/{MANIFEST}")]


def newest_step(run: Storage) -> int:
    """The step of the newest complete checkpoint, 0 if there is none; one listing and, mostly, one look."""
    for name in reversed(step_names(run)):
        if run.exists(f"{FOLDER}/{name}/{MANIFEST}"):
            return step_of(name)
    return 0


def step_names(run: Storage) -> list[str]:
    """Names of checkpoints, complete or not; a copy that a person made beside them is none of the run's."""
    return [name for name in run.names(FOLDER) if _NAME.fullmatch(name)]


def discard(run: Storage, name: str) -> None:
    """Delete a checkpoint, or what a killed save left of it."""
    # The manifest goes first, so that a half deleted folder is not taken for a checkpoint.
    run.delete(f"{FOLDER}/{name}/{MANIFEST}")
    run.delete(f"{FOLDER}/{name}")
