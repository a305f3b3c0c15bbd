"""CPU time of a training clip, everything counted, against two other loaders on the same videos.

Each loader runs in one worker process behind the same torch DataLoader; its CPU time is the worker's and the
receiving process's together, from one delivered batch to a later one, after a warm-up. The receiving process
copies each batch once, as pinning does. Rounds of all loaders take turns, so that a machine that becomes slower
or faster does so for all of them.

videomae   what VideoMAE's pretraining loader does, on its recommended short-side-320 files of the same videos:
           decord from the file, PIL multi-scale crop of each frame, float normalise
decord     plain decord on the members of our shards, then our crop
host       this project's loader
device     this project's loader with device transforms; the CPU's share

The split is taken in the same run, so its parts add up: the stages by the clock of the thread that runs them,
`collate` what they leave of making a batch (places, draws, buffers), `ipc` what the worker spends outside of
making batches (torch's queue and its thread) and all that the receiving process spends.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import decord
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from arvideo_dist.data import decode as decode_module
from arvideo_dist.data import loader as loader_module
from arvideo_dist.data.decode import decode_with_decord
from arvideo_dist.data.index import SampleRow, open_index
from arvideo_dist.data.loader import Batch, ClipSamples, ClipSource, LoaderOptions
from arvideo_dist.data.order import Stream, sample_generator
from arvideo_dist.data.reader import MemberReader
from arvideo_dist.data.transforms import MultiScaleCrop, draw_multi_scale_crop
from arvideo_dist.data.workers import DecodePool, PlacesToBatch
from arvideo_dist.storage import Storage

FRAMES, STRIDE, SIZE = 16, 4, 224
SCALES = (1.0, 0.875, 0.75, 0.66)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WARM_UP_BATCHES = 6  # every buffer in circulation has been used once


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    data: str  # data set made by data_prep from `videos`
    split: str
    videos: Path  # the original files
    work: Path  # short-side-320 files are made here, and kept
    clips: int  # measured a loader and round
    rounds: int
    micro_batch: int


def run(plan: Plan, gpu_clips_per_second: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures, as the result file holds them. Raises ValueError if videos are missing."""
    torch.set_num_threads(1)
    reference = _reference_files(plan, say)
    only_decord = _samples(plan, LoaderOptions())
    only_decord.decode_rgb = decode_with_decord
    loaders: dict[str, PlacesToBatch[Any]] = {
        "videomae": VideoMAELoader(reference),
        "decord": only_decord,
        "host": _samples(plan, LoaderOptions()),
        "device": _samples(plan, LoaderOptions(device_transforms=True)),
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in loaders}
    for number in range(plan.rounds):
        for name, samples in loaders.items():
            rounds[name].append(_measure(samples, plan, seed=number))
            say(f"round {number + 1}  {name:<9} {rounds[name][-1]['cpu_ms']:7.2f} CPU-ms a clip")
    figures = {name: _summary(results, gpu_clips_per_second) for name, results in rounds.items()}
    for name in ("decord", "host", "device"):
        ratios = [a["cpu_ms"] / b["cpu_ms"] for a, b in zip(rounds["videomae"], rounds[name], strict=True)]
        figures[name]["times_cheaper_than_videomae"] = _spread(ratios) | {"rounds": ratios}
    for name in ("host", "device"):
        splits = [result["split_cpu_ms"] for result in rounds[name]]
        figures[name]["split_cpu_ms"] = {stage: mean(split[stage] for split in splits) for stage in splits[0]}
    return {"videos": _describe(plan, reference), "loaders": figures, "rounds": rounds}


def _samples(plan: Plan, options: LoaderOptions) -> ClipSamples:
    return ClipSamples(
        [ClipSource(Storage(plan.data), plan.split, STRIDE, MultiScaleCrop(SCALES))],
        clip_frames=FRAMES,
        image_size=SIZE,
        draw=draw_tokens,
        seed=0,
        shuffle=True,
        options=options,
    )


