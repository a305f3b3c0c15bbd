"""Time from the SIGKILL of a worker to the next step that is applied to the weights, in a real run on Ray.

One run of the `pretrain` command trains a tiny model on synthetic clips. Each round kills a worker that the seed
draws, a drawn number of steps after the newest checkpoint, and reads the run's own lines:

detection   kill -> "workers were lost": Ray Train's poll, and the end of the other workers
start       -> "... workers have started": placement, processes, import of torch, process group
load        -> "continues from": import of DeepSpeed and MLflow, checkpoint verified and read, engine
first_step  -> "step N/...": decode processes, the first batch, the step

The steps between the checkpoint and the kill are computed again; that is not counted here, since it follows from
`run.checkpoint_every_steps` alone.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import yaml

_STAGES = {
    "detection_s": r"workers were lost: (.*)",
    "start_s": r"workers have started",
    "load_s": r"continues from",
    "first_step_s": r"step (\d+)/",
}


@dataclass(frozen=True)
class Plan:
    rounds: int
    workers: int
    zero_stage: int
    seed: int
    checkpoint_every_steps: int = 5


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Every round's seconds and their mean. Raises RuntimeError if the run ends early."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _make_data(folder / "data")
        training = _Training(_config(plan, folder))
        draw = random.Random(plan.seed)
        rounds = []
        try:
            for number in range(plan.rounds):
                training.until(r"checkpoint step-\d+ is complete")
                for _ in range(draw.randrange(plan.checkpoint_every_steps)):
                    training.until(r"step \d+/")
                rounds.append(training.kill_and_wait(draw))
                figures = "  ".join(f"{name} {value}" for name, value in rounds[-1].items())
                say(f"round {number + 1}  {figures}")
        finally:
            training.end()
    return {
        "seconds": {
            name: {"mean": mean(values), "min": min(values), "max": max(values), "deviation": _spread(values)}
            for name in (*_STAGES, "total_s")
            for values in [[figures[name] for figures in rounds]]
        },
        "rounds": rounds,
    }


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _make_data(folder: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "synthetic", "--out", str(folder), "--split", "train"]
    size = ["--num-videos", "48", "--seed", "1", "--width", "64", "--height", "64", "--frames", "24"]
    subprocess.run([*command, *size], check=True, stdout=subprocess.DEVNULL)


def _config(plan: Plan, folder: Path) -> Path:
    file = folder / "run.yaml"
    sections = {
        "run": {
            "name": "restart",
            "storage_path": str(folder / "runs"),
            "checkpoint_every_steps": plan.checkpoint_every_steps,
        },
        "data": {"path": str(folder / "data"), "val_split": None, "stride": 2, "workers": 1},
        "model": {
            "encoder": "demo",
            "frames": 8,
            "image_size": 32,
            "tubelet": [2, 8, 8],
            "cluster": [2, 2, 2],
            "target_norm": "none",
        },
        "decoder": {"width": 64, "depth": 1},
        "train": {
            "steps": 10**6,  # ended by the benchmark
            "global_batch": 8 * plan.workers,
            "micro_batch": 4,
            "zero_stage": plan.zero_stage,
            "log_every_steps": 1,
        },
        "cluster": {"workers": plan.workers, "device": "cpu"},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


class _Training:
    """The command, its output read line by line."""

    def __init__(self, config: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "arvideo_dist.pretrain", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._last: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        """Read up to the first further line that matches."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = [*self._last[-40:], line]
            if found := re.search(pattern, line):
                return found
        raise RuntimeError(
            f"the run ended before a line matched {pattern!r}; its last lines:\n{''.join(self._last)}"
        )

    def kill_and_wait(self, draw: random.Random) -> dict[str, Any]:
        """Seconds of each stage; the cause as the driver named it and the first step that was applied."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
        draw.choice(sorted(workers, key=lambda worker: worker.pid)).send_signal(signal.SIGKILL)
        began = last = time.perf_counter()
        figures: dict[str, Any] = {}
        for stage, pattern in _STAGES.items():
            found = self.until(pattern)
            now = time.perf_counter()
            figures[stage], last = round(now - last, 2), now
            if stage == "detection_s":
                figures["cause"] = found[1]
        figures["total_s"] = round(last - began, 2)
        figures["next_step"] = int(found[1])
        return figures

    def end(self) -> None:
        """Ask the run to end, and see that it does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.communicate()
