"""How fast an evaluation is beside its bare forward passes: `python -m benchmarks.evaluation_speed --json FILE`.

One rank on the CPU. A round takes both times, one after the other, in an order that alternates:

loop      `SequenceRun.run`: decode workers, views, scores, saves; from the first batch that is there to the last
          save. What the workers take to start (`ready_s`) is told apart: it is paid once for any number of videos
forward   the same batches from memory through the same classifier, with their softmax

The ratio is loop over forward. Decode workers run beside the arithmetic, so give them cores of their own:
`--threads` plus `--workers` should not be more than the machine has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from arvideo_dist.config.commands import EvaluateConfig
from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.data.loader import Batch
from arvideo_dist.evaluate import of_source
from arvideo_dist.hardware import environment, write_json
from arvideo_dist.launch.start import derive_checked
from arvideo_dist.model.interchange import export_classifier
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.classification import build_classifier
from arvideo_dist.train.assignment import Assignment
from arvideo_dist.train.run.lease import acquire
from arvideo_dist.train.run.watch import Watch
from arvideo_dist.train.sequence import SequenceRun
from data_prep.synthetic import CLASSES

FRAMES, TUBELET = 16, (2, 16, 16)


class TimedEvaluation(SequenceRun):
    """Tells when the first batch was there."""

    ready_at: float | None = None

    def _computed(self, host: Batch) -> torch.Tensor:
        if self.ready_at is None:
            self.ready_at = time.perf_counter()
        return super()._computed(host)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--encoder", default="small", help="model.encoder (default: small)")
    parser.add_argument("--image-size", type=int, default=112, help="pixels (default: 112)")
    parser.add_argument("--views", nargs="+", default=["5x3", "2x3"], help="(default: 5x3 2x3)")
    parser.add_argument("--videos", type=int, default=12, help="(default: 12)")
    parser.add_argument("--frames", type=int, default=250, help="of each video (default: 250)")
    parser.add_argument("--size", type=int, nargs=2, default=(426, 320), help="of a frame (default: 426 320)")
    parser.add_argument("--workers", type=int, default=1, help="data.workers (default: 1)")
    parser.add_argument(
        "--threads", type=int, default=1, help="as Ray gives a worker of cluster.cpus_per_worker (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="(default: 4)")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result = {"subject": "evaluation speed", **environment(), "configuration": _configuration(flags)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as leases:
        subject = Subject(Path(folder), flags, leases)
        result["views"] = {views: subject.measure(views) for views in flags.views}
    result["load_average_after"] = list(os.getloadavg())
    dist.destroy_process_group()
    if flags.json:
        write_json(flags.json, result)


def _configuration(flags: argparse.Namespace) -> dict[str, Any]:
    names = ("encoder", "image_size", "videos", "frames", "size", "workers", "threads", "rounds")
    given = {name: getattr(flags, name) for name in names}
    return {**given, "clip_frames": FRAMES, "tubelet": TUBELET, "device": "cpu", "precision": "fp32"}


class Subject:
    """A data set and a classifier of random weights."""

    def __init__(self, folder: Path, flags: argparse.Namespace, leases: contextlib.ExitStack) -> None:
        """`leases`: holds those of all evaluations, which watch them to the end of the process."""
        self._folder, self._flags, self._leases = folder, flags, leases
        width, height = flags.size
        subprocess.run(
            [
                *(sys.executable, "-m", "data_prep", "synthetic", "--out", str(folder / "data")),
                *("--split", "val", "--num-videos", str(flags.videos), "--seed", "1"),
                *("--frames", str(flags.frames), "--width", str(width), "--height", str(height)),
            ],
            check=True,
        )
        model = ClassifierConfig(
            encoder=flags.encoder, frames=FRAMES, image_size=flags.image_size, tubelet=TUBELET
        )
        classifier = build_classifier(model, len(CLASSES))
        export_classifier(classifier, model, Storage(str(folder / "classifier")), "hf", list(CLASSES))

    def measure(self, views: str) -> dict[str, Any]:
        evaluation, _ = self._evaluation(views, "batches")
        batches = [batch for step in evaluation._loader for batch in step]
        rounds: list[dict[str, float]] = []
        for number in range(self._flags.rounds + 1):  # the first one warms both up
            figures: dict[str, float] = {}
            for kind in ("loop", "forward") if number % 2 else ("forward", "loop"):
                evaluation, watch = self._evaluation(views, f"{views}-{number}-{kind}")
                figures |= _loop(evaluation, watch) if kind == "loop" else _forward(evaluation, batches)
            figures["ratio"] = figures["loop_s"] / figures["forward_s"]
            if number:
                rounds.append(figures)
            said = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
            print(f"{views}  {f'round {number}' if number else 'warm-up'}  {said}", flush=True)
        ratio = median(figures["ratio"] for figures in rounds)
        scored = sum(len(batch.weights) for batch in batches)
        print(f"{views}  {scored} views: the loop takes {ratio:.3f} times its forward passes (median)")
        return {"scored_views": scored, "ratio": ratio, "rounds": rounds}

    def _evaluation(self, views: str, name: str) -> tuple[TimedEvaluation, Watch]:
        given = {
            "run": {"storage_path": str(self._folder / "runs"), "name": f"{views}-{name}"},
            "data": {"path": str(self._folder / "data"), "stride": 4, "workers": self._flags.workers},
            "evaluation": {"views": views},
            "cluster": {"workers": 1, "device": "cpu"},
        }
        source = argparse.Namespace(source=str(self._folder / "classifier"))
        config = of_source(EvaluateConfig.model_validate(given), source)
        lease = self._leases.enter_context(acquire(run_folder(config), lease_s=600))
        assignment: Any = Assignment(config, derive_checked(config), "", "", lease.guard)
        control = dist.new_group(backend="gloo")
        watch = Watch(lease.guard, control, lambda: None)
        return TimedEvaluation(assignment, torch.device("cpu"), control, None), watch


def _loop(evaluation: TimedEvaluation, watch: Watch) -> dict[str, float]:
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run(watch)
    ended = time.perf_counter()
    assert evaluation.ready_at is not None
    return {"ready_s": evaluation.ready_at - began, "loop_s": ended - evaluation.ready_at}


def _forward(evaluation: TimedEvaluation, batches: list[Batch]) -> dict[str, float]:
    began = time.perf_counter()
    for batch in batches:
        evaluation._computed(batch)
    return {"forward_s": time.perf_counter() - began}


if __name__ == "__main__":
    main()
