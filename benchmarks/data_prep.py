"""What preparing costs, and what a training clip costs afterwards.

    python -m benchmarks.data_prep --videos DIR [--count N] [--rounds R] [--json PATH]

One run measures, interleaved over the same videos: `data_prep` with one worker against a plain loop of ffmpeg
with the same settings (CPU seconds of everything that is started, and wall seconds); two workers against one, and
against one that is held to the single core that Ray reserves for a worker (ffmpeg overlaps decoding and encoding,
so a lone worker also uses a second core that is idle); as the yardstick of what this machine and ffmpeg itself
give, two such ffmpeg loops against one; the seconds that a hypervisor kept the cores for others (steal);
bytes a video; and the CPU time of decoding 16-frame clips of the default profile, the loader's way, against
short-side-320 files of x264 defaults with plain decord.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from arvideo_dist.hardware import environment, write_json
from arvideo_dist.storage import Storage
from data_prep.filters import chain
from data_prep.folder import VIDEO_SUFFIXES
from data_prep.isolation import Limits
from data_prep.items import Inputs, Item
from data_prep.prepare import prepare, run_settings
from data_prep.probe import probe_source
from data_prep.shards import read_table
from data_prep.transcode import TranscodeSettings, ffmpeg, output_rate
from data_prep.worker import LocalPool

FRAMES, STRIDE = 16, 4


def cpu_s() -> float:
    """CPU seconds of this process and its ended children so far."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextlib.contextmanager
def measured(into: list[dict[str, float]]) -> Iterator[None]:
    """Append CPU and wall seconds of the block, and core-seconds that the machine held back meanwhile."""
    cpu, wall, steal = cpu_s(), time.perf_counter(), psutil.cpu_times().steal
    yield
    into.append(
        {
            "cpu_s": cpu_s() - cpu,
            "wall_s": time.perf_counter() - wall,
            "steal_s": psutil.cpu_times().steal - steal,
        }
    )


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process and what it starts run on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def run_data_prep(paths: list[Path], out: Path, workers: int) -> None:
    items = [Item(source=path.name, path=str(path)) for path in paths]
    inputs = Inputs(items, [], {"source": "benchmark"})
    transcode, storage = TranscodeSettings(), Storage(str(out))
    out.mkdir(parents=True)

    def pool() -> LocalPool:
        return LocalPool(workers, storage, "train", transcode, Limits())

    with contextlib.redirect_stderr(io.StringIO()):
        manifest, _ = prepare(inputs, storage, "train", run_settings(inputs, transcode, len(items), 0), pool)
    assert manifest.samples == len(items), f"{manifest.rejects} of the videos were rejected"


def run_ffmpeg(
    paths: list[Path], out: Path, filters: dict[Path, str], encoder: list[str], at_once: int = 1
) -> int:
    """`at_once` loops of one ffmpeg after the other, over the largest files first; the bytes written."""
    out.mkdir(parents=True)
    single = ["-filter_threads", "1", "-threads", "1", "-noautorotate"]

    def one(path: Path) -> int:
        target = out / f"{paths.index(path)}.mp4"
        command = [ffmpeg()[0], "-v", "error", "-nostdin", *single, "-i", str(path), "-map", "0:v:0"]
        subprocess.run([*command, "-vf", filters[path], *encoder, str(target)], check=True)
        return target.stat().st_size

    with ThreadPoolExecutor(at_once) as loops:
        return sum(loops.map(one, sorted(paths, key=lambda path: path.stat().st_size, reverse=True)))


def own_filters(path: Path, settings: TranscodeSettings) -> str:
    """What data_prep has ffmpeg do with this file."""
    source = probe_source(str(path))
    return chain(source, settings.short_side, output_rate(source, settings.max_fps))


def clip_cost(videos: list[bytes], decode: Callable[[bytes, np.ndarray], Any]) -> float:
    """CPU milliseconds of a 16-frame clip, stride 4, at starts drawn alike for every caller."""
    draw, spent, clips = np.random.default_rng(0), 0.0, 0
    for video in videos:
        frames = _frames(video)
        for _ in range(4):
            start = int(draw.integers(0, max(1, frames - FRAMES * STRIDE)))
            indices = np.unique(np.minimum(start + STRIDE * np.arange(FRAMES), frames - 1))
            before = time.process_time()
            decode(video, indices)
            spent += time.process_time() - before
            clips += 1
    return spent / clips * 1000


def _frames(video: bytes) -> int:
    import av

    with av.open(io.BytesIO(video)) as container:
        return sum(bool(packet.size) for packet in container.demux(video=0))


