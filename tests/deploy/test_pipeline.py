"""Pipelines: what runs, what is skipped, what runs again, and what is left when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arvideo_dist.processes import process_identity
from jobs import pipeline, runners, stages
from jobs.summary import table

ROOT = Path(__file__).parents[2]
FILE = """
folder: known
stages:
  data: data_prep synthetic --out made/data --split train --num-videos 4
  first: pretrain --data.path {data} --run.name first --train.steps 3
  second: finetune --data.path {data} --init-from {first} --run.name second
"""
MODULES = dict.fromkeys(stages.MODULES, "tests.deploy.pretend")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(stages, "MODULES", MODULES)
    monkeypatch.setattr(runners, "MODULES", MODULES)
    monkeypatch.setattr(runners, "_FIRST_PAUSE_S", 0.01)
    (tmp_path / "all.yaml").write_text(FILE)
    return tmp_path


def run(file: str = "all.yaml") -> int:
    with pytest.raises(SystemExit) as ended:
        pipeline.main([file])
    return int(ended.value.code or 0)


def calls(here: Path) -> list[str]:
    """What ran since the last look: the words before the first flag, or the run's name."""
    file = here / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return ["data" if "--out" in line else line.split("--run.name ")[1].split()[0] for line in lines]


def test_stages_run_in_order_with_what_those_before_them_made(here: Path) -> None:
    assert run() == 0
    runs = here / "runs"
    assert (runs / "first/result.json").read_text().split()[1] == str(here / "made/data")
    assert (runs / "second/result.json").read_text().split()[3] == str(runs / "first")
    assert calls(here) == ["data", "first", "second"]


def test_nothing_runs_again_if_nothing_has_changed(here: Path, capfd: pytest.CaptureFixture) -> None:
    run()
    calls(here)
    assert run() == 0
    assert calls(here) == []
    assert capfd.readouterr().out.count("nothing has changed") == 3


def test_a_stage_whose_settings_change_runs_again_with_those_that_use_it(here: Path) -> None:
    run()
    calls(here)
    (here / "all.yaml").write_text(FILE.replace("--train.steps 3", "--train.steps 4"))
    assert run() == 0
    assert calls(here) == ["first", "second"]


