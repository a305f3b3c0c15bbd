"""The memory check's estimate beside what real runs on CPU workers take: `python benchmarks/memory.py --json FILE`.

Each case is a `pretrain` run of a few steps with a checkpoint at its end. Measured is the largest proportional set
size (shared pages divided among who shares them) of each training worker with its decode processes, less what it
was when the workers started, since the check compares with what is free then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import yaml

from arvideo_dist.bench.report import environment, write_json
from arvideo_dist.checks.memory import memory_of
from arvideo_dist.config import RunConfig
from arvideo_dist.derived import derive

_EVERY_S = 0.2
CASES: dict[str, dict[str, Any]] = {
    "small, ZeRO 1, 2 workers": {
        "model": {"encoder": "small"},
        "train": {"zero_stage": 1, "global_batch": 16, "micro_batch": 4},
        "cluster": {"workers": 2},
    },
    "base, ZeRO 0, 1 worker": {
        "model": {"encoder": "base"},
        "train": {"zero_stage": 0, "global_batch": 8, "micro_batch": 4},
        "cluster": {"workers": 1},
    },
    "small, ZeRO 3, 2 workers": {
        "model": {"encoder": "small"},
        "train": {"zero_stage": 3, "global_batch": 16, "micro_batch": 8},
        "cluster": {"workers": 2},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="names; default: all")
    flags = parser.parse_args()
    result: dict[str, Any] = {"subject": "memory check", **environment(), "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_data(folder / "data")
        for name in flags.cases:
            result["cases"][name] = found = measure(folder, name)
            print(
                f"{name}: estimated {found['estimated_gib']} GiB, measured {found['measured_gib']}",
                flush=True,
            )
            write_json(flags.json, result)


def make_data(folder: Path) -> None:
    command = [*(sys.executable, "-m", "data_prep", "synthetic", "--out", str(folder), "--split", "train")]
    command += ["--num-videos", "32", "--seed", "1", "--width", "320", "--height", "240", "--frames", "64"]
    subprocess.run(command, check=True)


def measure(folder: Path, name: str) -> dict[str, Any]:
    """One case: estimate and measurement of each worker."""
    sections = {
        **CASES[name],
        "run": {"name": name.replace(" ", "-").replace(",", ""), "storage_path": str(folder / "runs")},
        "data": {"path": str(folder / "data"), "val_split": None, "workers": 1, "stride": 2},
        "optim": {"warmup_epochs": 0},
    }
    sections["train"] = {**sections["train"], "steps": 3, "log_every_steps": 1}
    sections["cluster"] = {**sections["cluster"], "device": "cpu"}
    config = RunConfig.model_validate(sections)
    host, _ = memory_of(config, derive(config, None), cuda=False)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    before, peak = _run(["--config", str(file)])
    measured = {str(pid): round((peak[pid] - before[pid]) / 2**30, 2) for pid in peak if pid in before}
    return {
        "configuration": sections,
        "estimated_gib": round(host.total / 2**30, 2),
        "parts_mib": {what: round(number / 2**20) for what, number in host.parts},
        "measured_gib": sorted(measured.values()),
        "estimate_over_measured": round(host.total / 2**30 / max(measured.values()), 2),
    }


def _run(arguments: list[str]) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes of each worker when the workers had started, and at most."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "arvideo_dist.pretrain", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    before: dict[int, int] = {}
    peak: dict[int, int] = {}
    started, ended = threading.Event(), threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY_S):
            for worker, size in _workers(process.pid).items():
                if started.is_set():
                    before.setdefault(worker, size)
                    peak[worker] = max(size, peak.get(worker, 0))

    sampler = threading.Thread(target=sample)
    sampler.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        if "workers have started" in line:
            started.set()
    ended.set()
    sampler.join()
    if process.wait():
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    return before, peak


def _workers(driver: int) -> dict[int, int]:
    """Proportional set size of each training worker with all below it, by process id."""
    sizes = {}
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                family = [process, *process.children(recursive=True)]
                sizes[process.pid] = sum(each.memory_full_info().pss for each in family)
        except psutil.Error:  # it has just ended
            continue
    return sizes


if __name__ == "__main__":
    main()
