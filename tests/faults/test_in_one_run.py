"""One run of `make test` that meets a killed rank, a full disk and a notice to leave; alone in the files beside."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint
from tests.faults.runs import LAYOUTS, write_run
from tests.faults.test_services import fill
from tests.services.disk import small_disk

# Shorter than the runs beside: enough for a checkpoint, steps to replay, a save that fails and a notice after it.
STEPS, SAVE_EVERY = 30, 6


def test_killed_rank_full_disk_and_a_notice_to_leave(folder: Path, survived: Callable[..., None]) -> None:
    run = write_run(
        folder,
        str(folder / "data"),
        "in-one-run",
        LAYOUTS[0],
        steps=STEPS,
        save_every=SAVE_EVERY,
        run={"max_failed_saves": 50},
    )
    checkpoints = Path(run.storage) / run.name / FOLDER
    with ExitStack() as mounted:
        refused = ""
        try:
            mounted.enter_context(small_disk(checkpoints, size_mib=160))
        except OSError as error:
            refused = f"this process may not mount a small disk: {error}"
        command = run.start()
        command.read_until("checkpoint step-00000006 is complete")
        command.read_until(rf"step \d+/{STEPS}")  # there is something to replay
        command.worker(1).kill()
        command.read_until(r"continues from .*step-00000006")
        command.read_until(rf"step 8/{STEPS}")
        if not refused:
            filler = fill(checkpoints)
            assert "No space left" in command.read_until(r"checkpoint.*failed")
            whole = complete_checkpoints(run.folder)
            assert whole, "the checkpoints before it are still there"
            Checkpoint(run.folder, whole[-1]).verify()
            filler.unlink()
        command.send(signal.SIGTERM)
        assert command.finish() == os.EX_TEMPFAIL, command.output
        again = run.start()
        assert again.finish() == 0, again.output
        survived(run, "SIGKILL of rank 1, a full disk, SIGTERM", commands=2)
    if refused:
        pytest.skip(f"all but the full disk was tried: {refused}")
