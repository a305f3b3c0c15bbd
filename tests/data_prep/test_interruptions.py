"""Killed at any moment and run again: the bytes of an undisturbed run. Full disk: an error, nothing half."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.data_prep.runs import SMALL, digests, prepare, spawn
from tests.data_prep.videos import make

CLIPS = ("synthetic", "--num-videos", 48, "--shard-size", 6, "--workers", 2, *SMALL)


@pytest.mark.slow
def test_sigkill_at_ten_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, killed = (*CLIPS, "--num-videos", 600), tmp_path / "killed"
    began = time.monotonic()
    assert spawn(*clips, "--out", tmp_path / "calm").wait() == 0
    longest = min(7.0, time.monotonic() - began)
    calm = digests(tmp_path / "calm")
    draw = random.Random(0)
    kills = shards = 0
    while kills < 10 or not shards:
        process = spawn(*clips, "--out", killed)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0.2, 1.0) * longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            shards += len(list(killed.glob("*.tar")))
            if (killed / "dataset-train.json").exists():
                assert prepare(monkeypatch, "verify", killed) == 0, "what looks whole is"
        else:  # a fast machine: the kills that are left hit a fresh run
            assert process.returncode == 0, errors.decode()
            assert digests(killed) == calm
            shutil.rmtree(killed)
    process = spawn(*clips, "--out", killed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert digests(killed) == calm


def test_helpers_that_are_killed_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL to every ffmpeg and reader that one look finds: their videos are tried again."""
    videos = tmp_path / "videos"
    for number in range(2):
        make(videos / f"{number}.mp4", source=f"testsrc2=s=160x120:r=25:d={3 + number}")
    assert prepare(monkeypatch, "folder", "--videos", videos, "--out", tmp_path / "calm") == 0
    process = spawn("folder", "--videos", videos, "--out", tmp_path / "killed", "--workers", 2)
    _encoders(process)
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")


def test_ctrl_c_rejects_nothing_and_leaves_no_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn(*CLIPS, "--out", tmp_path / "out")
    _encoders(process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors.decode().splitlines()[-1]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list((tmp_path / "out").glob(".work-*"))
    assert prepare(monkeypatch, *CLIPS, "--out", tmp_path / "out") == 0
    assert prepare(monkeypatch, *CLIPS, "--out", tmp_path / "calm") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")


def _encoders(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those at work, once there are any."""
    encoders: list[psutil.Process] = []
    while not encoders:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        encoders = [child for child in psutil.Process(process.pid).children() if encodes(child)]
    return encoders


def encodes(process: psutil.Process) -> bool:
    try:
        return "libx264" in process.cmdline()
    except psutil.Error:
        return False  # it has ended, or has not become ffmpeg yet


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A mounted file system of 256 KiB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_the_run_continues_once_there_is_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    for number in range(5):
        make(videos / f"{number}.mp4", "-t", "1.5", source=f"life=s=128x96:r=25:seed={number}:mold=10")
    arguments = ("folder", "--videos", videos, "--shard-size", 2, "--workers", 2)
    assert prepare(monkeypatch, *arguments, "--out", small_disk / "out") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in message or "no space left" in message
    assert "run the same command again" in message
    assert not (small_disk / "out" / "dataset-train.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert prepare(monkeypatch, *arguments, "--out", small_disk / "out") == 0
    assert prepare(monkeypatch, *arguments, "--out", tmp_path / "calm") == 0
    assert digests(small_disk / "out") == digests(tmp_path / "calm")
