"""`model.init_from` is needed by a start without a checkpoint, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arvideo_dist import command
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.pretrain import main
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST
from arvideo_dist.train.run.stop import RunStoppedError


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that came as far as the cluster."""
    launched: list[str] = []

    def launch(config: PretrainConfig, *_: Any) -> None:
        launched.append(config.run.name)
        raise RunStoppedError("enough")

    monkeypatch.setattr(command, "check_driver", lambda config: None)
    monkeypatch.setattr(command, "derive_checked", lambda config: derive(config, 100))
    monkeypatch.setattr(command, "check_resume", lambda config: None)
    monkeypatch.setattr(command, "launch", launch)
    return launched


def _code(folder: Path, *options: str) -> int:
    """Of `pretrain` from weights that are not there."""
    absent, runs = str(folder / "absent.pth"), str(folder / "runs")
    with pytest.raises(SystemExit) as ended:
        main([*options, "--model.init_from", absent, "--run.storage_path", runs, "--run.name", "run"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_weights_that_are_gone_do_not_keep_a_run_from_going_on(tmp_path: Path, launched: list[str]) -> None:
    Storage(str(tmp_path / "runs/run")).write_bytes(f"{FOLDER}/step-00000016/{MANIFEST}", b"{}")
    assert _code(tmp_path) == 1
    assert launched == ["run"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["start", "dry-run"])
def test_weights_that_are_gone_stop_a_new_run_before_anything_is_written(
    options: list[str], tmp_path: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a checkpoint that never became whole is none."""
    part = f"{FOLDER}/step-00000016/part"
    Storage(str(tmp_path / "runs/run")).write_bytes(part, b"")
    assert _code(tmp_path, *options) == 2
    assert capsys.readouterr().err.startswith(f"error: model.init_from {tmp_path}/absent.pth: no such file")
    assert launched == []
    assert [file for file in (tmp_path / "runs").rglob("*") if file.is_file()] == [
        tmp_path / "runs/run" / part
    ]
