"""How much of a large run's time ends up in its weights, from measured save, restart and step times.

    python benchmarks/effective_time.py --checkpoint SAVES.json [SAVES.json ...] --restart RESTARTS.json
        --steps GPU.json --json PATH

SAVES.json     `python -m arvideo_dist.benchmark checkpoint --json`: extra time of a save and how long until it is
               whole. Each file has its own scenarios: what a save costs goes by a rank's share of the state, which
               is all of it for one rank and a thousandth for each of a thousand
RESTARTS.json  `python -m arvideo_dist.benchmark restart --json`: from a killed worker to the next applied step
GPU.json       `benchmarks/gpu_check.py`: seconds of a ViT-B step

Two rates of failure. The goal's: one every 3 hours on 128 nodes. And the one that Llama 3 had, 419 unexpected
interruptions in 54 days on 16384 GPUs (arXiv 2407.21783, section 3.3.4), for each node: on 128 nodes of 8 one in
49 hours. For the first also what the means and twice their standard error would give.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no installed package

from arvideo_dist.bench.goodput import (
    Costs,
    best_interval,
    closed_form,
    failures_every,
    restart_for,
    simulate,
    young,
)
from arvideo_dist.hardware import environment, write_json

HOUR = 3600.0
NODE_MTBF_S = {
    "one failure every 3 hours on 128 nodes": 3 * HOUR * 128,
    "Llama 3's rate for each node": 54 * 24 * HOUR / 419 * (16384 / 8),
}
MINUTES = (0.5, 1, 2, 5, 10, 15, 30, 60)


def measured(checkpoint: Path, restart: Path, steps: Path, method: str) -> tuple[Costs, Costs]:
    """Costs from the rounds' means, and from the means and twice their standard error."""
    saves, restarts = _read(checkpoint)["rounds"], _read(restart)["rounds"]
    step = _read(steps)["checks"]["vit_b_steps"]["methods"][method]["seconds_per_step"]
    # The difference of two noisy times may be below the time for which the step loop stands still; the cost is not.
    least = mean(figures["request_s"] for figures in saves)
    columns = [
        [figures["asynchronous_extra_s"] for figures in saves],
        [figures["visible_s"] for figures in saves],
        [figures["total_s"] for figures in restarts],
    ]
    means = [mean(values) for values in columns]
    upper = [middle + 2 * _standard_error(values) for middle, values in zip(means, columns, strict=True)]
    usual, cautious = (
        Costs(step["median"], max(least, extra), visible, total) for extra, visible, total in (means, upper)
    )
    return usual, cautious


def _standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values))


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
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", nargs="+")
    for name in ("restart", "steps", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--method", default="arvideo, compiled", help="of the step times (default: %(default)s)"
    )
    parser.add_argument("--nodes", type=int, default=128, help="(default: 128)")
    parser.add_argument("--goal", type=float, default=0.99, help="share that is effective (default: 0.99)")
    flags = parser.parse_args(argv)
    scenarios = {}
    hard = next(iter(NODE_MTBF_S))
    for checkpoint in flags.checkpoint:
        saves = f"{checkpoint.name}, {_read(checkpoint)['state_gb']:.3f} GB of state a rank"
        usual, cautious = measured(checkpoint, flags.restart, flags.steps, flags.method)
        cases = [(name, usual, mtbf_s) for name, mtbf_s in NODE_MTBF_S.items()]
        cases.append((f"{hard}, costs two standard errors higher", cautious, NODE_MTBF_S[hard]))
        for name, costs, node_mtbf_s in cases:
            result = scenario(costs, failures_every(node_mtbf_s, flags.nodes), flags.goal)
            scenarios[f"{name}, {saves}"] = result
            show(f"{name}, {saves}", result)
    configuration = {
        "method": flags.method,
        "nodes": flags.nodes,
        "goal": flags.goal,
        "sources": [_source(path) for path in (*flags.checkpoint, flags.restart, flags.steps)],
    }
    report = {"subject": "effective time"} | environment() | {"configuration": configuration}
    write_json(flags.json, report | {"scenarios": scenarios})


def _source(path: Path) -> dict[str, Any]:
    """A result file and what it says of where it comes from."""
    result = _read(path)
    stated = result.get("environment", result)
    return {"file": path.name} | {key: stated.get(key) for key in ("subject", "date", "commit", "cpu", "gpu")}


if __name__ == "__main__":
    main()
