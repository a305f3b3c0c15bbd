"""Every check and measurement that needs a GPU, in one call of under ten minutes on a bare CUDA machine.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu-<date>.json

Needs torch and pydantic; DeepSpeed where it is installed. Without a GPU it says that it skipped, exit code 0.
A failed check ends with exit code 1 after all others have run.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no installed package

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.hardware import environment, write_json
from arvideo_dist.model.clusters import Clusters
from arvideo_dist.model.kinds import build_model, make_sequences
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.model.vit import from_cubes, to_cubes
from arvideo_dist.tasks.flops import forward_backward_flops
from arvideo_dist.tasks.task import decay_matrices

if TYPE_CHECKING:
    from arvideo_dist.train.engine.engine import Engine

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SMALL = ModelConfig(encoder="tiny")
SMALL_DECODER = DecoderConfig(width=256, depth=2)
# What differs from the defaults: model, decoder.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "arvideo": ({}, {}),
    "arvideo, spatial first": ({"order": "spatial_first"}, {}),
    "arvideo, temporal first": ({"order": "temporal_first"}, {}),
    "arvideo, decoder self-attention": ({}, {"self_attention": True}),
    "arvideo, a fifth of the targets": ({}, {"target_ratio": 0.2}),
    "tokengpt": ({"cluster": (1, 1, 1), "order": "spatial_first"}, {}),
    "igpt": (
        {
            "frames": 8,
            "image_size": 14,
            "tubelet": (1, 1, 1),
            "cluster": (1, 1, 1),
            "order": "spatial_first",
            "target_norm": "none",
        },
        {},
    ),
    "randsac": ({"kind": "randsac", "cluster": (1, 7, 7), "mask_ratio": 0.0}, {"self_attention": True}),
    "videomae": ({"kind": "videomae", "mask_ratio": 0.9}, {}),
}
LOSS_TOLERANCE = 5e-3  # relative, bf16 autocast against fp32
# bf16 keeps 8 bits: iGPT's predictions before training, three numbers a token, are much alike, so all are rounded
# alike by up to 2^-9, and the squared error moves by more than twice that.
IGPT_LOSS_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 0.05  # relative, of each parameter's gradient


@dataclass
class ClipBatch:
    """What the engine needs of a loader's batch; the loader itself wants packages that are not here."""

    drawn: Inputs
    weights: torch.Tensor

    def to(self, device: torch.device) -> ClipBatch:
        return ClipBatch(move(self.drawn, device), self.weights.to(device))


def move(batch: Inputs, device: torch.device) -> Inputs:
    clips, context, target = (tensor.to(device) for tensor in batch)
    return clips, context, target


def small(method: str) -> tuple[ModelConfig, DecoderConfig]:
    """A method of the paper with an encoder and a decoder that also a CPU computes."""
    model, decoder = METHODS[method]
    base = SMALL.model_dump(exclude_defaults=True)
    if "kind" in model:
        base.pop("cluster", None)  # ARVideo's own
    # Validated anew, which `model_copy` does not do.
    return (
        ModelConfig(**{**base, **model}),
        DecoderConfig(**{**SMALL_DECODER.model_dump(exclude_defaults=True), **decoder}),
    )


def inputs(config: ModelConfig, decoder: DecoderConfig, clips: int) -> Inputs:
    """Smooth random clips of the configured geometry and their drawn sequences, on the CPU."""
    sequences, rng = make_sequences(config, decoder), np.random.default_rng(0)
    drawn = [sequences.draw_sequence(rng) for _ in range(clips)]
    context, target = (torch.from_numpy(np.stack(ids)) for ids in zip(*drawn, strict=True))
    size = (config.frames, config.image_size, config.image_size)
    coarse = torch.from_numpy(rng.integers(0, 256, (clips, 3, 4, 14, 14))).float()
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")
    return smooth.to(torch.uint8), context, target


