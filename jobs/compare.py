"""Accuracies of evaluated runs side by side: `python jobs/compare.py RUN [RUN ...]`.

Reads `RUN/evaluations/*/result.json`, which `python -m arvideo_dist.evaluate RUN` writes, and prints a line for
each evaluation. The standard error is that of top-1 over videos drawn, sqrt(p (1 - p) / videos), not of trainings.
Exits with 2 if a run has no evaluation that has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

METRICS = {"top-1": "accuracy/top1", "top-5": "accuracy/top5", "mean class": "accuracy/mean_class"}


def evaluations(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and `result.json` of each ended evaluation of `run`, by name; ValueError if there is none."""
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: give the folder of a run of arvideo_dist.finetune")
    found = []
    for file in sorted(run.glob("evaluations/*/result.json")):
        try:
            result = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no JSON ({error}): delete it and evaluate again") from None
        if METRICS["top-1"] in result:
            result["classes"] = (
                len((file.parent / "classes.txt").read_text().splitlines()) - 1
            )  # and a header
            found.append((file.parent.name, result))
    if not found:
        raise ValueError(f"{run} has no evaluation with an accuracy: python -m arvideo_dist.evaluate {run}")
    return found


def row(run: Path, name: str, result: dict[str, Any]) -> list[str]:
    """Cells of one evaluation; a metric that it lacks is a dash."""
    share, videos = result[METRICS["top-1"]], result["videos"]
    shares = [f"{result[metric]:.1%}" if metric in result else "-" for metric in METRICS.values()]
    error = math.sqrt(share * (1 - share) / videos)
    return [run.name, name, *shares, f"{error:.1%}", f"{videos:.0f}", f"{1 / result['classes']:.1%}"]


def table(runs: list[Path]) -> str:
    """The evaluations of all runs, columns aligned. Raises ValueError as `evaluations` does."""
    header = ["run", "evaluation", *METRICS, "standard error", "videos", "chance"]
    rows = [header] + [row(run, name, result) for run in runs for name, result in evaluations(run)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(header))]
    # Names stand left, numbers right.
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of an evaluated run")
    try:
        print(table(parser.parse_args().runs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
