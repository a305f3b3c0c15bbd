"""What fails is the disk or mount of the videos: that is said of the machine, never of an input."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist.storage import patiently
from data_prep import worker
from data_prep.errors import Rejected
from data_prep.isolation import Limits, Prober
from data_prep.items import Item
from data_prep.probe import SourceInfo, VideoInfo
from data_prep.shards import Outcome
from data_prep.transcode import TranscodeSettings
from tests.data_prep.runs import digests, prepare
from tests.data_prep.videos import make


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "patiently", partial(patiently, patience_s=1.0))


@pytest.fixture
def prober() -> Iterator[Prober]:
    prober = Prober(Limits())
    yield prober
    prober.close()


def process(video: Path, prober: Any, folder: Path) -> Outcome:
    return worker.process(Item("in.mp4", path=str(video)), folder, TranscodeSettings(), Limits(), prober)


def failing(call: Callable[..., Any], name: str, number: int, times: int = 10**6) -> Callable[..., Any]:
    """`call`, but the system answers with error `number` the first times it is asked about the file `name`."""
    left = iter(range(times))

    def wrapped(path: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(path, str | Path) and Path(path).name == name and next(left, None) is not None:
            raise OSError(number, os.strerror(number), str(path))
        return call(path, *arguments, **named)

    return wrapped


@pytest.mark.parametrize(
    ("call", "number"), [("stat", errno.ESTALE), ("open", errno.EIO), ("scandir", errno.ENOTCONN)]
)
def test_a_mount_that_fails_ends_the_run_and_the_same_command_continues(
    call: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("one/1.mp4", "two/2.mp4"):
        make(videos / name)
    arguments = ("folder", "--videos", videos, "--shard-size", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), "two" if call == "scandir" else "2.mp4", number))
        assert prepare(patch, *arguments, "--out", out) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(number) in message
    assert str(videos / "two") in message
    assert "run the same command again" in message
    assert not (out / "dataset-train.json").exists()
    assert prepare(monkeypatch, *arguments, "--out", out) == 0
    assert prepare(monkeypatch, *arguments, "--out", tmp_path / "calm") == 0
    assert digests(out) == digests(tmp_path / "calm")


def test_a_mount_that_comes_back_costs_no_input(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make(tmp_path / "2.mp4")
    monkeypatch.setattr(os, "open", failing(os.open, "2.mp4", errno.EIO, times=1))
    assert process(video, prober, tmp_path).sample


class BlindOnce:
    """A reader whose first look at a source meets an I/O error, which the demuxer takes for damage."""

    def __init__(self, prober: Prober) -> None:
        self._prober, self.looks = prober, 0

    def source(self, path: str) -> SourceInfo:
        self.looks += 1
        if self.looks == 1:
            raise Rejected("damaged: reading stops after 3 pictures: Input/output error")
        return self._prober.source(path)

    def video(self, path: str) -> VideoInfo:
        return self._prober.video(path)


def test_a_read_that_failed_once_is_no_damage(tmp_path: Path, prober: Prober) -> None:
    video = make(tmp_path / "2.mp4")
    blind = BlindOnce(prober)
    assert process(video, blind, tmp_path).sample
    assert blind.looks == 2


def test_damage_behind_which_no_byte_can_be_read_names_the_file(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make(tmp_path / "2.mp4")

    def read(handle: int, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(OSError, match=r"2\.mp4: Input/output error; if it is this file alone, put an empty"):
        process(video, BlindOnce(prober), tmp_path)


def test_a_file_that_is_gone_is_a_reject_and_one_that_is_gone_with_all_beside_it_is_not(
    tmp_path: Path, prober: Prober
) -> None:
    mounted = tmp_path / "mounted"
    first, second = make(mounted / "a" / "1.mp4"), make(mounted / "a" / "2.mp4")
    first.unlink()
    assert process(first, prober, tmp_path).reason == "unreadable: No such file or directory"
    for remains in (mounted, mounted / "a"):  # as far as the mount point's own folders go
        shutil.rmtree(mounted)
        remains.mkdir(parents=True)
        with pytest.raises(OSError, match="is gone, with all that stood beside it: is its disk mounted"):
            process(second, prober, tmp_path)