def test_settings_are_those_that_the_command_would_have(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a configuration file and of the environment."""
    (here / "own.yaml").write_text("train: {epochs: 7}\n")
    (here / "all.yaml").write_text(FILE.replace("--train.steps 3", "--config own.yaml"))
    run()
    calls(here)
    (here / "own.yaml").write_text("train: {epochs: 8}\n")
    assert run() == 0
    assert calls(here) == ["first"]  # what it made is the same, so the second has nothing new
    monkeypatch.setenv("ARVIDEO__TRAIN__MICRO_BATCH", "16")
    run()
    assert calls(here) == ["first", "second"]


def test_a_stage_whose_output_is_gone_runs_again(here: Path) -> None:
    run()
    calls(here)
    (here / "runs/first/result.json").unlink()
    assert run() == 0
    assert calls(here) == ["first"]


def test_a_stage_that_ends_early_is_started_again(here: Path) -> None:
    (here / "codes").write_text("0\n75\n75\n0\n0")
    assert run() == 0
    assert calls(here) == ["data", "first", "first", "first", "second"]


def test_a_stage_that_fails_ends_the_pipeline_which_goes_on_there(
    here: Path, capfd: pytest.CaptureFixture
) -> None:
    (here / "codes").write_text("0\n1")
    assert run() == 1
    assert "stage first ended with exit code 1" in capfd.readouterr().err
    assert calls(here) == ["data", "first"]
    assert run() == 0
    assert calls(here) == ["first", "second"]


def test_a_command_that_leaves_nothing_is_no_success(here: Path, capfd: pytest.CaptureFixture) -> None:
    other = "data: data_prep synthetic --split train --num-videos 4 --out made/data"
    (here / "all.yaml").write_text(f"folder: known\nstages:\n  {other}\n")
    (here / "made/data").mkdir(parents=True)
    (here / "made/data/dataset-train.json").mkdir()  # so that the command cannot write it
    assert run() != 0


class Started:
    """`python -m jobs.pipeline` in a process of its own."""

    def __init__(self) -> None:
        code = (
            "import jobs.stages, jobs.runners; from jobs.pipeline import main; "
            f"jobs.stages.MODULES = jobs.runners.MODULES = {MODULES!r}; main(['all.yaml'])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        self.until("waits")

    def until(self, text: str) -> None:
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"it ended without {text!r}")


def test_a_pipeline_that_is_told_to_leave_lets_its_stage_leave(here: Path) -> None:
    (here / "codes").write_text("0\nwait")
    started = Started()
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(60) == os.EX_TEMPFAIL
    assert (here / "left").exists()
    calls(here)
    assert run() == 0
    assert calls(here) == ["first", "second"]


def test_the_stage_of_a_killed_pipeline_leaves_and_the_next_waits_for_it(
    here: Path, capfd: pytest.CaptureFixture
) -> None:
    (here / "codes").write_text("0\nwait")
    started = Started()
    started.process.kill()
    started.process.wait(60)
    calls(here)
    assert run() == 0
    assert (here / "left").exists(), "two commands would have met at one run"
    assert calls(here) == ["first", "second"]
    assert "which a pipeline before this one has started" in capfd.readouterr().out


def test_who_waits_for_a_killed_pipelines_stage_can_be_told_to_leave(here: Path) -> None:
    """A stage that never leaves: here this very process stands for it."""
    runner = runners.LocalRunner()
    known = stages.Ledger(here)
    known.set("process", process_identity(os.getpid()))
    told = threading.Timer(1.0, runner._leave, (signal.SIGTERM, None))
    told.start()
    (stage,) = stages.read_pipeline(here / "all.yaml").stages[:1]
    assert runner.run(stage, known) == os.EX_TEMPFAIL
    assert calls(here) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}", "it has `folder` and `stages`"),
        ("folder: a\nstages: []", "names with a command each"),
        ("folder: a\nstages: {a: train --x 1}", "'train' is no command; there are data_prep"),
        ("folder: a\nstages: {a: 'pretrain --data.path {b}'}", r"{b} is no stage before it; there are none"),
        ("folder: a\nstages: {'a b': pretrain}", "a name has letters"),
        ("folder: a\nstages: {a: 'pretrain --data.path $NOWHERE/b'}", "the environment has no NOWHERE"),
        ("folder: a\nstages: {a: 'pretrain \"'}", "a command line, or a list of its words"),
        ("folder: a\nstages: {a: pretrain --train.stepz 1}", "stage a: .*stepz"),
        ("folder: a\nstages: {a: data_prep folder --split b}", "stage a: --out is missing"),
    ],
)
def test_what_is_no_pipeline_is_named(
    here: Path, capfd: pytest.CaptureFixture, text: str, message: str
) -> None:
    import re

    (here / "all.yaml").write_text(text)
    assert run() == 2
    assert re.search(message, capfd.readouterr().err)


def test_the_table_has_a_line_for_each_evaluation() -> None:
    result = {"accuracy/top1": 0.5, "accuracy/mean_class": 0.25, "videos": 8.0, "bad_samples": 1.0}
    assert table({"accuracy": result}).splitlines()[-1] == "| accuracy | 50.00% | - | 25.00% | 8 | 1 |"


def test_folds_have_a_mean() -> None:
    results = {
        f"fold-{number}": {"accuracy/top1": share, "videos": 10.0, "bad_samples": 0.0}
        for number, share in ((1, 0.5), (2, 0.6), (3, 0.1))
    }
    lines = table(results | {"other": results["fold-1"]}).splitlines()
    assert lines[-1] == "| mean of fold | 40.00% | - | - | 30 | 0 |"
    assert len(lines) == 2 + 4 + 1


CHAINS = sorted((ROOT / "jobs" / "chains").glob("*.yaml"))


@pytest.mark.parametrize("file", CHAINS, ids=[file.stem for file in CHAINS])
def test_every_stage_of_a_chain_is_a_valid_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names what is made before it, and the environment gives places alone."""
    monkeypatch.chdir(ROOT)
    for name in ("K400", "HMDB51", "DATA", "RUNS"):
        monkeypatch.setenv(name, f"/somewhere/{name.lower()}")
    known = stages.read_pipeline(file)
    made = {}
    for stage in known.stages:
        resolved = stage.resolved(made)
        resolved.check()
        output = f"/somewhere/{stage.name}" if stage.command == "evaluate" else resolved.output()
        made[stage.name] = stages.Made(resolved.digest, output, "")
    assert known.stages[-1].command == "evaluate"
