"""Which checkpoints a run has, and the one place that decides which of them are deleted.

    <run>/checkpoints/step-00000500/manifest.json      without it the folder is no checkpoint

`keep_last` counts checkpoints of distinct good weights. Weights are good unless the newest step before the save was
bad (a run that is told to leave saves there all the same): those are suspected, and no run goes back to them. A
checkpoint made right after a rollback holds older weights again: both are kept and count once. Nothing newer than
the checkpoint just written is ever deleted: it is damaged, or a part of the store that was away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import (
    FOLDER,
    MANIFEST,
    STATE,
    complete_checkpoints,
    discard,
    step_names,
    step_of,
)


def clear_leftovers(run: Storage, name: str) -> bool:
    """Delete what killed and failed saves left in the folder of `name`: all that its manifest does not name.

    Returns whether there is a manifest. It stays until another one replaces it, so that a step which was seen once
    is seen always: a damaged checkpoint that is written anew would else look for a while like a store that lost it.
    """
    folder = f"{FOLDER}/{name}"
    members = run.names(folder)
    if MANIFEST not in members:
        run.delete(folder)
        return False
    try:
        manifest = json.loads(run.read_bytes(f"{folder}/{MANIFEST}"))
        kept = {MANIFEST, STATE, *(part["name"] for part in manifest["parts"])}
    except (ValueError, KeyError, TypeError):
        kept = {MANIFEST, STATE}
    for member in members:
        if member not in kept:
            run.delete(f"{folder}/{member}")
    return True


def weights_step(state: Mapping[str, Any], step: int) -> int | None:
    """After which step the weights in the checkpoint of `step` were first saved; None if they are suspected.

    `state`: the checkpoint's own. Two checkpoints of the same answer hold the same weights.
    """
    listed = state.get("bad_steps")
    if not isinstance(listed, Mapping):
        # Saved before there was such a list.
        return step
    if listed["in_a_row"]:
        return None
    for rollback in reversed(listed["rollbacks"]):
        if rollback["step"] == step:
            step = rollback["to_step"]
    return step


class Retention:
    """Deletes a run's older checkpoints after each new one."""

    def __init__(
        self, run: Storage, keep_last: int, keep_every: int | None, damaged: Iterable[str] = ()
    ) -> None:
        """`damaged`: names of checkpoints that are complete to the eye only; they count as none."""
        self._run, self._keep_last, self._keep_every = run, keep_last, keep_every
        self._weights: dict[str, int | None] = dict.fromkeys(damaged)  # `weights_step` of what was looked at

    def saved(self, newest: str, weights: int | None, best: str | None = None) -> None:
        """`newest`, with `weights` (`weights_step`), has just become visible: delete what is not needed beside it.

        Kept are it, `best`, which the run has measured best, those of the newest `keep_last` distinct good weights
        and, for good, the first good one of each `keep_every` steps: that of a step that it divides or, if the
        save at that step failed or was put off, the next one. Leftovers of killed saves go. What cannot be read
        stays, as do other names. Raises OSError.
        """
        self._weights[newest] = weights
        complete = [name for name in complete_checkpoints(self._run) if name <= newest]
        kept = {newest, *filter(None, [best])}
        good: dict[str, int] = {}  # newest first
        for name in reversed(complete):
            try:
                step = self._weights_of(name)
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                kept.add(name)
                continue
            if step is not None:
                good[name] = step
        distinct = list(dict.fromkeys(good.values()))[: self._keep_last]
        kept.update(name for name, step in good.items() if step in distinct)
        if self._keep_every is not None:
            firsts = {step_of(name) // self._keep_every: name for name in good}
            kept.update(name for number, name in firsts.items() if number > 0)
        for name in step_names(self._run):
            if name >= newest or name in kept:
                continue
            # A store that fails may deny a file that its listing shows.
            if name in complete or MANIFEST not in self._run.names(f"{FOLDER}/{name}"):
                discard(self._run, name)

    def _weights_of(self, name: str) -> int | None:
        if name not in self._weights:
            state = json.loads(self._run.read_bytes(f"{FOLDER}/{name}/{STATE}"))
            self._weights[name] = weights_step(state, step_of(name))
        return self._weights[name]