def plain_decord(video: bytes, indices: np.ndarray) -> np.ndarray:
    import decord

    return decord.VideoReader(io.BytesIO(video), num_threads=1).get_batch(indices).asnumpy()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", required=True, help="folder of source videos")
    parser.add_argument("--count", type=int, default=8, help="how many of them, by name (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions (default: 3)")
    parser.add_argument("--match", default="", help="only names that hold this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    from arvideo_dist.data.decode import decode_rgb

    given = arguments()
    paths = sorted(
        path
        for path in Path(given.videos).iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and given.match in path.name
    )[: given.count]
    import webdataset  # noqa: F401  (imports torch: seconds once a run, measured apart from the videos)

    settings = TranscodeSettings()
    same = {path: own_filters(path, settings) for path in paths}
    usual = dict.fromkeys(paths, "scale='if(gt(iw,ih),-2,320)':'if(gt(iw,ih),320,-2)'")
    times: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("ffmpeg", "two ffmpegs", "one worker", "one worker on one core", "two workers")
    }
    clips: dict[str, list[float]] = {"droppable, packets selected": [], "short side 320, plain decord": []}
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        usual_bytes = run_ffmpeg(paths, top / "usual", usual, ["-an", "-c:v", "libx264", "-threads", "1"])
        for number in range(given.rounds):
            with measured(times["ffmpeg"]):
                run_ffmpeg(paths, top / f"ffmpeg-{number}", same, ["-an", *settings.encoder_arguments()])
            with measured(times["two ffmpegs"]):
                run_ffmpeg(paths, top / f"ffmpegs-{number}", same, ["-an", *settings.encoder_arguments()], 2)
            with measured(times["one worker"]):
                run_data_prep(paths, top / f"one-{number}", 1)
            with measured(times["one worker on one core"]), one_core():
                run_data_prep(paths, top / f"core-{number}", 1)
            with measured(times["two workers"]):
                run_data_prep(paths, top / f"two-{number}", 2)
        storage = Storage(str(top / "one-0"))
        rows = read_table(storage, "index-train.parquet").to_pylist()
        ours = [storage.read_range(row["shard"], row["offset"], row["size"]) for row in rows]
        usuals = [(top / "usual" / f"{number}.mp4").read_bytes() for number in range(len(paths))]
        for _ in range(given.rounds):
            clips["droppable, packets selected"].append(clip_cost(ours, decode_rgb))
            clips["short side 320, plain decord"].append(clip_cost(usuals, plain_decord))
        ours_bytes = sum(row["size"] for row in rows)

    def ratios(over: str, under: str, what: str) -> dict[str, Any]:
        """Of each round, so that a disturbed one shows; the claim is about their mean."""
        pairs = zip(times[over], times[under], strict=True)
        values = [above[what] / below[what] for above, below in pairs]
        return {"mean": statistics.mean(values), "rounds": values}

    cheap, dear = (statistics.median(values) for values in clips.values())
    figures = {
        "videos": len(paths),
        "seconds_of_video": sum(row["duration"] for row in rows),
        "rounds": times,
        "cpu_s_of_ffmpeg_over_data_prep": ratios("ffmpeg", "one worker", "cpu_s"),
        "wall_s_of_ffmpeg_over_data_prep": ratios("ffmpeg", "one worker", "wall_s"),
        "videos_a_second_and_core": len(paths) / statistics.mean(r["cpu_s"] for r in times["one worker"]),
        "cpu_s_of_two_workers_over_one": ratios("two workers", "one worker", "cpu_s"),
        "wall_s_of_one_ffmpeg_over_two": ratios("ffmpeg", "two ffmpegs", "wall_s"),
        "wall_s_of_one_worker_over_two": ratios("one worker", "two workers", "wall_s"),
        "wall_s_of_one_worker_on_one_core_over_two": ratios(
            "one worker on one core", "two workers", "wall_s"
        ),
        "cores_used": {
            name: statistics.mean(entry["cpu_s"] / entry["wall_s"] for entry in entries)
            for name, entries in times.items()
        },
        "bytes_a_video": {
            "droppable": ours_bytes / len(paths),
            "short side 320 defaults": usual_bytes / len(paths),
        },
        "cpu_ms_a_clip": clips,
        "cpu_of_clip_over_plain": cheap / dear,
    }
    result = {
        "configuration": {"command": sys.argv[1:], "settings": settings.model_dump(), "encoder": ffmpeg()[1]},
        "figures": figures,
    } | environment()
    print(json.dumps(result, indent=1))
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
