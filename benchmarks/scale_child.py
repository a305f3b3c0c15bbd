"""What `scale.py` measures, each in a process of its own, with the package of one checkout or the other.

python -c "import scale_child; scale_child.main()" MEASUREMENT ARGUMENTS, with both folders on PYTHONPATH
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CLIPS, WORKERS, PLANS = 200, 2, 1000
VIDEO_BYTES = 1000
MARK = "the requests of this are counted: "


def draw_ids(seed: int, place: int, row: Any) -> dict[str, np.ndarray]:
    return {"context_ids": np.arange(6), "target_ids": np.arange(10)}


def samples_of(data: str) -> Any:
    from arvideo_dist.data.loader import ClipSamples, ClipSource, LoaderOptions
    from arvideo_dist.data.transforms import MultiScaleCrop
    from arvideo_dist.storage import Storage

    source = ClipSource(Storage(data), "train", 4, MultiScaleCrop((1.0,)))
    arguments: dict[str, Any] = {"clip_frames": 16, "image_size": 224, "draw": draw_ids, "seed": 0}
    return ClipSamples([source], **arguments, shuffle=True, options=LoaderOptions())


def peak_kib() -> int:
    """Of this process's memory. (What getrusage tells begins with the peak of the process that started it.)"""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(dict(lines)["VmHWM"].split()[0])


def start(data: str) -> dict[str, float]:
    import arvideo_dist.data.loader  # noqa: F401  # its import is no part of it

    before, began = peak_kib(), time.perf_counter()
    samples = samples_of(data)
    seconds = time.perf_counter() - began
    peak = peak_kib() - before
    began = time.perf_counter()
    samples.plan(list(range(8)))
    return {"seconds": seconds, "first_plan_s": time.perf_counter() - began, "peak_mb": peak / 1024}


class Plans:
    """Plans places like a decode worker, and gives its memory."""

    refused: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, places: list[int]) -> tuple[int, int, int]:
        self.samples.plan(places)
        memory = psutil.Process().memory_full_info()
        return os.getpid(), memory.pss, memory.uss


def workers(data: str) -> dict[str, float]:
    from arvideo_dist.data.workers import DecodePool

    samples = samples_of(data)
    began = time.perf_counter()
    pool: Any = DecodePool(Plans(samples), WORKERS, False)  # type: ignore[arg-type]
    last, first = {}, 0.0
    for process, pss, uss in pool.run(iter(np.arange(WORKERS * PLANS).reshape(-1, 8).tolist())):
        first = first or time.perf_counter() - began
        last[process] = pss / 2**20, uss / 2**20
    pss, uss = np.mean(list(last.values()), axis=0).tolist()
    return {"pss_mb": pss, "uss_mb": uss, "first_batch_s": first}


def clips(data: str) -> dict[str, float]:
    samples = samples_of(data)
    located = samples.order.locate(range(CLIPS))
    rows = [samples.indexes[0][at.row] for at in located]
    samples.readers[0].read(rows[0])  # what a process does once, such as finding credentials
    counted("clips")
    cpu, began = time.process_time(), time.perf_counter()
    for row in rows:
        assert len(samples.readers[0].read(row)) == VIDEO_BYTES
    result = {"cpu_ms": (time.process_time() - cpu) / CLIPS * 1000}
    result["ms"] = (time.perf_counter() - began) / CLIPS * 1000
    counted("end")
    return result


def run_folder(address: str) -> dict[str, float]:
    """What one rank and its driver do to the run's folder."""
    import torch
    import torch.distributed as dist

    from arvideo_dist.config.model import DecoderConfig, ModelConfig
    from arvideo_dist.config.optim import OptimConfig, TrainConfig
    from arvideo_dist.config.run import RunConfigSection
    from arvideo_dist.model.arvideo import ARVideo
    from arvideo_dist.storage import Storage
    from arvideo_dist.tasks.pretraining import pretraining_loss
    from arvideo_dist.tasks.task import decay_matrices
    from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
    from arvideo_dist.train.checkpoint.saver import Saver
    from arvideo_dist.train.engine.engine import Engine
    from arvideo_dist.train.run.lease import acquire

    meeting = Path(tempfile.mkdtemp()) / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    model = ModelConfig(encoder="demo", frames=4, image_size=16, tubelet=(2, 8, 8), cluster=(1, 1, 2))
    module = ARVideo(model, DecoderConfig(width=64, depth=1))
    train = TrainConfig(zero_stage=1, micro_batch=1, global_batch=1)
    engine = Engine(
        module, pretraining_loss, decay_matrices(module, 0.05), train, OptimConfig(), torch.device("cpu"), 1
    )
    run = Storage(address)
    lease = acquire(run, 3600.0)
    guarded = lease.guard.storage()
    saver = Saver(guarded, engine, RunConfigSection(keep_last=2), say=lambda line: None)
    for step in (1, 2, 3):
        saver.request(step, {"position": step})
        saver.finish()
    counted("a worker's look at the lease")
    lease.guard.check()
    lease.guard.record()
    counted("a heartbeat of the lease")
    lease._write()
    counted("a save of one rank, which deletes the oldest of three checkpoints")
    saver.request(4, {"position": 4})
    saver.finish()
    counted("a restart of one rank: find, verify and load the newest checkpoint")
    found = open_newest_whole(guarded, dist.new_group(backend="gloo"))
    assert isinstance(found, Checkpoint)
    found.load_weights(module)
    found.load_optimizer(engine)
    counted("end")
    return {}


def counted(what: str) -> None:
    """Tells the parent that what is asked from here on belongs to `what`; goes on when it has heard."""
    print(MARK + what, flush=True)
    sys.stdin.readline()


def main() -> None:
    measurements: dict[str, Callable[..., dict[str, float]]] = {
        "start": start,
        "workers": workers,
        "clips": clips,
        "run_folder": run_folder,
    }
    print(json.dumps(measurements[sys.argv[1]](*sys.argv[2:])))