def disturbed(config: ModelConfig, decoder: DecoderConfig) -> PretrainingModel:
    """A model of which nothing is zero by initialisation, so that every path shows in its outputs."""
    torch.manual_seed(0)
    model = build_model(config, decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def check_bf16_against_fp32(device: torch.device) -> dict[str, Any]:
    """Loss and every parameter's gradient of one step in bf16 on `device` against fp32 on the CPU."""
    methods = {}
    for method in METHODS:
        config, decoder = small(method)
        exact = disturbed(config, decoder)
        half = copy.deepcopy(exact).to(device)
        batch = inputs(config, decoder, 2)
        expected = exact(*batch).loss_b.mean()
        expected.backward()
        with torch.autocast(device.type, torch.bfloat16):
            loss = half(*move(batch, device)).loss_b.mean()
        loss.backward()
        differences = {}
        for (name, true), other in zip(exact.named_parameters(), half.parameters(), strict=True):
            assert true.grad is not None
            assert other.grad is not None
            differences[name] = float((other.grad.cpu() - true.grad).norm() / true.grad.norm())
        worst = max(differences, key=lambda name: differences[name])
        methods[method] = {
            "relative_loss_difference": abs(loss.item() / expected.item() - 1),
            "largest_relative_gradient_difference": differences[worst],
            "of": worst,
        }
    passed = all(
        figures["relative_loss_difference"] < (IGPT_LOSS_TOLERANCE if name == "igpt" else LOSS_TOLERANCE)
        and figures["largest_relative_gradient_difference"] < GRADIENT_TOLERANCE
        for name, figures in methods.items()
    )
    return {"passed": passed, "methods": methods}


def check_no_leak(device: torch.device) -> dict[str, Any]:
    """In bf16, other pixels in what a prediction must not see do not change it, and others do.

    With clusters: its own cluster and later ones. VideoMAE: every masked token.
    """
    at_fault = {method: _leaks(method, device) for method in METHODS}
    return {"passed": not any(at_fault.values()), "places_at_fault": at_fault}


def _leaks(method: str, device: torch.device) -> list[int]:
    """Places of the order, or tokens, whose pixels change too much or too little."""
    config, decoder = small(method)
    model = disturbed(config, decoder).to(device)
    clips, context, target = inputs(config, decoder, 1)

    def predict(video: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model(*move((video, context, target), device)).predictions_bmp[0].float().cpu()

    cubes, before = to_cubes(clips, model.tubelet), predict(clips)

    def changed(tokens: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Bool [M]: which predictions differ once `tokens` of the clip hold other pixels."""
        others = cubes.clone()
        others[0, torch.as_tensor(tokens)] ^= 0x80  # by 128, whatever stood there
        return (predict(from_cubes(others, model.tubelet, clips.shape[2:])) != before).any(dim=-1)

    if isinstance(model.sequences, Clusters):
        return _leaking_places(model.sequences, context, target, changed)
    hidden, seen = changed(target[0]), changed(context[0])
    return [*hidden.nonzero().flatten().tolist(), *(~seen).nonzero().flatten().tolist()]


def _leaking_places(
    clusters: Clusters,
    context: torch.Tensor,
    target: torch.Tensor,
    changed: Callable[[np.ndarray], torch.Tensor],
) -> list[int]:
    """Places in the order whose cluster changes a prediction up to its own, or not the later ones."""
    cluster_of = {int(token): number for number, row in enumerate(clusters.members_kn) for token in row}
    order = [cluster_of[int(token)] for token in context[0, :: clusters.kept]]
    order.append(cluster_of[int(target[0, -1])])
    places = range(0, clusters.count, max(1, clusters.count // 16))  # all of up to 31, about 16 of more
    leaking = []
    for place in places:
        differs = changed(clusters.members_kn[order[place]]).view(-1, clusters.queried)
        differs_k = torch.cat([torch.zeros(clusters.min_context, dtype=torch.bool), differs.any(dim=-1)])
        later = differs_k[place + 1 :]
        # In bf16 one token among a thousand may move a prediction by less than its last digit.
        reaches = later.all() if clusters.size > 1 or not len(later) else later.any()
        if differs_k[: place + 1].any() or not reaches:
            leaking.append(place)
    return leaking


@functools.cache
def join_single_rank(cuda: bool) -> None:
    """A process group of one rank: NCCL for the device's tensors, gloo for the host's. It stays until the process
    ends, since DeepSpeed keeps the group that it meets first."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)


def fresh_model() -> PretrainingModel:
    """The same small ARVideo each time."""
    torch.manual_seed(0)
    return build_model(SMALL, SMALL_DECODER)


def make_engine(model: PretrainingModel, device: torch.device, stage: int) -> Engine:
    """DeepSpeed in bf16."""
    from arvideo_dist.config.optim import OptimConfig, TrainConfig
    from arvideo_dist.train.engine.engine import Engine

    train = TrainConfig(zero_stage=stage, micro_batch=2, global_batch=2, precision="bf16")

    def loss(forward: Any, batch: Any) -> torch.Tensor:
        return forward(*batch.drawn).loss_b

    return Engine(model, loss, decay_matrices(model, 0.05), train, OptimConfig(), device, 1)


def train_steps(engine: Engine, steps: int, before_update: Callable[[], None] = lambda: None) -> list[float]:
    """Losses of `steps` optimiser steps on one batch."""
    batch: Any = ClipBatch(inputs(SMALL, SMALL_DECODER, 2), weights=torch.ones(2))
    losses = []
    for _ in range(steps):
        losses.append(float(engine.accumulate([batch], total_weight=2.0)) / 2)
        before_update()
        engine.apply(3e-4)
    return losses


def check_zero_stages(device: torch.device) -> dict[str, Any]:
    """ZeRO 0 to 3 (one rank; NCCL on a GPU) in bf16 give the same falling losses over ten steps."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"passed": True, "skipped": "DeepSpeed is not installed"}
    join_single_rank(device.type == "cuda")
    losses = [train_steps(make_engine(fresh_model(), device, stage), 10) for stage in range(4)]
    spread = float(np.ptp(losses, axis=0).max())
    falls = all(series[-1] < series[0] for series in losses)
    return {"passed": falls and spread < 0.01 * losses[0][0], "largest_spread": spread, "losses": losses}


def check_checkpoints(device: torch.device) -> dict[str, Any]:
    """A save that is copied beside the following step holds the state before it: a new engine that starts from
    it repeats the losses of the steps that followed, at every ZeRO stage and from each into the next."""
    if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "pyarrow", "safetensors")):
        return {"passed": True, "skipped": "DeepSpeed, pyarrow or safetensors is not installed"}
    from arvideo_dist.config.run import RunConfigSection
    from arvideo_dist.storage import Storage
    from arvideo_dist.train.checkpoint.reader import open_newest_whole
    from arvideo_dist.train.checkpoint.saver import Saver

    join_single_rank(device.type == "cuda")
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        control = dist.new_group(backend="gloo")
        for stage in range(4):
            run, engine = Storage(folder).child(f"zero-{stage}"), make_engine(fresh_model(), device, stage)
            saver = Saver(run, engine, RunConfigSection(), say=lambda line: None)
            train_steps(engine, 3)
            saver.request(3, {})
            expected = train_steps(engine, 3, saver.before_update)
            saver.finish()
            for other in (stage, (stage + 1) % 4):
                model, start = fresh_model(), open_newest_whole(run, control)
                assert start is not None
                start.load_weights(model)
                resumed = make_engine(model, device, other)
                start.load_optimizer(resumed)
                losses = train_steps(resumed, 3)
                largest = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
                differences[f"{stage} to {other}"] = largest
    return {"passed": max(differences.values()) < 1e-3, "largest_relative_differences": differences}


def check_bad_steps(device: torch.device) -> dict[str, Any]:
    """A step whose loss is NaN changes no bit of weights, moments and step count at any ZeRO stage, and the steps
    after it are those of an engine that never met it. The forward pass, timed by the device's own clock, takes part
    of a step's time."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"passed": True, "skipped": "DeepSpeed is not installed"}
    from arvideo_dist.train.engine.zero_state import optimizer_steps, owned_fragments, state_of

    def state(engine: Engine) -> list[torch.Tensor]:
        tensors = [kind for f in owned_fragments(engine) for kind in state_of(engine, f).values()]
        return [*(tensor.clone() for tensor in tensors), torch.tensor(optimizer_steps(engine))]

    join_single_rank(device.type == "cuda")
    bad: Any = ClipBatch(inputs(SMALL, SMALL_DECODER, 2), weights=torch.tensor([1.0, torch.nan]))
    stages = {}
    for stage in range(4):
        expected = train_steps(make_engine(fresh_model(), device, stage), 4)
        engine = make_engine(fresh_model(), device, stage)
        train_steps(engine, 2)
        before = state(engine)
        began = time.perf_counter()
        engine.accumulate([bad], total_weight=2.0)
        applied = engine.apply(3e-4).applied
        forward_share = engine.forward_time.seconds() / (time.perf_counter() - began)
        unchanged = all(torch.equal(*pair) for pair in zip(state(engine), before, strict=True))
        losses = train_steps(engine, 2)
        stages[stage] = {
            "applied": applied,
            "state_unchanged": unchanged,
            "largest_relative_difference": max(
                abs(a / b - 1) for a, b in zip(losses, expected[2:], strict=True)
            ),
            "forward_share_of_the_step": forward_share,
        }
    passed = all(
        figures["state_unchanged"]
        and not figures["applied"]
        and figures["largest_relative_difference"] < 1e-3
        and 0 < figures["forward_share_of_the_step"] < 1
        for figures in stages.values()
    )
    return {"passed": passed, "stages": stages}


def measure_steps(device: torch.device, micro_batch: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Forward, backward and AdamW of ViT-B in bf16 on a GPU, eager and compiled: time and memory of ARVideo
    with all and with a fifth of its targets, of our VideoMAE, and of transformers' class where installed.

    Interleaved rounds of ten steps each; medians.
    """
    steps: dict[str, Callable[[], None]] = {}
    flops: dict[str, float] = {}
    for name in ("arvideo", "arvideo, a fifth of the targets", "videomae"):
        model_fields, decoder_fields = METHODS[name]
        config = ModelConfig(**model_fields)
        width = 384 if name == "videomae" else 512  # VideoMAE-B's own decoder
        decoder = DecoderConfig(**{"width": width, **decoder_fields})
        torch.manual_seed(0)
        model = build_model(config, decoder).to(device)
        batch = move(inputs(config, decoder, micro_batch), device)
        flops[name] = forward_backward_flops(config, decoder) * micro_batch
        steps[name] = _step(model, lambda model=model, batch=batch: model(*batch).loss_b.mean())
        compiled: Any = torch.compile(copy.deepcopy(model))
        flops[f"{name}, compiled"] = flops[name]
        steps[f"{name}, compiled"] = _step(
            compiled, lambda model=compiled, batch=batch: model(*batch).loss_b.mean()
        )
    steps |= _transformers_steps(device, micro_batch)
    memory, errors = {}, {}
    for name in list(steps):
        try:
            memory[name] = _step_memory(steps[name])
        except Exception as error:  # a compiler's fault; the other figures are taken all the same
            errors[name] = f"{type(error).__name__}: {error}"
            del steps[name]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - began) / 10)
    figures = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        figures[name] = {
            "seconds_per_step": {"median": median, "rounds": values},
            "clips_per_second": micro_batch / median,
            "memory_of_a_step_gib": memory[name],
        }
        if name in flops:
            figures[name]["model_tflops_per_second"] = flops[name] / median / 1e12
    failed_eager = [name for name in errors if not name.endswith(", compiled")]
    return {"passed": not failed_eager, "micro_batch": micro_batch, "methods": figures, "errors": errors}


def _step_memory(step: Callable[[], None]) -> float:
    """GiB that a step adds to what is on the device already; after five steps to warm up."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def _step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _transformers_steps(device: torch.device, micro_batch: int) -> dict[str, Callable[[], None]]:
    """VideoMAEForPreTraining of the same size, eager and compiled; nothing where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    model = VideoMAEForPreTraining(VideoMAEConfig()).to(device).train()
    clips, _, masked_ids = inputs(ModelConfig(kind="videomae", mask_ratio=0.9), DecoderConfig(), micro_batch)
    pixels = (clips.to(device).float() / 255).transpose(1, 2)
    masked = torch.zeros(micro_batch, 1568, dtype=torch.bool).scatter_(1, masked_ids, True).to(device)
    compiled: Any = torch.compile(copy.deepcopy(model))
    return {
        "transformers": _step(model, lambda: model(pixels, bool_masked_pos=masked).loss),
        "transformers, compiled": _step(compiled, lambda: compiled(pixels, bool_masked_pos=masked).loss),
    }


def check_planes_to_clips(device: torch.device) -> dict[str, Any]:
    """Colour conversion, crop and resize on `device` against the CPU: within one grey level."""
    if any(importlib.util.find_spec(name) is None for name in ("av", "decord")):
        return {"passed": True, "skipped": "av or decord is not installed"}
    from arvideo_dist.data.transforms import PlanarClips

    random = torch.Generator().manual_seed(0)
    planes = PlanarClips(
        torch.randint(0, 256, (16, 16, 256, 340), generator=random, dtype=torch.uint8),
        torch.randint(0, 256, (16, 16, 2, 128, 170), generator=random, dtype=torch.uint8),
        torch.tensor([[slot % 2, slot % 2, 168 + 5 * slot, 224] for slot in range(16)]),
        224,
    )
    expected = planes.to_clips().int()
    pinned = planes.pin_memory() if device.type == "cuda" else planes
    difference = (pinned.to(device).to_clips().cpu().int() - expected).abs()
    return {
        "passed": int(difference.max()) <= 1,
        "largest_difference": int(difference.max()),
        "share_that_differs": float((difference > 0).float().mean()),
    }


CHECKS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "bf16_against_fp32": check_bf16_against_fp32,
    "no_leak_in_bf16": check_no_leak,
    "zero_stages": check_zero_stages,
    "checkpoints": check_checkpoints,
    "bad_steps": check_bad_steps,
    "planes_to_clips": check_planes_to_clips,
    "vit_b_steps": measure_steps,
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
