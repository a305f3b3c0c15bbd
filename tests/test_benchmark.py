"""The benchmark command: figures, configuration, commit and hardware in one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arvideo_dist import benchmark
from tests.data.conftest import encode, write_dataset


def test_order_at_a_hundred_million_samples_stays_under_200_mb(tmp_path: Path) -> None:
    result = tmp_path / "order.json"
    benchmark.main(["order", "--seeks", "5", "--json", str(result)])
    report = json.loads(result.read_text())
    assert report["configuration"] == {"samples": 10**8, "seeks": 5}
    for shuffle in ("full", "blocks of 16 shards"):
        assert report[shuffle]["memory_mb"] < 200
        assert report[shuffle]["slowest_seek_s"] > 0
    assert report.keys() >= {"date", "commit", "cpu", "cores", "load_average", "gpu", "torch"}


def test_loader_compares_four_loaders_on_the_same_videos(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    videos = [encode(tmp_path / "videos" / f"{i}.mp4", 70, i) for i in range(2)]
    write_dataset(tmp_path / "data", videos, [70, 70])
    result = tmp_path / "loader.json"
    arguments = ["--data", str(tmp_path / "data"), "--videos", str(tmp_path / "videos")]
    arguments += ["--work", str(tmp_path / "work"), "--clips", "4", "--rounds", "2", "--micro-batch", "2"]
    benchmark.main(["loader", *arguments, "--json", str(result)])
    report = json.loads(result.read_text())
    assert list(report["loaders"]) == ["videomae", "decord", "host", "device"]
    for name, figures in report["loaders"].items():
        assert len(report["rounds"][name]) == 2
        assert figures["cores_per_gpu"] == pytest.approx(250 * figures["cpu_ms"]["mean"] / 1000)
    for name in ("host", "device"):
        figures = report["loaders"][name]
        assert list(figures["split_cpu_ms"]) == ["read", "decode", "colour", "augment", "collate", "ipc"]
        assert min(figures["split_cpu_ms"].values()) >= 0
        assert sum(figures["split_cpu_ms"].values()) == pytest.approx(figures["cpu_ms"]["mean"])
        assert (figures["split_cpu_ms"]["colour"] > 0) == (name == "host")
        assert len(figures["times_cheaper_than_videomae"]["rounds"]) == 2


def test_videos_that_are_not_the_data_sets_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", [b"x"], [70])
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--videos",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
    ]
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["loader", *arguments, "--json", str(tmp_path / "r.json")])
    assert ended.value.code == 2
    assert "0.mp4 is missing: --videos must be the folder" in capsys.readouterr().err


def test_checkpoint_reports_every_round_of_both_kinds_of_save(tmp_path: Path) -> None:
    result = tmp_path / "checkpoint.json"
    arguments = ["--encoder", "demo", "--rounds", "2", "--steps", "1", "--folder", str(tmp_path / "work")]
    command = [sys.executable, "-m", "arvideo_dist.benchmark", "checkpoint", *arguments]
    subprocess.run([*command, "--json", str(result)], check=True)  # it makes a process group
    report = json.loads(result.read_text())
    assert report["configuration"]["threads"] == 1
    for kind in ("synchronous", "asynchronous"):
        extra = [figures[f"{kind}_s"] - figures["none_s"] for figures in report["rounds"]]
        assert report[f"{kind}_extra_s"]["mean"] == pytest.approx(sum(extra) / 2)
    assert list((tmp_path / "work").iterdir()) == []
