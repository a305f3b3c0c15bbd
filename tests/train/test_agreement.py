"""What ranks find out about each other before they train."""

from __future__ import annotations

import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.vit import ENCODER_SIZES, EncoderSize
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.compose import train
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.run.watch import Watch
from tests.data.conftest import encode, write_dataset
from tests.train.distributed import run_ranks
from tests.train.keyed import DECODER, MODEL


def test_ranks_with_another_copy_of_the_data_set_are_named_by_all_ranks_before_they_train(
    tmp_path: Path,
) -> None:
    frames = [8, 12, 16, 20]
    videos = [encode(tmp_path / f"{i}.mp4", number, i) for i, number in enumerate(frames)]
    write_dataset(tmp_path / "older", videos[:3], frames[:3])
    write_dataset(tmp_path / "newer", videos, frames)
    shutil.copytree(tmp_path / "newer", tmp_path / "the same")
    copies = [str(tmp_path / name) for name in ("newer", "older", "the same")]
    config = PretrainConfig.model_validate(
        {
            "run": {"name": "run", "storage_path": str(tmp_path / "runs")},
            "data": {"path": copies[0], "val_split": None, "workers": 0},
            "model": MODEL.model_dump(),
            "decoder": DECODER.model_dump(),
            "optim": {"warmup_epochs": 0},
            "train": {"steps": 2, "global_batch": 6, "micro_batch": 1},
            "cluster": {"workers": 3, "device": "cpu"},
        }
    )
    with acquire(run_folder(config), lease_s=600) as lease:
        task = Assignment(config, derive_checked(config), "", "", lease.guard)
        said = run_ranks(3, _what_stops_it, task, copies)
    assert said[0] == said[1] == said[2]
    host = re.escape(socket.gethostname())
    found = re.search(rf"ranks 0, 2 on {host}: (fp32, .*)\n  rank 1 on {host}: (fp32, .*)\n", said[0])
    assert found is not None, said[0]
    assert found[1] != found[2]
    assert "Make the copies of the data set on these hosts the same" in said[0]


def _what_stops_it(task: Assignment, copies: list[str]) -> str:
    """The error that ends this rank, whose node has a copy of its own."""
    data = task.config.data.model_copy(update={"path": copies[dist.get_rank()]})
    task = replace(task, config=task.config.model_copy(update={"data": data}))
    control = dist.new_group(backend="gloo")
    watch = Watch(task.lease, control, lambda: None)
    with mock.patch.dict(ENCODER_SIZES, {MODEL.encoder: EncoderSize(width=64, depth=1, heads=1)}):
        try:
            train(task, torch.device("cpu"), control, watch, tracker=None)
        except RunStoppedError as error:
            return str(error)
    return "it trained"
