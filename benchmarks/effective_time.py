"""How much of a large run's time ends up in its weights, from measured save, restart and step times.

    python benchmarks/effective_time.py --checkpoint SAVES.json --restart RESTARTS.json --steps GPU.json --json PATH

SAVES.json     `python -m arvideo_dist.benchmark checkpoint --json`: extra time of a save, and how long until it is
               whole (the time of the round, by whose end it was: not less than the truth)
RESTARTS.json  `python -m arvideo_dist.benchmark restart --json`: from a killed worker to the next applied step
GPU.json       `benchmarks/gpu_check.py`: seconds of a ViT-B step

Two rates of failure. The goal's: one every 3 hours on 128 nodes. And the one that Llama 3 had, 419 unexpected
interruptions in 54 days on 16384 GPUs (arXiv 2407.21783, section 3.3.4), for each node: on 128 nodes of 8 one in
49 hours. For the first also what the slowest measured save and restart would give.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no installed package

from arvideo_dist.bench.report import environment, write_json
from arvideo_dist.goodput import (
    Costs,
    best_interval,
    closed_form,
    failures_every,
    restart_for,
    simulate,
    young,
)

HOUR = 3600.0
NODE_MTBF_S = {
    "one failure every 3 hours on 128 nodes": 3 * HOUR * 128,
    "Llama 3's rate for each node": 54 * 24 * HOUR / 419 * (16384 / 8),
}
MINUTES = (0.5, 1, 2, 5, 10, 15, 30, 60)


def measured(checkpoint: Path, restart: Path, steps: Path, method: str) -> tuple[Costs, Costs]:
    """Costs from the rounds' means, and from the slowest round of each."""
    saves = _read(checkpoint)["rounds"]
    extra = [max(0.0, figures["asynchronous_extra_s"]) for figures in saves]
    visible = [figures["asynchronous_s"] for figures in saves]
    restarts = [figures["total_s"] for figures in _read(restart)["rounds"]]
    step = _read(steps)["checks"]["vit_b_steps"]["methods"][method]["seconds_per_step"]
    return (
        Costs(step["median"], mean(extra), mean(visible), mean(restarts)),
        Costs(max(step["rounds"]), max(extra), max(visible), max(restarts)),
    )


def scenario(costs: Costs, mtbf_s: float, goal: float) -> dict[str, Any]:
    """The table over intervals, its best row, and what the goal would take."""
    best = best_interval(costs, mtbf_s)
    intervals = sorted({max(1, round(60 * minutes / costs.step_s)) for minutes in MINUTES} | {best})
    rows = [
        {
            "interval_steps": steps,
            "interval_minutes": steps * costs.step_s / 60,
            "simulated": asdict(simulate(costs, steps, mtbf_s)),
            "closed_form": asdict(closed_form(costs, steps, mtbf_s)),
        }
        for steps in intervals
    ]
    reached = closed_form(costs, best, mtbf_s).effective
    return {
        "costs": asdict(costs),
        "mtbf_hours": mtbf_s / HOUR,
        "best_interval_steps": best,
        "best_interval_minutes": best * costs.step_s / 60,
        "young_minutes": young(costs.save_extra_s, mtbf_s) / 60,
        "effective_at_best": reached,
        "goal": goal,
        "goal_is_met": reached >= goal,
        "restart_s_that_meets_the_goal": restart_for(costs, best, mtbf_s, goal),
        "table": rows,
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: one failure in {result['mtbf_hours']:.1f} h")
    print("interval    effective    saves  lost steps  restarts")
    for row in result["table"]:
        shares = row["simulated"]
        mark = "  best" if row["interval_steps"] == result["best_interval_steps"] else ""
        print(
            f"{row['interval_minutes']:5.1f} min  {shares['effective']:9.3%}  {shares['saves']:7.3%}  "
            f"{shares['lost_steps']:10.3%}  {shares['restarts']:8.3%}{mark}"
        )
    needed = result["restart_s_that_meets_the_goal"]
    print(
        f"goal {result['goal']:.0%}: {'met' if result['goal_is_met'] else 'missed'}; a restart may take "
        + (f"{needed:.0f} s" if needed is not None else "no time at all, and that is not enough")
        + f", it takes {result['costs']['restart_s']:.0f} s"
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("checkpoint", "restart", "steps", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--method", default="arvideo, compiled", help="of the step times (default: %(default)s)"
    )
    parser.add_argument("--nodes", type=int, default=128, help="(default: 128)")
    parser.add_argument("--goal", type=float, default=0.99, help="share that is effective (default: 0.99)")
    flags = parser.parse_args(argv)
    usual, slowest = measured(flags.checkpoint, flags.restart, flags.steps, flags.method)
    scenarios = {
        name: scenario(usual, failures_every(node_mtbf_s, flags.nodes), flags.goal)
        for name, node_mtbf_s in NODE_MTBF_S.items()
    }
    hard = next(iter(NODE_MTBF_S))
    scenarios[f"{hard}, slowest round of each"] = scenario(
        slowest, failures_every(NODE_MTBF_S[hard], flags.nodes), flags.goal
    )
    for name, result in scenarios.items():
        show(name, result)
    sources = {
        name: {"file": path.name}
        | {key: _stated(_read(path), key) for key in ("date", "commit", "cpu", "gpu")}
        for name, path in (
            ("checkpoint", flags.checkpoint),
            ("restart", flags.restart),
            ("steps", flags.steps),
        )
    }
    configuration = {"method": flags.method, "nodes": flags.nodes, "goal": flags.goal, "sources": sources}
    report = {"subject": "effective time"} | environment() | {"configuration": configuration}
    write_json(flags.json, report | {"scenarios": scenarios})


def _stated(result: dict[str, Any], key: str) -> Any:
    return result.get("environment", result).get(key)


if __name__ == "__main__":
    main()
