"""The work that an evaluation does: a video is read and decoded once for all its views."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.folder import run_folder
from arvideo_dist.data import loader
from arvideo_dist.data.reader import MemberReader
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.train import sequence
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.run.lease import acquire
from tests.train.classifiers import evaluate_config, save_classifier
from tests.train.distributed import run_ranks
from tests.train.runs import make_data
from tests.train.test_length import _LeavesAfter

VIDEOS = 16


def _work(assignment: Assignment) -> dict[str, Any]:
    """Videos that this rank reads and decodes, and views that it scores."""
    reads, decoded, views = list[str](), list[int](), 0
    decode, read, score = loader.decode_rgb, MemberReader.read, sequence.SequenceRun._computed

    def decode_rgb(video: bytes, *given: Any) -> Any:
        decoded.append(hash(video))
        return decode(video, *given)

    def reading(self: MemberReader, row: Any) -> Any:
        reads.append(row.key)
        return read(self, row)

    def scores(self: sequence.SequenceRun, host: Any) -> torch.Tensor:
        nonlocal views
        views += int(host.weights.sum())
        return score(self, host)

    control = dist.new_group(backend="gloo")
    with (
        mock.patch.object(loader, "decode_rgb", decode_rgb),
        mock.patch.object(MemberReader, "read", reading),
        mock.patch.object(sequence.SequenceRun, "_computed", scores),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        watch = _LeavesAfter(assignment.lease, control, None)
        sequence.run_sequence(assignment, torch.device("cpu"), control, watch, None)
    return {"reads": reads, "decoded": decoded, "views": views}


@pytest.mark.parametrize(("views", "number"), [("5x3", 15), ("2x3", 6)])
def test_a_video_is_read_and_decoded_once_for_all_its_views(tmp_path: Path, views: str, number: int) -> None:
    data = str(make_data(tmp_path / "data"))
    config = evaluate_config(
        save_classifier(tmp_path / "classifier"), data, str(tmp_path / "runs"), "run", views
    )
    with acquire(run_folder(config), lease_s=600) as lease:
        ranks = run_ranks(2, _work, Assignment(config, derive_checked(config), "", "", lease.guard))
    assert sum(rank["views"] for rank in ranks) == VIDEOS * number
    reads = [key for rank in ranks for key in rank["reads"]]
    assert len(reads) == len(set(reads)) == VIDEOS
    assert sum(len(rank["decoded"]) for rank in ranks) == VIDEOS
    assert all(len(set(rank["decoded"])) == len(rank["decoded"]) for rank in ranks)