def draw_tokens(seed: int, place: int, row: SampleRow) -> dict[str, np.ndarray]:
    """Ids of the default geometry's lengths: 300 encoder tokens, 1470 queries."""
    order = sample_generator(seed, place, Stream.SEQUENCE).permutation(1568)
    return {"context_ids": order[:300], "target_ids": order[:1470]}


class VideoMAELoader:
    """The steps of VideoMAE's pretraining data set, one clip after the other, then torch's collate."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.refused = files, dict[int, str]()

    def __getitem__(self, places: list[int]) -> Any:
        return default_collate([self._clip(place) for place in places])

    def _clip(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = random.Random(place)
        reader = decord.VideoReader(
            str(self.files[place % len(self.files)]), num_threads=1, ctx=decord.cpu(0)
        )
        start = draw.randrange(max(1, len(reader) - FRAMES * STRIDE + 1))
        indices = np.minimum(start + STRIDE * np.arange(FRAMES), len(reader) - 1)
        data = reader.get_batch(indices).asnumpy()
        pictures = [Image.fromarray(frame).convert("RGB") for frame in data]
        width, height = pictures[0].size
        crop = draw_multi_scale_crop(height, width, SIZE, SCALES, np.random.default_rng(place))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        pictures = [p.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for p in pictures]
        stacked = np.concatenate([np.asarray(p) for p in pictures], axis=2)
        clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
        for channel, plane in enumerate(clip):
            plane.sub_(_MEAN[channel % 3]).div_(_STD[channel % 3])
        mask = np.zeros(14 * 14)
        mask[:176] = 1
        np.random.default_rng(place).shuffle(mask)
        return clip.view(FRAMES, 3, SIZE, SIZE).transpose(0, 1), torch.from_numpy(np.tile(mask, 8))


# What a stage is made of, as the worker finds it when it calls it.
_STAGES: dict[str, list[tuple[Any, str]]] = {
    "read": [(MemberReader, "read")],
    "decode": [(loader_module, "decode_planes")],  # and what ClipSamples.decode_rgb holds
    "colour": [(decode_module, "_rgb")],
    "augment": [(loader_module, "crop_and_resize"), (loader_module, "copy_crop")],
}


class _Timed:
    """Adds to each batch the worker's CPU seconds so far: of the whole process, and of its stages."""

    def __init__(self, samples: PlacesToBatch[Any]) -> None:
        self.samples, self.refused = samples, samples.refused
        self.spent: dict[str, float] = {}

    def __getitem__(self, places: list[int]) -> tuple[Any, dict[str, float]]:
        if not self.spent:
            self._watch_stages()
        began = time.thread_time()
        batch = self.samples[places]
        self.spent["whole"] += time.thread_time() - began
        return batch, self.spent | {"process": time.process_time()}

    def _watch_stages(self) -> None:
        """Have every stage count its own time, without that of a stage inside it (colour in decode)."""
        self.spent = dict.fromkeys([*_STAGES, "whole"], 0.0)
        inside: list[float] = []

        def watched(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*arguments: Any) -> Any:
                inside.append(0.0)
                began = time.thread_time()
                try:
                    return call(*arguments)
                finally:
                    took = time.thread_time() - began
                    self.spent[stage] += took - inside.pop()
                    if inside:
                        inside[-1] += took

            return timed

        for stage, functions in _STAGES.items():
            for owner, name in functions:
                setattr(owner, name, watched(stage, getattr(owner, name)))
        if isinstance(self.samples, ClipSamples):
            self.samples.decode_rgb = watched("decode", self.samples.decode_rgb)


