"""The memory check's estimate beside what real runs on CPU workers take: `python benchmarks/memory.py --json FILE`.

Each case is a `pretrain` run of a few steps with a checkpoint at its end. Measured is the largest proportional set
size (shared pages divided among who shares them) of each training worker with its decode processes, less what it
was when the workers started, since the check compares with what is free then.

With `--alone CASE` one rank trains in this process, without Ray, loader and decode workers, and its largest
resident set is compared with the parts but those of batches and decode workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml

from arvideo_dist.checks.memory import PROCESS_BYTES, memory_of
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.hardware import environment, write_json
from arvideo_dist.model.kinds import make_sequences
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.derived import derive

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
    parser.add_argument("--alone", choices=list(CASES))
    flags = parser.parse_args()
    if flags.alone:
        found = alone(flags.alone)
        print(json.dumps(found))
        write_json(flags.json, {"subject": "memory check, one rank alone", **environment(), **found})
        return
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
    config = PretrainConfig.model_validate(sections)
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


def alone(name: str) -> dict[str, Any]:
    """Three steps and a save of one rank: estimate and measurement."""
    from arvideo_dist.data.loader import Batch
    from arvideo_dist.tasks.kinds import task_of

    train = {**CASES[name]["train"], "global_batch": CASES[name]["train"]["micro_batch"]}
    config = PretrainConfig.model_validate(
        {**CASES[name], "train": train, "cluster": {"workers": 1, "device": "cpu"}}
    )
    derived = derive(config, None)
    before = psutil.Process().memory_info().rss
    from arvideo_dist.train.checkpoint.saver import Saver
    from arvideo_dist.train.engine.engine import Engine

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed wants it
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        task = task_of(config)
        model = task.build()
        draw, rng = make_sequences(config.model, config.decoder).draw_sequence, np.random.default_rng(0)
        engine = Engine(
            model, task.loss, task.parameter_groups(model), config.train, config.optim, torch.device("cpu"), 1
        )
        saver = Saver(Storage(folder), engine, config.run, lambda line: None)
        clips, side = config.train.micro_batch, config.model.image_size
        for step in range(1, 4):
            drawn = [draw(rng) for _ in range(clips)]
            batch = Batch(
                clips=torch.randint(0, 256, (clips, 3, config.model.frames, side, side), dtype=torch.uint8),
                inputs={
                    "context_ids": torch.from_numpy(np.stack([context for context, _ in drawn])),
                    "target_ids": torch.from_numpy(np.stack([target for _, target in drawn])),
                },
                weights=torch.ones(clips),
                places=torch.arange(clips),
                bad=[],
            )
            engine.accumulate([batch], float(clips))
            saver.before_update()
            engine.apply(1e-4)
            if step == 2:
                saver.request(step, {})
        saver.finish()
        dist.destroy_process_group()
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    host, _ = memory_of(config, derived, cuda=False)
    parts = {what: number for what, number in host.parts if what != "batches"}
    parts["processes"] = PROCESS_BYTES
    return {
        "case": name,
        "workers": 1,
        "micro_batch": clips,
        "parts_mib": {what: round(number / 2**20) for what, number in parts.items()},
        "estimated_gib": round(sum(parts.values()) / 2**30, 2),
        "measured_gib": round(measured / 2**30, 2),
        "estimate_over_measured": round(sum(parts.values()) / measured, 2),
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
