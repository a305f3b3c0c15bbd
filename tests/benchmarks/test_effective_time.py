"""The effective time of a large run, from result files of the benchmarks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("effective_time", ROOT / "benchmarks" / "effective_time.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(
    script: ModuleType,
    folder: Path,
    extra_s: list[float],
    restart_s: list[float],
    more: list[str] | None = None,
) -> dict[str, Any]:
    saves = [{"asynchronous_extra_s": extra, "request_s": 0.01, "visible_s": 20.0} for extra in extra_s]
    (folder / "save.json").write_text(json.dumps({"cpu": "some CPU", "state_gb": 1.2, "rounds": saves}))
    restarts = [{"total_s": seconds} for seconds in restart_s]
    (folder / "restart.json").write_text(json.dumps({"rounds": restarts}))
    files = [
        *(more or ["--checkpoint"]),
        str(folder / "save.json"),
        "--restart",
        str(folder / "restart.json"),
    ]
    files += ["--steps", str(ROOT / "benchmarks/results/gpu-2026-11-22.json")]
    script.main([*files, "--json", str(folder / "out.json")])
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


def test_goal_follows_from_every_measured_round(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _run(script, tmp_path, extra_s=[0.2, 0.6], restart_s=[20.0, 40.0])
    hard, rare, cautious = report["scenarios"].values()
    assert hard["costs"] == {
        "step_s": pytest.approx(0.0299850245),  # the committed median, compiled
        "save_extra_s": pytest.approx(0.4),
        "save_visible_s": 20.0,
        "restart_s": 30.0,
    }
    # Two values a and b have the standard error |a - b| / 2.
    assert cautious["costs"]["save_extra_s"] == pytest.approx(0.4 + 2 * 0.2)
    assert cautious["costs"]["restart_s"] == pytest.approx(30 + 2 * 10)
    assert hard["mtbf_hours"] == pytest.approx(3)
    assert rare["mtbf_hours"] == pytest.approx(49.5, abs=0.1)
    assert hard["best_interval_minutes"] == pytest.approx(hard["young_minutes"], rel=0.05)
    # By hand, to first order: saves, half an interval and a save under way, a restart.
    interval_s = 60 * hard["best_interval_minutes"]
    by_hand = 1 - 0.4 / interval_s - (interval_s / 2 + 20 + 30) / (3 * 3600)
    assert hard["effective_at_best"] == pytest.approx(by_hand, abs=2e-4)
    assert not hard["goal_is_met"]
    assert rare["goal_is_met"]
    assert hard["restart_s_that_meets_the_goal"] is None
    for row in hard["table"]:
        assert row["simulated"]["effective"] == pytest.approx(row["closed_form"]["effective"], abs=1e-3)
    assert report["configuration"]["sources"][2]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert "goal 99%: missed" in capsys.readouterr().out


def test_every_file_of_saves_has_its_own_scenarios(script: ModuleType, tmp_path: Path) -> None:
    _run(script, tmp_path, extra_s=[0.2, 0.2], restart_s=[20.0, 40.0])
    (tmp_path / "save.json").rename(tmp_path / "older.json")
    older = ["--checkpoint", str(tmp_path / "older.json")]
    report = _run(script, tmp_path, extra_s=[0.8, 0.8], restart_s=[20.0, 40.0], more=older)
    costs = {name: result["costs"]["save_extra_s"] for name, result in report["scenarios"].items()}
    assert sorted(costs.values()) == [0.2] * 3 + [0.8] * 3
    assert all(("older.json" in name) == (extra_s == 0.2) for name, extra_s in costs.items())


def test_save_costs_at_least_the_time_for_which_the_step_loop_stands_still(
    script: ModuleType, tmp_path: Path
) -> None:
    report = _run(script, tmp_path, extra_s=[-0.3, 0.1], restart_s=[20.0, 40.0])
    assert next(iter(report["scenarios"].values()))["costs"]["save_extra_s"] == 0.01
