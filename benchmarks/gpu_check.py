"""Every check and measurement that needs a GPU, in one call of under ten minutes on a bare CUDA machine.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu-<date>.json

Needs torch and pydantic; DeepSpeed where it is installed. Without a GPU it says that it skipped, exit code 0.
A failed check ends with exit code 1 after all others have run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no installed package

from arvideo_dist.bench.report import environment, write_json
from arvideo_dist.config import DecoderConfig, ModelConfig
from arvideo_dist.flops import forward_backward_flops
from arvideo_dist.model.arvideo import ARVideo, make_clusters
from arvideo_dist.model.vit import from_cubes, to_cubes

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SMALL = ModelConfig(encoder="tiny")
SMALL_DECODER = DecoderConfig(width=256, depth=2)
LOSS_TOLERANCE = 5e-3  # relative, bf16 autocast against fp32
GRADIENT_COSINE = 0.99


@dataclass
class ClipBatch:
    """What the engine needs of a loader's batch; the loader itself wants packages that are not here."""

    clips: torch.Tensor
    context_ids: torch.Tensor
    target_ids: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> ClipBatch:
        return ClipBatch(
            *move((self.clips, self.context_ids, self.target_ids), device), self.weights.to(device)
        )


def move(batch: Inputs, device: torch.device) -> Inputs:
    clips, context, target = (tensor.to(device) for tensor in batch)
    return clips, context, target


def inputs(config: ModelConfig, clips: int) -> Inputs:
    """Smooth random clips of the configured geometry and their drawn sequences, on the CPU."""
    clusters, rng = make_clusters(config, DecoderConfig()), np.random.default_rng(0)
    drawn = [clusters.draw_sequence(rng) for _ in range(clips)]
    context, target = (torch.from_numpy(np.stack(ids)) for ids in zip(*drawn, strict=True))
    size = (config.frames, config.image_size, config.image_size)
    coarse = torch.from_numpy(rng.integers(0, 256, (clips, 3, 4, 14, 14))).float()
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")
    return smooth.to(torch.uint8), context, target


def check_bf16_against_fp32(device: torch.device) -> dict[str, Any]:
    """Loss and gradient of one step in bf16 on `device` against fp32 on the CPU, for each order."""
    worst_loss, worst_cosine = 0.0, 1.0
    for order in ("random", "spatial_first", "temporal_first"):
        config = SMALL.model_copy(update={"order": order})
        torch.manual_seed(0)
        exact = ARVideo(config, SMALL_DECODER)
        half = copy.deepcopy(exact).to(device)
        batch = inputs(config, 2)
        expected = exact(*batch).loss_b.mean()
        expected.backward()
        with torch.autocast(device.type, torch.bfloat16):
            loss = half(*move(batch, device)).loss_b.mean()
        loss.backward()
        worst_loss = max(worst_loss, abs(loss.item() / expected.item() - 1))
        gradients = [torch.cat([p.grad.flatten().cpu() for p in m.parameters()]) for m in (exact, half)]
        worst_cosine = min(worst_cosine, torch.cosine_similarity(*gradients, dim=0).item())
    return {
        "passed": worst_loss < LOSS_TOLERANCE and worst_cosine > GRADIENT_COSINE,
        "largest_relative_loss_difference": worst_loss,
        "smallest_gradient_cosine": worst_cosine,
    }


def check_no_leak(device: torch.device) -> dict[str, Any]:
    """In bf16: other pixels in a cluster change no prediction of clusters up to it, and each later one."""
    torch.manual_seed(0)
    model = ARVideo(SMALL, SMALL_DECODER).to(device)
    clusters = model.clusters
    cluster_of = {int(token): number for number, row in enumerate(clusters.members_kn) for token in row}
    clips, context, target = inputs(SMALL, 1)
    order = [cluster_of[int(token)] for token in context[0, :: clusters.kept]]
    order.append(cluster_of[int(target[0, -1])])

    def predict(video: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model(*move((video, context, target), device)).predictions_bmp[0].float().cpu()

    before, at_fault = predict(clips), []
    for place in range(clusters.count):
        cubes = to_cubes(clips, model.tubelet)
        cubes[0, torch.from_numpy(clusters.members_kn[order[place]])] ^= 0xFF
        after = predict(from_cubes(cubes, model.tubelet, clips.shape[2:]))
        changed = (after - before).abs().amax(dim=-1).view(-1, clusters.size).amax(dim=-1) > 0
        if changed[:place].any() or not changed[place:].all():
            at_fault.append(place)
    return {"passed": not at_fault, "places_at_fault": at_fault}


def check_zero_stages(device: torch.device) -> dict[str, Any]:
    """ZeRO 0 to 3 (one rank; NCCL on a GPU) in bf16 give the same falling losses over ten steps."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"passed": True, "skipped": "DeepSpeed is not installed"}
    from arvideo_dist.config import OptimConfig, TrainConfig
    from arvideo_dist.train.engine import Engine

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    losses = []
    for stage in range(4):
        torch.manual_seed(0)
        model = ARVideo(SMALL, SMALL_DECODER)
        batch = ClipBatch(*inputs(SMALL, 2), weights=torch.ones(2))
        train = TrainConfig(zero_stage=stage, micro_batch=2, global_batch=2, precision="bf16")
        engine = Engine(model, train, OptimConfig(), device, accumulation_steps=1)
        series = []
        for _ in range(10):
            series.append(float(engine.accumulate([batch], total_weight=2.0)) / 2)
            engine.apply(3e-4)
        losses.append(series)
    dist.destroy_process_group()
    spread = float(np.ptp(losses, axis=0).max())
    falls = all(series[-1] < series[0] for series in losses)
    return {"passed": falls and spread < 0.01 * losses[0][0], "largest_spread": spread, "losses": losses}


def measure_step(device: torch.device, micro_batch: int = 32, steps: int = 20) -> dict[str, Any]:
    """Forward, backward and AdamW of the default ViT-B in bf16 on a GPU: time and memory."""
    config, decoder = ModelConfig(), DecoderConfig()
    model = ARVideo(config, decoder).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = move(inputs(config, micro_batch), device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(*batch).loss_b.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    return {
        "passed": True,
        "micro_batch": micro_batch,
        "seconds_per_step": seconds,
        "clips_per_second": micro_batch / seconds,
        "model_tflops_per_second": forward_backward_flops(config, decoder) * micro_batch / seconds / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


CHECKS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "bf16_against_fp32": check_bf16_against_fp32,
    "no_leak_in_bf16": check_no_leak,
    "zero_stages": check_zero_stages,
    "vit_b_step": measure_step,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write figures, commit and hardware here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: skipped, this machine has no CUDA device")
        return
    results = {}
    for name, check in CHECKS.items():
        began = time.perf_counter()
        try:
            results[name] = check(torch.device("cuda"))
        except Exception as error:  # the other checks run all the same; the exit code tells
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = time.perf_counter() - began
        print(name, json.dumps(results[name]), flush=True)
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "checks": results})
    sys.exit(not all(result["passed"] for result in results.values()))


if __name__ == "__main__":
    main()