def _measure(samples: PlacesToBatch[Any], plan: Plan, seed: int) -> dict[str, Any]:
    batches = -(-plan.clips // plan.micro_batch)
    first = seed * plan.clips

    def requests() -> Iterator[list[int]]:
        for number in range(_WARM_UP_BATCHES + batches):
            yield list(range(first + number * plan.micro_batch, first + (number + 1) * plan.micro_batch))

    slot_bytes = samples.batch_bytes(plan.micro_batch) if isinstance(samples, ClipSamples) else 0
    own = wall = 0.0
    start: dict[str, float] = {}
    pinned: list[torch.Tensor] = []
    pool = DecodePool(_Timed(samples), 1, pin_memory=False, slot_bytes=slot_bytes)
    for number, (batch, spent) in enumerate(pool.run(requests())):
        tensors = _tensors(batch)
        pinned = pinned or [torch.empty(2 * t.numel(), dtype=t.dtype) for t in tensors]
        for target, tensor in zip(pinned, tensors, strict=True):
            in_memory = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
            target[: tensor.numel()].copy_(in_memory)
        if number == _WARM_UP_BATCHES - 1:
            start, own, wall = spent, time.process_time(), time.perf_counter()
    clips = batches * plan.micro_batch
    own = (time.process_time() - own) / clips * 1000
    ms = {stage: (spent[stage] - start[stage]) / clips * 1000 for stage in spent}
    process, whole = ms.pop("process"), ms.pop("whole")
    return {
        "cpu_ms": process + own,
        "worker_cpu_ms": process,
        "receiver_cpu_ms": own,
        "wall_ms": (time.perf_counter() - wall) / clips * 1000,
        "split_cpu_ms": ms | {"collate": whole - sum(ms.values()), "ipc": process - whole + own},
    }


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, Batch):
        if batch.bad:
            raise ValueError(f"the data set has a bad sample, measure another one: {batch.bad[0]}")
        clips = [batch.clips] if batch.planes is None else [batch.planes.y, batch.planes.uv]
        return [*clips, *batch.inputs.values()]
    return list(batch)


def _summary(results: list[dict[str, Any]], gpu_clips_per_second: float) -> dict[str, Any]:
    cpu_ms = _spread([result["cpu_ms"] for result in results])
    return {
        "cpu_ms": cpu_ms,
        "clips_per_second_and_core": 1000 / cpu_ms["mean"],
        "cores_per_gpu": gpu_clips_per_second * cpu_ms["mean"] / 1000,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "min": min(values),
        "max": max(values),
        "deviation": stdev(values) if len(values) > 1 else 0.0,
    }


def _describe(plan: Plan, reference: list[Path]) -> dict[str, Any]:
    index = open_index(Storage(plan.data), plan.split)
    rows = [index[i] for i in range(len(index))]
    return {
        "count": len(rows),
        "mean_seconds": mean(row.duration for row in rows),
        "short_sides_in_shards": sorted({min(row.width, row.height) for row in rows}),
        "mean_kb_in_shards": mean(row.size for row in rows) / 1000,
        "mean_kb_of_short_side_320": mean(path.stat().st_size for path in reference) / 1000,
    }


def _reference_files(plan: Plan, say: Callable[[str], None]) -> list[Path]:
    """The data set's videos as VideoMAE recommends to keep them: short side 320, x264's defaults."""
    index = open_index(Storage(plan.data), plan.split)
    plan.work.mkdir(parents=True, exist_ok=True)
    scale = "scale='if(gt(iw,ih),-2,min(320,iw))':'if(gt(iw,ih),min(320,ih),-2)'"
    files = []
    for row in (index[i] for i in range(len(index))):
        source, target = plan.videos / row.source, plan.work / f"{row.key}.mp4"
        if not source.exists():
            raise ValueError(
                f"{source} is missing: --videos must be the folder that the data set was made from"
            )
        if not target.exists():
            say(f"short side 320: {row.source}")
            aside = target.with_suffix(".partial")
            command = [
                imageio_ffmpeg.get_ffmpeg_exe(),
                "-v",
                "error",
                "-y",
                "-i",
                f"file:{source}",
                "-vf",
                scale,
            ]
            subprocess.run(
                [*command, "-an", "-f", "mp4", f"file:{aside}"], check=True, stdin=subprocess.DEVNULL
            )
            aside.replace(target)
        files.append(target)
    return files
